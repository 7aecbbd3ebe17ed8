"""The demonstration: five bundled photos, each measured in another way and restored, on one contact sheet.

Who took the photos, and under which licence they are here, is in ``assets/photos/ATTRIBUTION.csv`` and below the sheet.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from posteriori.denoise import NetworkDenoiser
from posteriori.images import read_photo, to_picture
from posteriori.problems import TaskOptions, build_problem
from posteriori.restore import Restoration, RestoreOptions, restore
from posteriori.sheets import contact_sheet, std_map, with_colour_bar

__all__ = ["SHOWN", "DemoRow", "attribution", "demo_sheet", "photos_folder", "run_demo"]

SIGMA_Y = 0.05


@dataclass(frozen=True)
class DemoTask:
    """A photo and what is done to it."""

    title: str
    photo: str
    options: dict[str, Any]


SHOWN = (
    DemoTask("inpainting\n70 % of the\npixels missing", "butterfly", {"task": "inpaint", "missing": 0.7}),
    DemoTask("inpainting\na box missing", "lake", {"task": "box"}),
    DemoTask("super-resolution\n4 x", "aqueduct", {"task": "sr", "scale": 4}),
    DemoTask("Gaussian blur\n3 pixels", "turtle", {"task": "gaussian", "blur_sigma": 3.0}),
    DemoTask("motion blur\nknown kernel", "pier", {"task": "motion"}),
)


@dataclass(frozen=True)
class DemoRow:
    """One task of the demonstration, done."""

    task: DemoTask
    result: Restoration


def photos_folder() -> Path:
    """Where the bundled photos are."""
    return Path(str(resources.files("posteriori"))) / "assets" / "photos"


def attribution() -> list[dict[str, str]]:
    """File, author, link and licence of every bundled photo."""
    with (photos_folder() / "ATTRIBUTION.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def run_demo(
    denoiser: NetworkDenoiser, options: RestoreOptions, advance: Callable[[int], None] = lambda _: None
) -> Iterator[DemoRow]:
    """Restore the five photos, one after the other; the same seed gives the same pictures.

    Args:
        denoiser: from :func:`posteriori.restore.load_model`.
        options: samples, evaluations and seed.
        advance: called with the network evaluations just spent.
    """
    for shown in SHOWN:
        task = TaskOptions(sigma_y=SIGMA_Y, degrade=True, seed=options.seed, **shown.options)
        photo = read_photo(photos_folder() / f"{shown.photo}.png")
        device = next(denoiser.parameters()).device
        problem = build_problem(photo, task, device=device)
        yield DemoRow(shown, restore(problem, denoiser, task, options, advance))


def demo_sheet(rows: list[DemoRow]) -> Image.Image:
    """Rows are tasks; columns: measurement, linear estimate, mean, two samples, their deviation, truth."""
    cells = []
    for row in rows:
        r, db = row.result, row.result.report["psnr"]
        residual = row.result.report["residual"]["samples"]
        assert r.samples is not None
        assert r.mmse is not None
        assert r.std is not None
        assert r.problem.shown is not None
        assert r.problem.x_0 is not None
        picture, top = std_map(r.std[0])
        cells.append([
            (f"measurement\n{db['input']:.1f} dB", r.picture(r.problem.shown)),
            (f"linear estimate\n{db['linear']:.1f} dB", r.picture(r.linear)),
            (f"posterior mean\n{db['mmse']:.1f} dB", r.picture(r.mmse)),
            *((f"sample {k + 1}\n{db['samples'][k]:.1f} dB, residual {residual[k]:.2f}", r.picture(r.samples[k]))
              for k in range(min(2, len(r.samples)))),
            ("standard deviation\nof the samples", with_colour_bar(picture, top)),
            ("truth\n", to_picture(r.problem.x_0[0])),
        ])  # fmt: skip
    names = ", ".join(f"{row['file'].partition('.')[0]} by {row['author']}" for row in attribution())
    return contact_sheet(
        cells,
        titles=[row.task.title for row in rows],
        heading=f"What the measurement leaves open (noise {SIGMA_Y:g} = {SIGMA_Y * 127.5:.1f}/255)",
        footer=f"Photos, modified (cropped, resized, degraded), CC BY 2.0: {names}",
    )
