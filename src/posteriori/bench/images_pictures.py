"""Pictures of kept samples for the report's viewer: for every task and method one PNG, a line of it for each image.

They show the test set, so they are written into the folder of the run and never beside a document.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from posteriori.bench.images_pool import main_rows
from posteriori.bench.images_problems import Problem
from posteriori.bench.runner import Row
from posteriori.checkpoint import write_atomically
from posteriori.sheets import std_colours

__all__ = ["IMAGES", "STD_TOP", "as_picture", "write_pictures"]

IMAGES = 16  # of each task
STD_TOP = 0.5  # the brightest colour of standard deviations, in units of [-1, 1], one for all methods


def as_picture(problem: Problem) -> Tensor:
    """Measurements as pictures of the images' size: missing pixels grey, averages as blocks."""
    y = problem.y
    if y.shape == problem.x_0.shape:
        observed = problem.A.observed(y)
        return y if observed is None else y * observed
    return functional.interpolate(y, problem.x_0.shape[-2:], mode="nearest")


def _in_order(rows: Sequence[Row]) -> list[Row]:
    return sorted((r for r in main_rows(rows) if r["seed"] == 0), key=lambda r: r["first"])


def _kept(rows: Sequence[Row], features: Callable[[str], Path], count: int) -> Tensor | None:
    """The first images' samples of one method ``(n, count, C, H, W)`` in 0-255; ``None`` where they were not kept."""
    parts, known = [], 0
    for row in _in_order(rows):
        path = features(row["id"])
        if known >= count or row["first"] != known or not path.exists():
            break
        with np.load(path, allow_pickle=False) as arrays:
            if "images" not in arrays:
                break
            parts.append(torch.from_numpy(arrays["images"]))
        known += row["images"]
    return torch.cat(parts, 1)[:, :count] if parts else None


def _png(tiles: Sequence[Tensor]) -> bytes:
    """A grid from columns of pictures ``(B, C, H, W)`` in 0-255."""
    grid = torch.stack(list(tiles), 1).permute(0, 3, 1, 4, 2)  # image, height, column, width, channel
    b, h, n, w, c = grid.shape
    stream = io.BytesIO()
    Image.fromarray(grid.reshape(b * h, n * w, c).byte().numpy()).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _bytes(x: Tensor) -> Tensor:
    return ((x.clamp(-1, 1) + 1) * 127.5).round()


def _std(samples: Tensor) -> Tensor:
    """Standard deviations ``(B, 3, H, W)`` as colours; channels are combined as a root mean square."""
    std = (samples.double() / 127.5).std(0).square().mean(1).sqrt() / STD_TOP
    return torch.stack([torch.from_numpy(np.array(std_colours(s))).permute(2, 0, 1) for s in std])


def write_pictures(
    rows: Sequence[Row],
    features: Callable[[str], Path],
    problem: Callable[[str, int], Problem],
    folder: Path,
) -> dict[str, Any]:
    """Write the pictures there are, in place of those of an earlier report.

    Args:
        rows: without errors.
        features: file of a row's features, which also keeps its samples.
        problem: the first images of the test set, measured, by task and count.
        folder: of the run; pictures go to ``pictures/`` in it.

    Returns:
        For the viewer, all paths relative to ``folder``: ``{"std_top": ..., "tasks": {task: {"images", "file",
        "methods": [{"name", "nfe", "samples", "file", "columns", "psnr"}]}}}``; no tasks when nothing was kept.
    """
    place = folder / "pictures"
    if place.exists():
        shutil.rmtree(place)
    tasks: dict[str, Any] = {}
    for task in dict.fromkeys(r["task"] for r in rows):
        methods: list[dict[str, Any]] = []
        most = min(IMAGES, max(r["first"] + r["images"] for r in rows if r["task"] == task))
        for name, nfe in dict.fromkeys((r["method"], r["nfe"]) for r in rows if r["task"] == task):
            mine = [r for r in rows if (r["task"], r["method"], r["nfe"]) == (task, name, nfe)]
            if (samples := _kept(mine, features, most)) is None:
                continue
            n = len(samples)
            tiles = list(samples)
            columns = [f"sample {i + 1}" for i in range(n)] if n > 1 else ["estimate"]
            if n > 1:
                tiles = [samples.double().mean(0).round(), _std(samples), *tiles]
                columns = ["mean", "std", *columns]
            file = f"pictures/{task}/{name}-{nfe}.png"
            write_atomically(folder / file, _png(tiles))
            methods.append(
                {"name": name, "nfe": nfe, "file": file, "columns": columns, "images": samples.shape[1],
                 "psnr": _psnr(mine, samples.shape[1])}
            )  # fmt: skip
        if methods:
            count = max(m["images"] for m in methods)
            scene = problem(task, count)
            file = f"pictures/{task}/truth.png"
            write_atomically(folder / file, _png([_bytes(scene.x_0), _bytes(as_picture(scene))]))
            tasks[task] = {"images": count, "file": file, "columns": ["truth", "measurement"], "methods": methods}
    found = {"std_top": STD_TOP, "tasks": tasks}
    if tasks:
        write_atomically(place / "pictures.json", json.dumps(found).encode())
    return found


def _psnr(rows: Sequence[Row], count: int) -> list[str]:
    """Of one sample of every image, as text."""
    values: list[float | None] = [v for row in _in_order(rows) for v in row["per_image"]["psnr"]]
    return ["" if v is None else f"{v:.2f}" for v in values[:count]]
