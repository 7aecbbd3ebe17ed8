r"""The posterior mean of photo models over the settings of each task: rates, sides, factors, widths, lengths, noise.

    python -m posteriori.bench.photo_settings PHOTOS/test --model photo --out runs/photo-settings --limit 12 \
        --document docs/model-photo.md

One network is for all of them, and it saw some more often than others in training, so the question is where it is
weak. The yardstick is the piecewise smooth estimate (:mod:`posteriori.smooth`), which has no training and no weight to
tune: a setting that the network handles badly shows as a gain over it that is lower than its neighbours'. Masks,
kernels and noise are drawn from the photo's name as in :mod:`posteriori.bench.photos`. Several models
(``--model A B``) stand side by side: a network that was trained for one setting alone, say, beside the one for all.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from posteriori.bench.common import (
    markdown_table,
    new_document,
    photo_files,
    read_photo,
    replace_between,
    say,
    seed_of,
)
from posteriori.bench.photo_figures import gains
from posteriori.bench.photos import operator_for
from posteriori.bench.runner import Cell, Row, Rows, measure_cells
from posteriori.checkpoint import load, read_card
from posteriori.denoise import NetworkDenoiser
from posteriori.metrics import psnr
from posteriori.operators import Blur, Downsampling, GaussianBlur, Inpainting, LinearOperator, motion_kernel
from posteriori.pivot import measure
from posteriori.posterior import ExactPosterior
from posteriori.smooth import smooth_estimate
from posteriori.tasks import box_mask, random_mask

__all__ = ["SETTINGS", "Setting", "main", "settings_cells", "table"]

MARKER = "photo-settings"
USUAL = 0.05


@dataclass(frozen=True)
class Setting:
    """One measurement: a family with the value of its parameter, and the noise.

    Attributes:
        family: of :data:`SETTINGS`.
        value: missing share, side of the missing box over the photo's, factor, width or length in pixels; ``sigma_y``
            in the families ``noise-...``.
    """

    family: str
    value: float

    @property
    def sigma_y(self) -> float:
        return self.value if self.family.startswith("noise-") else USUAL

    def side(self, size: int) -> int:
        """The largest side up to ``size`` that the operator takes: whole blocks."""
        return size - size % int(self.value) if self.family in ("sr", "sr-bicubic") else size

    def operator(self, size: int, seed: int) -> LinearOperator:
        """For a photo of ``size`` x ``size`` pixels; masks and kernels are drawn with ``seed``."""
        rng = np.random.default_rng([sum(map(ord, self.family)), seed])
        match self.family:
            case "random":
                return Inpainting(random_mask((size, size), self.value, rng))
            case "box":
                return Inpainting(box_mask((size, size), (round(self.value * size),) * 2, rng))
            case "sr" | "sr-bicubic":
                return Downsampling(int(self.value), "box" if self.family == "sr" else "bicubic")
            case "gaussian":
                return GaussianBlur(self.value)
            case "motion":
                return Blur(motion_kernel(int(self.value), 0.5, seed), "circular")
        return operator_for(self.family.removeprefix("noise-"), size, seed)


#: Family -> its values. Training covers 20 to 97 % missing, boxes of .15 to .65, factors 2, 3, 4 and 8, widths of 0.5
#: to 6, lengths up to 61 and noise from 0.01 to 0.2; factor 6 lies between.
SETTINGS: dict[str, tuple[float, ...]] = {
    "random": (0.3, 0.5, 0.7, 0.8, 0.9, 0.95),
    "box": (0.125, 0.25, 0.375, 0.5, 0.625),
    "sr": (2, 3, 4, 6, 8),
    "sr-bicubic": (2, 3, 4, 8),
    "gaussian": (1.0, 2.0, 3.0, 4.0, 6.0),
    "motion": (15, 31, 61),
    **{f"noise-{task}": (0.01, 0.02, 0.05, 0.1, 0.2) for task in ("random", "box", "sr", "gaussian", "motion")},
}
NAMES = {
    "random": "missing pixels, share",
    "box": "missing box, side",
    "sr": "super-resolution, box average, factor",
    "sr-bicubic": "super-resolution, bicubic, factor",
    "gaussian": "Gaussian blur, sigma in pixels",
    "motion": "motion blur, taps",
    "noise-random": "70 % missing, sigma_y",
    "noise-box": "half the side missing, sigma_y",
    "noise-sr": "super-resolution x4, sigma_y",
    "noise-gaussian": "Gaussian blur 3, sigma_y",
    "noise-motion": "motion blur 61, sigma_y",
}


def settings_cells(
    files: Sequence[Path], size: int, families: Sequence[str], models: Mapping[str, Callable[[], NetworkDenoiser]]
) -> Iterator[Cell]:
    """A cell for every setting, photo and model; ``smooth`` is the model without a network.

    Args:
        files: photos of at least ``size`` x ``size`` pixels.
        size: side of the centre crop, made smaller where a factor does not divide it.
        families: of :data:`SETTINGS`.
        models: version -> what loads it.
    """

    def compute(path: Path, setting: Setting, denoiser: Callable[[], NetworkDenoiser] | None) -> Row:
        seed, side = seed_of(path.name), setting.side(size)
        x_0 = read_photo(path, side)
        A = setting.operator(side, seed)
        y = measure(A, x_0, setting.sigma_y, seed=seed)
        return {"psnr": float(psnr(_estimate(A, y, x_0, setting.sigma_y, denoiser), x_0))}

    for family in families:
        for value in SETTINGS[family]:
            setting = Setting(family, value)
            for path in files:
                for version, denoiser in {"smooth": None, **models}.items():
                    key: Row = {
                        "family": family, "value": value, "photo": path.name, "model": version, "size": size,
                    }  # fmt: skip
                    yield Cell(key, partial(compute, path, setting, denoiser))


def _estimate(
    A: LinearOperator, y: Tensor, x_0: Tensor, sigma_y: float, denoiser: Callable[[], NetworkDenoiser] | None
) -> Tensor:
    if denoiser is None:
        return smooth_estimate(y, A, x_0.shape, sigma_y=sigma_y, prior_std=0.5)
    return ExactPosterior(denoiser(), A, y, sigma_y).mean()


Means = dict[str, dict[float, dict[str, float]]]


def means(rows: Sequence[Row]) -> Means:
    """Family -> value -> model -> PSNR averaged over the photos, in dB."""
    found: dict[tuple[str, float, str], list[float]] = {}
    for r in rows:
        if "psnr" in r:
            found.setdefault((r["family"], r["value"], r["model"]), []).append(r["psnr"])
    result: Means = {}
    for (family, value, model), values in found.items():
        result.setdefault(family, {}).setdefault(value, {})[model] = float(np.mean(values))
    return result


def over_smooth(found: Means, model: str) -> dict[str, dict[float, float]]:
    """Family -> value -> gain of a model's mean over the smooth estimate, in dB."""
    return {
        family: {value: by_model[model] - by_model["smooth"] for value, by_model in by_value.items()}
        for family, by_value in found.items()
    }


