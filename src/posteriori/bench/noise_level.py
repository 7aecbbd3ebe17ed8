"""How well the noise level is estimated from a measurement alone: |log(estimate / truth)| per task and level.

python -m posteriori.bench.noise_level PHOTOS --out FILE
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from posteriori.bench.common import Results, markdown_table, photo_files, read_photo, say, seed_of
from posteriori.noise_level import estimate_sigma_y
from posteriori.operators import Blur, Downsampling, GaussianBlur, Identity, Inpainting, LinearOperator, motion_kernel
from posteriori.pivot import measure
from posteriori.tasks import box_mask, random_mask

__all__ = ["main", "table"]

LEVELS = (0.01, 0.02, 0.05, 0.1, 0.2)

TASKS: dict[str, Callable[[int, int], LinearOperator]] = {
    "denoise": lambda size, seed: Identity(),
    "inpaint": lambda size, seed: Inpainting(random_mask((size, size), 0.7, np.random.default_rng(seed))),
    "box": lambda size, seed: Inpainting(box_mask((size, size), (size // 2, size // 2), np.random.default_rng(seed))),
    "sr": lambda size, seed: Downsampling(4),
    "gaussian": lambda size, seed: GaussianBlur(3.0),
    "motion": lambda size, seed: Blur(motion_kernel(min(61, size // 2 * 2 - 1), 0.5, seed), "circular"),
}


def errors(path: Path, task: str, sigma_y: float, size: int) -> dict[str, Any]:
    """Logarithm of estimate over truth for one photo; with scikit-image's estimate beside it for denoising."""
    x_0, seed = read_photo(path, size), seed_of(path.name)
    A = TASKS[task](size, seed)
    y = measure(A, x_0, sigma_y, seed=seed)
    row: dict[str, Any] = {"error": math.log(float(estimate_sigma_y(A, y)) / sigma_y)}
    if task == "denoise":
        try:
            from skimage.restoration import estimate_sigma

            peer = float(np.mean(estimate_sigma(y[0].numpy(), channel_axis=0)))
        except ImportError:  # scikit-image or PyWavelets
            return row
        row["skimage"] = math.log(peer / sigma_y)
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Median and 90th percentile of ``|log ratio|``, and the median of the ratio itself."""
    lines = []
    for task in dict.fromkeys(r["task"] for r in rows):
        for key, name in (("error", task), ("skimage", f"{task}, scikit-image")):
            cells = []
            for level in LEVELS:
                found = np.array([r[key] for r in rows if (r["task"], r["sigma_y"]) == (task, level) and key in r])
                if found.size:
                    median, high = np.median(abs(found)), np.quantile(abs(found), 0.9)
                    cells.append(f"{median:.2f} / {high:.2f} ({math.exp(np.median(found)):.2f})")
            if cells:
                lines.append([name, *cells])
    return markdown_table(["task", *[f"sigma_y = {s:g}" for s in LEVELS]], lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        "python -m posteriori.bench.noise_level", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("photos", type=Path, help="folder of photos")
    parser.add_argument("--match", default=".*", help="only those whose name matches in full")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one for each photo, task and level")
    args = parser.parse_args(arguments)
    results = Results(args.out, ("photo", "task", "sigma_y", "size"))
    rows = []
    for task in args.tasks.split(","):
        for path in photo_files(args.photos, args.match, args.limit):
            for sigma_y in LEVELS:
                key = {"photo": path.name, "task": task, "sigma_y": sigma_y, "size": args.size}
                rows.append(results.get(partial(errors, path, task, sigma_y, args.size), **key))
    say(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
