"""Put a trained model into the package: weights, card with its measured figures, attribution, and the README's table.

    python scripts/publish_model.py runs/photo/model --figures runs/photos/photos.json \
        --calibration runs/calibration/photos.json \
        --attribution PHOTOS/attribution-ccby.csv PHOTOS/attribution-more.csv

``--figures`` and ``--calibration`` are written by ``python -m posteriori.bench.photos``. Total variation does not
depend on the model: where it was not measured again it is that of the published card, if the measurements are the same.
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
        shown = {k: f"{f[k]:.2f}" for k in ("input", "linear", "smooth", "tv", "first", "mmse")}
        best = max(shown, key=lambda k: f[k])
        shown[best] = f"**{shown[best]}**"
        rows.append(
            [name, *shown.values(),
             f"{c['residual']:.3f}", f"{c['ratio_sample']:.2f}", f"{c['ratio_mean']:.3f}"]
        )  # fmt: skip
    header = ["task", "input", "linear", "smooth", "TV", "first look", "mean", "residual of samples (1)",
              "MSE sample / mean (2)", "MSE mean of 8 / mean (1.125)"]  # fmt: skip
    return markdown_table(header, rows)


def with_total_variation(figures: dict[str, Any], published: dict[str, Any]) -> dict[str, Any]:
    """The figures of every task, with those of total variation from a published card where they are missing.

    Raises:
        ValueError: when that card's measurements are not the same.
    """
    result = {}
    for task, own in figures.items():
        kept = published.get("figures", {}).get("tasks", {}).get(task, {})
        if "tv" not in own:
            if any(abs(own[k] - kept.get(k, 0.0)) > 1e-3 for k in ("photos", "input", "linear")):
                raise ValueError(f"{task}: the published card has other photos: measure again with --tune-on")
            own = {**{k: kept[k] for k in ("tv", "seconds_tv", "tv_weight")}, **own}
        result[task] = own
    return result


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
    folder = ROOT / "src" / "posteriori" / "assets" / "models" / card["name"]
    card_path = folder / "model.json"
    published = json.loads(card_path.read_text()) if card_path.exists() else {}
    figures["tasks"] = with_total_variation(figures["tasks"], published)
    card["figures"] = {
        "what": "100 unseen photos of 256x256 pixels, sigma_y 0.05; PSNR in dB, mean over photos; tv is colour total "
        "variation, converged, weight tuned per task on other photos",
        "tasks": figures["tasks"],
        "calibration": {"setting": calibration["setting"], "tasks": calibration["tasks"]},
    }
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(args.model / "model.safetensors", folder / "model.safetensors")
    write_atomically(card_path, (json.dumps(card, indent=1) + "\n").encode())
    write_atomically(folder / "ATTRIBUTION.csv", attribution(args.attribution).encode())
    table = photo_table(figures, calibration)
    replace_between(ROOT / "README.md", "photo-table", table)
    replace_between(ROOT / "docs" / "model-photo.md", "photo-table", table)
    print(table)


if __name__ == "__main__":
    main()
