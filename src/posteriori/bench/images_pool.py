"""From rows of image batches to one entry for every method, task and number of evaluations.

Slow methods are measured on fewer images, which may be easier or harder than the rest. The columns of :data:`MATCHED`
are made comparable by the method that was measured on the most, ``r``: a method ``m`` measured on the images ``S`` gets

    mean_S m + (mean_all r - mean_S r),

its paired difference from ``r``, which has a far smaller error than the difference of two means over other images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from posteriori.bench.images_scores import LEVELS
from posteriori.bench.runner import Row, identity
from posteriori.perceptual import frechet_distance, kernel_distance, mmd

__all__ = ["FEWEST", "MATCHED", "Entry", "entries", "main_rows", "reference_errors", "set_distances"]

MATCHED = ("psnr", "ssim", "distance", "crps", "crps_features")
FEWEST = 50  # images below which a distance between sets says nothing
Errors = Mapping[tuple[str, int], float]
Known = MutableMapping[str, dict[str, float]]


@dataclass
class Entry:
    """A line of a table.

    Attributes:
        method, task, nfe: what was measured.
        images, samples: how many images, and samples of each, the columns of single images are of.
        set_images: images of the distances between sets, one sample of each; 0 where there are none.
        set_id: identity of the rows these are of.
        values: by column; a column that was not measured, or diverged, is missing.
    """

    method: str
    task: str
    nfe: int
    images: int
    samples: int
    set_images: int = 0
    values: dict[str, float] = field(default_factory=dict)
    set_id: str = ""


def reference_errors(rows: Sequence[Row]) -> Errors:
    """Squared error of the posterior mean by task and image: of the first method that estimates it by one evaluation.

    It stands for ``E |E[x_0|y] - x_0|^2``, which the errors of every method's samples are compared with.
    """
    found: dict[tuple[str, int], float] = {}
    for row in rows:
        for i, value in enumerate(row["per_image"].get("mse_mmse", [])):
            if value is not None:
                found.setdefault((row["task"], row["first"] + i), value)
    return found


def entries(
    rows: Sequence[Row], features: Callable[[str], Path] | None = None, known: Known | None = None
) -> list[Entry]:
    """Pool rows, in the order in which methods and tasks first appear.

    Args:
        rows: without errors.
        features: file of a row's features, where there are any.
        known: distances between sets by :attr:`Entry.set_id`. Those that are missing are computed from features, which
            takes a second each, and added.
    """
    known = {} if known is None else known
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["method"], row["nfe"]), []).append(row)
    errors = reference_errors(rows)
    found = [_entry(group, errors, features, known) for group in groups.values()]
    for task in {e.task for e in found}:
        _match([(e, main_rows(group)) for e, group in zip(found, groups.values(), strict=True) if e.task == task])
    return found


def main_rows(rows: Sequence[Row]) -> list[Row]:
    """What the columns of single images are of: the rows with the most images of those with several samples each."""
    several = [r for r in rows if r["samples"] > 1] or rows
    images: dict[int, int] = {}
    for r in several:
        images[r["samples"]] = images.get(r["samples"], 0) + r["images"]
    samples = max(images, key=lambda n: (images[n], n))
    return [r for r in several if r["samples"] == samples]


def _by_image(rows: Sequence[Row], name: str) -> dict[int, float]:
    """A column's mean over seeds for every image; empty when it was not measured."""
    found: dict[int, list[float]] = {}
    for r in rows:
        for i, value in enumerate(r["per_image"].get(name, [])):
            found.setdefault(r["first"] + i, []).append(math.nan if value is None else value)
    return {i: float(np.mean(v)) for i, v in found.items()}


def _match(lines: Sequence[tuple[Entry, list[Row]]]) -> None:
    """Make columns of a task comparable, see the module's head."""
    for name in MATCHED:
        columns = [(entry, _by_image(rows, name)) for entry, rows in lines if name in entry.values]
        if not columns:
            continue
        _, reference = max(columns, key=lambda c: len(c[1]))
        for entry, column in columns:
            if len(column) < len(reference) and column.keys() <= reference.keys():
                part = float(np.mean([reference[i] for i in column]))
                entry.values[name] += float(np.mean(list(reference.values()))) - part


