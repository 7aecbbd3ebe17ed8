r"""Every method on one photo per task: a contact sheet, and the figures under its pictures.

    python -m posteriori.bench.methods PHOTO PHOTO ... --work runs/methods --out docs/figures/methods.jpg

One photo for each task, in the order of ``--tasks``: a centre crop, its mask, kernel and noise drawn from its name as
in :mod:`posteriori.bench.photos`. Every method gets the same denoiser, operator, measurement and seed, the evaluations
of its paper (or of ``EVALUATIONS``) and the settings that its module recommends for the task. One sample each: PSNR,
whitened residual (1 for posterior samples, below for means), evaluations, backward passes, CPU seconds. What is in
``--work`` is not made again.

Settings are chosen on other photos, on all of them in every task:

    python -m posteriori.bench.methods PHOTO PHOTO ... --work runs/tuning --tune mpgd scale 1,2,4,8,16
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from posteriori.bench.common import Results, markdown_table, say
from posteriori.bench.photos import TASKS, Problem
from posteriori.checkpoint import load, read_card, write_atomically
from posteriori.denoise import NetworkDenoiser
from posteriori.images import encode_png, to_picture
from posteriori.methods import METHODS
from posteriori.metrics import psnr, residual
from posteriori.posterior import ExactPosterior
from posteriori.sheets import contact_sheet

__all__ = ["EVALUATIONS", "main", "measure", "tune"]

# Per sample, where not the method's own: DPS takes 250 in the EPS paper's tables; RED-diff's 1000 are cut to 100.
EVALUATIONS = {"dps": 250, "red-diff": 100}
LARGEST_SHEET = 400_000  # bytes
KEY = ("task", "photo", "method", "nfe", "settings", "size", "sigma_y", "model")


def methods_for(denoiser: NetworkDenoiser) -> list[str]:
    """Names of the methods that the network can serve: Palette needs a network of its own."""
    return [name for name in METHODS if name != "palette" or denoiser.preconditioning == "palette"]


def measure(denoiser: NetworkDenoiser, problem: Problem, name: str, settings: dict[str, Any]) -> tuple[Tensor, Any]:
    """One sample (or the single answer) of a method ``(1, 3, H, W)``, and its row."""
    posterior = ExactPosterior(denoiser, problem.A, problem.y, problem.sigma_y)
    began = time.process_time()
    found = METHODS[name](posterior, 1, EVALUATIONS.get(name), problem.seed, **settings)
    seconds = time.process_time() - began  # of the processor: a busy machine changes nothing
    x = found.answers
    return x[0], {
        "psnr": round(float(psnr(x[0], problem.x_0)), 2),
        "residual": round(residual(problem.A, x, problem.y, problem.sigma_y), 3),
        "evaluations": found.evaluations,
        "backward": found.backward,
        "seconds": round(seconds, 2),
        "used": found.settings,
    }


def row_of(
    rows: Results,
    denoiser: NetworkDenoiser,
    problem: Problem,
    photo: str,
    name: str,
    settings: dict[str, Any],
    args: Any,
) -> dict[str, Any]:
    """The row, from the file where it is there; its picture lies beside the file."""

    def compute() -> dict[str, Any]:
        x, row = measure(denoiser, problem, name, settings)
        (rows.path.parent / "pictures").mkdir(parents=True, exist_ok=True)
        write_atomically(_picture(rows, problem.task, photo, name), encode_png(to_picture(x[0])))
        say(f"{problem.task} {photo} {name} {settings or ''}: {json.dumps(row)}")
        return row

    return rows.get(
        compute, task=problem.task, photo=photo, method=name, nfe=EVALUATIONS.get(name, METHODS[name].nfe),
        settings=json.dumps(settings, sort_keys=True), size=args.size, sigma_y=args.sigma_y,
        model=str(read_card(args.model)["sha256"])[:12],
    )  # fmt: skip


def _picture(rows: Results, task: str, photo: str, name: str) -> Path:
    return rows.path.parent / "pictures" / f"{task}-{Path(photo).stem}-{name}.png"


def compare(args: Any) -> list[dict[str, Any]]:
    """Run the comparison of the command line; returns its rows and writes the sheet."""
    denoiser = load(args.model)
    names = args.methods.split(",") if args.methods else methods_for(denoiser)
    tasks = args.tasks.split(",")
    if len(args.photos) != len(tasks):
        raise SystemExit(f"{len(tasks)} tasks need as many photos, got {len(args.photos)}")
    rows = Results(Path(args.work) / "methods.jsonl", KEY)
    found, sheet, titles = [], [], []
    for task, place in zip(tasks, map(Path, args.photos), strict=True):
        problem = Problem(place, task, args.size, args.sigma_y)
        cells: list[tuple[str, Image.Image | None]] = [
            (f"truth\n{task}", to_picture(problem.x_0[0])),
            (f"measured\n{float(psnr(problem.input(), problem.x_0)):.1f} dB", to_picture(problem.input()[0])),
        ]
        for name in names:
            row = row_of(rows, denoiser, problem, place.name, name, METHODS[name].settings(task), args)
            found.append(row)
            count = f"{row['evaluations']}" + (f" + {row['backward']} b" if row["backward"] else "")
            caption = f"{name}\n{row['psnr']:.1f} dB, r {row['residual']:.2f}\n{count}, {row['seconds']:.1f} s"
            with Image.open(_picture(rows, task, place.name, name)) as stored:
                cells.append((caption, stored.convert("RGB")))
        half = (len(cells) + 1) // 2
        sheet += [cells[:half], cells[half:]]
        titles += [task, ""]
    if args.out:
        picture = contact_sheet(
            sheet, titles, "All methods on one denoiser", cell=args.size,
            footer="r: whitened residual, 1 for posterior samples; evaluations + backward passes (b), CPU seconds of a "
            f"sample; {args.size} x {args.size} pixels, sigma_y {args.sigma_y:g}",
        )  # fmt: skip
        write_atomically(Path(args.out), _jpeg(picture))
    return found


def _jpeg(picture: Image.Image) -> bytes:
    """The best quality that keeps within the largest size."""

    def encoded(quality: int) -> bytes:
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=quality, optimize=True)
        return stream.getvalue()

    qualities = (92, 88, 84, 80, 75, 70, 60)
    return next((data for q in qualities if len(data := encoded(q)) <= LARGEST_SHEET), encoded(50))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """PSNR and residual of every method and task; evaluations and backward passes of one, CPU seconds of all tasks."""
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    lines: list[list[object]] = []
    for name in dict.fromkeys(r["method"] for r in rows):
        own = {r["task"]: r for r in rows if r["method"] == name}
        figures = [f"{own[t]['psnr']:.1f} / {own[t]['residual']:.2f}" for t in tasks]
        first = own[tasks[0]]
        lines.append([name, *figures, first["evaluations"], first["backward"], sum(r["seconds"] for r in own.values())])
    return markdown_table(["method", *tasks, "evaluations", "backward", "CPU seconds, all tasks"], lines)


def tune(args: Any) -> str:
    """Mean PSNR of every value of a setting in every task, over all photos."""
    name, key, values = args.tune
    denoiser = load(args.model)
    rows = Results(Path(args.work) / "tuning.jsonl", KEY)
    grid = [float(v) for v in values.split(",")]
    lines: list[list[object]] = []
    for task in args.tasks.split(","):
        problems = [(Path(p).name, Problem(Path(p), task, args.size, args.sigma_y)) for p in args.photos]
        means = []
        for value in grid:
            settings = {**METHODS[name].settings(task), key: value}
            own = [row_of(rows, denoiser, problem, photo, name, settings, args) for photo, problem in problems]
            squares = np.mean([r["residual"] ** 2 for r in own])
            means.append(f"{np.mean([r['psnr'] for r in own]):.2f} / {squares**0.5:.2f}")
        lines.append([task, *means])
    return markdown_table([f"{name} {key}", *map(str, grid)], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m posteriori.bench.methods", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("photos", nargs="+", help="one for each task; with --tune, all of them in every task")
    parser.add_argument("--work", required=True, help="folder for rows and pictures; a run continues what it finds")
    parser.add_argument("--out", help="the contact sheet, a JPEG file")
    parser.add_argument("--model", default="photo", help="bundled name or folder")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated")
    parser.add_argument("--methods", help="comma-separated; all that fit the network when left out")
    parser.add_argument("--size", type=int, default=128, help="side of the centre crop")
    parser.add_argument("--sigma-y", type=float, default=0.05, help="measurement noise; photos are in [-1, 1]")
    parser.add_argument("--tune", nargs=3, metavar=("METHOD", "SETTING", "VALUES"), help="PSNR for values of a setting")
    parser.add_argument("--threads", type=int, help="of torch")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    say("\n" + (tune(args) if args.tune else table(compare(args))))


if __name__ == "__main__":
    main()