def table(found: Means, models: Sequence[str]) -> str:
    """Every setting in Markdown: the smooth estimate and each model's mean in dB, and the first model's gain."""
    gain = over_smooth(found, models[0])
    lines: list[list[object]] = []
    for family, by_value in found.items():
        for value, by_model in by_value.items():
            shown_means = [by_model[m] for m in ("smooth", *models)]
            lines.append([NAMES[family], f"{value:g}", *shown_means, f"{gain[family][value]:+.2f}"])
    shown = ["mean"] if len(models) == 1 else [f"mean, {m}" for m in models]
    return markdown_table(["measurement", "value", "smooth", *shown, "gain"], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m posteriori.bench.photo_settings", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("photos", help="folder with the photos to measure on")
    parser.add_argument("--out", required=True, type=Path, help="folder for rows; a run continues what it finds there")
    parser.add_argument("--model", nargs="+", default=["photo"], help="bundled names or folders; the first is judged")
    parser.add_argument("--families", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="FAMILY")
    parser.add_argument("--document", type=Path, help="Markdown file with markers; OUT/report.md when left out")
    parser.add_argument("--figures", type=Path, help="folder of the figure; figures beside the document")
    parser.add_argument("--match", default=".*", help="regular expression that names of photos match in full")
    parser.add_argument("--limit", type=int, help="this many photos, evenly spread")
    parser.add_argument("--size", type=int, default=256, help="side of the centre crop")
    parser.add_argument("--threads", type=int, help="of torch")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    models = {str(read_card(m)["sha256"])[:12]: cache(partial(load, m)) for m in args.model}
    files = photo_files(args.photos, args.match, args.limit)
    rows = Rows(args.out / "rows.jsonl")
    cells = partial(settings_cells, files, args.size, args.families, models)
    measure_cells(cells(), rows)
    found = means(rows.of(cells()))
    document = args.document or args.out / "report.md"
    new_document(document, MARKER)
    names = list(models)
    head = (
        f"PSNR in dB over {len(files)} photos of {args.size}x{args.size} pixels (as many below that as a factor\n"
        f"divides), `sigma_y = {USUAL:g}` unless it is what varies; model `{names[0]}`."
    )
    replace_between(document, MARKER, f"{head}\n\n{table(found, names)}")
    curves = {NAMES[family]: curve for family, curve in over_smooth(found, names[0]).items()}
    gains(curves, (args.figures or document.parent / "figures") / "photo-settings.png")
    say(f"\n{table(found, names)}\n\nreport: {document}")


if __name__ == "__main__":
    main()
