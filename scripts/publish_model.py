"""Put a trained model into the package: weights, card with its measured figures, attribution, and the README's table.

    python scripts/publish_model.py runs/photo/model --figures runs/photos/photos.json \
        --calibration runs/calibration/photos.json \
        --attribution PHOTOS/attribution-ccby.csv PHOTOS/attribution-more.csv

``--figures`` and ``--calibration`` are written by ``python -m posteriori.bench.photos``.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

from posteriori.bench.common import markdown_table, replace_between
from posteriori.checkpoint import write_atomically

ROOT = Path(__file__).resolve().parents[1]
TASKS = {
    "random": "random inpainting, 70 % missing",
    "box": "box inpainting, 128x128 missing",
    "sr": "4x super-resolution (box average)",
    "gaussian": "Gaussian blur, sigma 3",
    "motion": "motion blur, 61 taps",
}
KEPT_ATTRIBUTION = ("file", "author", "source", "licence")


def attribution(files: list[Path]) -> str:
    """One table of all training photos: file, author, source, licence."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, KEPT_ATTRIBUTION, lineterminator="\n")
    writer.writeheader()
    for path in files:
        with path.open(newline="", encoding="utf-8") as opened:
            for row in csv.DictReader(opened):
                if row.get("split", "train") != "train":
                    continue
                writer.writerow(
                    {
                        "file": row.get("file") or f"{row['image_id']}.jpg",
                        "author": " ".join((row.get("author") or "").split()),
                        "source": row.get("source_url") or row.get("landing_url"),
                        "licence": " ".join((row.get("licence") or "").split()),
                    }
                )
    return stream.getvalue()


def photo_table(figures: dict[str, Any], calibration: dict[str, Any]) -> str:
    """PSNR of every estimate, and the calibration of the samples."""
    rows = []
    for task, name in TASKS.items():
        f, c = figures["tasks"][task], calibration["tasks"][task]
        best = max("tv", "mmse", key=lambda k: f[k])
        shown = {k: f"**{f[k]:.2f}**" if k == best else f"{f[k]:.2f}" for k in ("tv", "mmse")}
        rows.append(
            [name, f"{f['input']:.2f}", f"{f['linear']:.2f}", shown["tv"], shown["mmse"],
             f"{c['residual']:.3f}", f"{c['ratio_sample']:.2f}", f"{c['ratio_mean']:.3f}"]
        )  # fmt: skip
    header = ["task", "input", "linear", "TV", "mean (1 evaluation)", "residual of samples (1)",
              "MSE sample / mean (2)", "MSE mean of 8 / mean (1.125)"]  # fmt: skip
    return markdown_table(header, rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--figures", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--attribution", type=Path, nargs="+", required=True)
    parser.add_argument("--note", help="what the recipe does not tell of how these weights were trained")
    args = parser.parse_args()
    card = json.loads((args.model / "model.json").read_text())
    figures, calibration = (json.loads(p.read_text()) for p in (args.figures, args.calibration))
    if args.note:
        card["training"]["note"] = args.note
    card["figures"] = {
        "what": "100 unseen photos of 256x256 pixels, sigma_y 0.05; PSNR in dB, mean over photos; tv is colour total "
        "variation, converged, weight tuned per task on other photos",
        "tasks": figures["tasks"],
        "calibration": {"setting": calibration["setting"], "tasks": calibration["tasks"]},
    }
    folder = ROOT / "src" / "posteriori" / "assets" / "models" / card["name"]
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(args.model / "model.safetensors", folder / "model.safetensors")
    write_atomically(folder / "model.json", (json.dumps(card, indent=1) + "\n").encode())
    write_atomically(folder / "ATTRIBUTION.csv", attribution(args.attribution).encode())
    table = photo_table(figures, calibration)
    replace_between(ROOT / "README.md", "photo-table", table)
    replace_between(ROOT / "docs" / "model-photo.md", "photo-table", table)
    print(table)


if __name__ == "__main__":
    main()