def _entry(rows: list[Row], errors: Errors, features: Callable[[str], Path] | None, known: Known) -> Entry:
    rich = main_rows(rows)
    samples = rich[0]["samples"]
    counts = {
        n: sum(r["images"] for r in rows if r["samples"] == n and r["seed"] == 0) for n in {r["samples"] for r in rows}
    }
    most = max(counts, key=lambda n: (counts[n], -n))
    wide = [r for r in rows if r["samples"] == most and r["seed"] == 0]
    images = sum(r["images"] for r in rich if r["seed"] == 0)
    entry = Entry(rows[0]["method"], rows[0]["task"], rows[0]["nfe"], images, samples)
    # Intervals of few samples are coarse: those of the rows with the most.
    finest = max(r["samples"] for r in rows)
    values = _pooled(rich, errors) | _intervals([r for r in rows if r["samples"] == finest])
    entry.values = {k: v for k, v in values.items() if math.isfinite(v)}
    if counts[most] < FEWEST:
        return entry
    entry.set_id = identity({"rows": [r["id"] for r in wide]})
    if entry.set_id not in known and features is not None:
        sets = [features(r["id"]) for r in wide]
        if all(p.exists() for p in sets):
            known[entry.set_id] = {k: v for k, v in set_distances(sets).items() if math.isfinite(v)}
    if found := known.get(entry.set_id):
        entry.set_images = counts[most]
        entry.values |= found
    return entry


def _column(rows: Sequence[Row], name: str) -> list[float]:
    """Of every image; empty when it was not measured, with NaN where the method diverged."""
    if any(name not in r["per_image"] for r in rows):
        return []
    return [math.nan if v is None else v for r in rows for v in r["per_image"][name]]


def _pooled(rows: list[Row], errors: Errors) -> dict[str, float]:
    columns = {name: _column(rows, name) for name in rows[0]["per_image"]}
    columns = {name: v for name, v in columns.items() if v}

    def mean(name: str) -> float:
        return float(np.mean(columns[name])) if name in columns else math.nan

    values = {n: mean(n) for n in ("psnr", "psnr_mean", "psnr_mmse", "ssim", "distance", "crps", "crps_features")}
    values["residual"] = math.sqrt(sum(columns["residual"]) / sum(columns["measurements"]))
    values["diversity"] = math.sqrt(mean("variance"))
    known = [errors.get((r["task"], r["first"] + i), math.nan) for r in rows for i in range(r["images"])]
    for name, kind in (("ratio_one", "mse"), ("ratio_mean", "mse_mean")):
        values[name] = sum(columns[kind]) / sum(known) if kind in columns else math.nan
    count = sum(r["images"] for r in rows)
    values["seconds"] = sum(r["seconds"] for r in rows) / count / rows[0]["samples"]
    for name in ("evaluations", "backward"):
        values[name] = float(np.mean([r[name] for r in rows])) / rows[0]["samples"]
    return values


def _intervals(rows: Sequence[Row]) -> dict[str, float]:
    values = {f"nominal_{level}": rows[0]["nominal"].get(str(level), math.nan) for level in LEVELS}
    for name in [f"{kind}_{level}" for kind in ("inside", "width") for level in LEVELS]:
        column = _column(rows, name)
        values[name] = float(np.mean(column)) if column else math.nan
    return values


def _first_samples(paths: Sequence[Path], samples: str, truth: str) -> tuple[Tensor, Tensor] | None:
    """The first sample of every image and the truth, ``(N, ...)``; ``None`` where they were not kept or diverged."""
    drawn, true = [], []
    for path in paths:
        with np.load(path, allow_pickle=False) as arrays:
            if samples not in arrays:
                return None
            drawn.append(torch.from_numpy(arrays[samples][0]).float())
            true.append(torch.from_numpy(arrays[truth][0]).float())
    a, b = torch.cat(drawn), torch.cat(true)
    return (a, b) if bool(torch.isfinite(a).all()) else None


def set_distances(paths: Sequence[Path]) -> dict[str, float]:
    """Distances between the set of first samples and the set of true images."""
    found: dict[str, float] = {}
    if (features := _first_samples(paths, "samples", "truth")) is not None:
        drawn, true = features
        found = {
            "frechet": frechet_distance(true, drawn), "kernel": kernel_distance(true, drawn), "mmd": mmd(true, drawn)
        }  # fmt: skip
    if (pixels := _first_samples(paths, "images", "true_images")) is not None:
        found["mmd_pixel"] = mmd(pixels[1], pixels[0])
    return found
