r"""Photos damaged as real ones are, restored by ``posteriori restore``: what works, what does not, what to do instead.

    python -m posteriori.bench.photo_reality PHOTOS/test --attribution PHOTOS/attribution-ccby.csv \
        --work runs/photo-reality --document docs/old-photos.md

Every case takes a photo (its inner 192x192 pixels), damages it, saves it as a file of 8 bits, and does with that file
what the command does with the options that the page shows; the noise level is estimated unless the case says otherwise.
Two cases go on in Python, where the command has no option for what is known of the noise. The truth is known, hence the
PSNR before and after. What is finished is not restored again. In the document, the table and the photos' authors stand
between markers; the rest is written by hand.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from posteriori import noise
from posteriori.batch import restore_all
from posteriori.bench.common import markdown_table, new_document, replace_between, say, seed_of
from posteriori.bench.photo_damage import (
    PHOTONS,
    Damaged,
    blurred,
    coarse_noise,
    grain_power,
    photon_noise,
    scratched,
    thumbnail,
    torn,
    white_noise,
)
from posteriori.checkpoint import load, write_atomically
from posteriori.denoise import NetworkDenoiser
from posteriori.images import encode_png, read_image, to_picture
from posteriori.operators import Identity
from posteriori.posterior import ExactPosterior
from posteriori.problems import TaskOptions
from posteriori.restore import RestoreOptions, psnr
from posteriori.sheets import contact_sheet

__all__ = ["CASES", "Case", "Run", "credits", "main", "restore_case", "sheet", "table"]

LARGEST_SHEET = 300_000  # bytes
SIDE = 192  # pixels of a photo
SHOWN = 176  # of what the sheet shows of it, the middle


@dataclass(frozen=True)
class Run:
    """A way to restore: options of the command (``MASK`` stands for the mask's file), or a function in Python."""

    title: str
    options: str
    solve: Callable[[Tensor, NetworkDenoiser], Tensor] | None = None


@dataclass(frozen=True)
class Case:
    """A kind of damage, of the photo whose file name begins with ``nips17_`` and then ``photo``."""

    title: str
    photo: str
    damage: Callable[[Image.Image, np.random.Generator], Damaged]
    runs: Sequence[Run]


# -- what the command has no option for --------------------------------------------------------------------------------


def _known_photons(y: Tensor, denoiser: NetworkDenoiser) -> Tensor:
    """Two passes: brightness from the first, from it the deviation of every pixel, then the posterior given those."""
    plain = ExactPosterior(denoiser, Identity(), y, 0.12).mean()
    brightness = ((plain.mean(1, keepdim=True).clamp(-1, 1) + 1) / 2).clamp_min(0.02)
    std = (2 * (brightness / PHOTONS).sqrt()).clamp(0.01, 0.2)
    return ExactPosterior(denoiser, *noise.whiten(Identity(), y, std=std)).mean()


def _known_grain(y: Tensor, denoiser: NetworkDenoiser) -> Tensor:
    """The noise's power at every frequency, as a flat part of the scan shows it."""
    power = torch.from_numpy(0.1**2 * grain_power((y.shape[-2], y.shape[-1])))
    whitener = noise.stationary_whitener(y.shape[-2:], spectrum=power)
    return ExactPosterior(denoiser, *noise.whiten(Identity(), y, whitener=whitener, sigma_y=0.05)).mean()


AUTO = "--sigma-y auto"
CASES = {
    "scratches": Case(
        "scratches and\ndust", "7d599306", scratched,
        [Run("mask", f"--task inpaint --mask MASK {AUTO}"), Run("no mask", f"--task denoise {AUTO}")],
    ),
    "torn": Case(
        "torn corner", "f0add7f5", torn, [Run("mask", f"--task inpaint --mask MASK {AUTO}")]
    ),
    "noise": Case(
        "unknown noise\n(it is 0.15)", "839aa3d1", lambda p, rng: Damaged(white_noise(p, 0.15, rng), p),
        [Run("auto", f"--task denoise {AUTO}")],
    ),
    "grey": Case(
        "grey, saved\nas colours,\nnoise 0.1", "629138193", lambda p, rng: Damaged(
            white_noise(p.convert("L"), 0.1, rng).convert("RGB"), p.convert("L").convert("RGB")),
        [Run("auto", f"--task denoise {AUTO}")],
    ),
    "jpeg": Case(
        "JPEG of\nquality 25", "ef5b1e5a", lambda p, rng: Damaged(p, p, quality=25),
        [Run("auto", f"--task denoise {AUTO}"), Run("0.05", "--task denoise --sigma-y 0.05"),
         Run("0.1", "--task denoise --sigma-y 0.1")],
    ),
    "grain": Case(
        "coarse grain,\ndeviation 0.1", "0e83f990", lambda p, rng: Damaged(coarse_noise(p, rng), p),
        [Run("auto", f"--task denoise {AUTO}"), Run("0.1", "--task denoise --sigma-y 0.1"),
         Run("its spectrum", "in Python: `noise.stationary_whitener`", _known_grain)],
    ),
    "photons": Case(
        f"photon noise,\n{PHOTONS} at white", "fccfc356", lambda p, rng: Damaged(photon_noise(p, PHOTONS, rng), p),
        [Run("auto", f"--task denoise {AUTO}"), Run("its deviations", "in Python: `noise.whiten`", _known_photons)],
    ),
    "blur": Case(
        "out of focus\n(width 1.8),\nJPEG of 92", "784232355d", blurred,
        [Run("1.8, auto", f"--task gaussian --blur-sigma 1.8 {AUTO}"),
         Run("1.8, 0.05", "--task gaussian --blur-sigma 1.8 --sigma-y 0.05"),
         Run("1.3, 0.05", "--task gaussian --blur-sigma 1.3 --sigma-y 0.05"),
         Run("2.5, 0.05", "--task gaussian --blur-sigma 2.5 --sigma-y 0.05")],
    ),
    "small": Case(
        "thumbnail of\n48x48, JPEG\nof 90", "b3f200c6", thumbnail,
        [Run("bicubic", f"--task sr --scale 4 --sr-kernel bicubic {AUTO}"),
         Run("box", f"--task sr --scale 4 --sr-kernel box {AUTO}")],
    ),
}  # fmt: skip


# -- restoring ---------------------------------------------------------------------------------------------------------


def find_photo(folder: Path, beginning: str) -> Path:
    """The one photo of a folder whose name begins so.

    Raises:
        ValueError: when there is none, or several.
    """
    found = sorted(folder.glob(f"nips17_{beginning}*.png"))
    if len(found) != 1:
        raise ValueError(f"{folder} holds {len(found)} photos nips17_{beginning}*.png: give the folder of the test set")
    return found[0]


def task_options(options: str, mask: Path) -> TaskOptions:
    """What the command makes of its options."""
    words = options.split()
    values: dict[str, Any] = dict(zip(words[::2], words[1::2], strict=True))
    given = {name.removeprefix("--").replace("-", "_"): value for name, value in values.items()}
    kinds: dict[str, Callable[[str], Any]] = {"scale": int, "blur_sigma": float, "mask": lambda _: mask}
    kinds["sigma_y"] = lambda text: text if text == "auto" else float(text)
    return TaskOptions(**{name: kinds.get(name, str)(value) for name, value in given.items()})


def restore_case(name: str, case: Case, photo: Path, args: Any) -> list[dict[str, Any]]:
    """Damage a photo and restore it in every way of the case.

    Returns:
        A row for each way: ``case``, ``title``, ``options``, ``sigma_y`` as used, PSNR ``before``, of the ``mean`` and
        of the ``samples``, and the files ``damaged``, ``truth`` and ``answer``.

    Raises:
        ValueError: when the command fails.
    """
    folder = Path(args.work) / name
    folder.mkdir(parents=True, exist_ok=True)
    with Image.open(photo) as opened:
        left, top = ((s - SIDE) // 2 for s in opened.size)
        inner = opened.convert("RGB").crop((left, top, left + SIDE, top + SIDE))
    damaged = case.damage(inner, np.random.default_rng(seed_of(name)))
    source = folder / (f"{name}.png" if damaged.quality is None else f"{name}.jpg")
    stream = io.BytesIO()
    if damaged.quality is None:
        damaged.picture.save(stream, "PNG")
    else:
        damaged.picture.save(stream, "JPEG", quality=damaged.quality)
    write_atomically(source, stream.getvalue())
    write_atomically(folder / "truth.png", encode_png(damaged.truth))
    if damaged.mask is not None:
        write_atomically(folder / "mask.png", encode_png(damaged.mask))
    truth = read_image(folder / "truth.png")
    with Image.open(source) as opened:
        enlarged = opened.convert("RGB").resize(damaged.truth.size, Image.Resampling.BICUBIC)
    write_atomically(folder / "damaged.png", encode_png(enlarged))
    rows = []
    for k, way in enumerate(case.runs):
        row: dict[str, Any] = {"case": name, "title": way.title, "options": way.options}
        if way.solve is None:
            out = folder / f"run-{k + 1}"
            how = RestoreOptions(samples=args.samples, nfe=args.nfe, model=str(args.model))
            if restore_all([source], out, task_options(way.options, folder / "mask.png"), how, "cpu"):
                raise ValueError(f"posteriori restore {source} {way.options} failed, see above")
            report = json.loads((out / name / "report.json").read_text())
            row["sigma_y"] = report["sigma_y"]
            row["answer"] = out / name / "mmse.png"
            drawn = [read_image(p) for p in sorted((out / name).glob("sample-*.png"))]
            row["samples"] = float(np.mean([psnr(x, truth) for x in drawn]))
        else:
            with torch.no_grad():
                answer = way.solve(read_image(source), load(args.model))
            row["answer"] = folder / f"run-{k + 1}.png"
            write_atomically(row["answer"], encode_png(to_picture(answer[0])))
        row |= {
            "before": psnr(read_image(folder / "damaged.png"), truth),
            "mean": psnr(read_image(row["answer"]), truth),
        }
        row |= {"truth": folder / "truth.png", "damaged": folder / "damaged.png"}
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """PSNR before and after in Markdown; bold: better by half a decibel than the damaged photo."""
    lines = []
    for row in rows:
        title = " ".join(CASES[row["case"]].title.split())
        options = row["options"].replace("MASK", "mask.png")
        options = options if row.get("sigma_y") is None else f"`{options}`"
        used = f"{row['sigma_y']:.3f}" if row.get("sigma_y") is not None else ""
        after = f"{row['mean']:.1f}"
        after = f"**{after}**" if row["mean"] >= row["before"] + 0.5 else after
        sample = f"{row['samples']:.1f}" if row.get("samples") is not None else ""
        lines.append([title, options, used, f"{row['before']:.1f}", after, sample])
    return markdown_table(["damage", "restored with", "sigma_y", "before, dB", "mean, dB", "samples, dB"], lines, 2)


def sheet(rows: Sequence[dict[str, Any]]) -> bytes:
    """Truth, damaged photo and answers of every case in full resolution, a JPEG within the largest size."""

    def part(path: Path) -> Image.Image:
        with Image.open(path) as opened:
            left, top = ((s - SHOWN) // 2 for s in opened.size)
            return opened.convert("RGB").crop((left, top, left + SHOWN, top + SHOWN))

    grid, titles = [], []
    for name in dict.fromkeys(r["case"] for r in rows):
        own = [r for r in rows if r["case"] == name]
        cells: list[tuple[str, Image.Image | None]] = [("truth", part(own[0]["truth"]))]
        cells.append((f"damaged\n{own[0]['before']:.1f} dB", part(own[0]["damaged"])))
        cells += [(f"{r['title']}\n{r['mean']:.1f} dB", part(r["answer"])) for r in own]
        grid.append(cells)
        titles.append(CASES[name].title)
    picture = contact_sheet(grid, titles, cell=SHOWN)

    def encoded(quality: int) -> bytes:
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=quality, optimize=True)
        return stream.getvalue()

    return next((data for q in range(90, 40, -3) if len(data := encoded(q)) <= LARGEST_SHEET), encoded(40))


def credits(photos: Sequence[Path], attribution: Path) -> str:
    """Authors of the photos, with links, as CC BY asks for.

    Raises:
        ValueError: when the table lacks a photo, or it has another licence.
    """
    with attribution.open(newline="", encoding="utf-8") as stream:
        known = {row["image_id"]: row for row in csv.DictReader(stream)}
    names = []
    for photo in dict.fromkeys(photos):
        row = known.get(photo.stem.removeprefix("nips17_"))
        if row is None or "creativecommons.org/licenses/by/2.0" not in row["licence"]:
            raise ValueError(f"{attribution} does not say that {photo.name} is CC BY 2.0: take another photo")
        names.append(f"[{' '.join(row['author'].split())}]({row['landing_url']})")
    licence = "[CC BY 2.0](https://creativecommons.org/licenses/by/2.0/)"
    return f"Photos, all {licence}, modified (resized, cropped, damaged, restored):\n" + ",\n".join(names) + "."


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m posteriori.bench.photo_reality", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("photos", type=Path, help="folder of the test photos nips17_*.png")
    parser.add_argument("--attribution", type=Path, required=True, help="CSV: image_id, author, landing_url, licence")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for files; a run continues what it finds there"
    )
    parser.add_argument("--document", type=Path, help="Markdown file with markers; WORK/report.md when left out")
    parser.add_argument("--figures", type=Path, help="folder of the sheet; figures beside the document")
    parser.add_argument("--model", default="photo", help="bundled name or folder")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--nfe", type=int, default=8, help="network evaluations per sample")
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated")
    parser.add_argument("--threads", type=int, help="of torch")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows, photos = [], []
    for name in args.cases.split(","):
        photos.append(find_photo(args.photos, CASES[name].photo))
        rows += restore_case(name, CASES[name], photos[-1], args)
    document = args.document or args.work / "report.md"
    new_document(document, "photo-reality", "photo-credits")
    replace_between(document, "photo-reality", table(rows))
    replace_between(document, "photo-credits", credits(photos, args.attribution))
    figures = args.figures or document.parent / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    write_atomically(figures / "old-photos.jpg", sheet(rows))
    say(f"\n{table(rows)}\n\nreport: {document}")


if __name__ == "__main__":
    main()
