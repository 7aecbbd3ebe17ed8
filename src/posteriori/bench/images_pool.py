"""From rows of image batches to one entry for every method, task and number of evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from posteriori.bench.images_scores import LEVELS
from posteriori.bench.runner import Row
from posteriori.perceptual import frechet_distance, kernel_distance, mmd

__all__ = ["FEWEST", "Entry", "entries", "reference_errors"]

FEWEST = 50  # images below which a distance between sets says nothing
Errors = Mapping[tuple[str, int], float]


@dataclass
class Entry:
    """A line of a table.

    Attributes:
        method, task, nfe: what was measured.
        images, samples: how many images, and samples of each.
        set_images: images of the distances between sets, one sample of each.
        values: by column; a column that was not measured, or diverged, is missing.
    """

    method: str
    task: str
    nfe: int
    images: int
    samples: int
    set_images: int = 0
    values: dict[str, float] = field(default_factory=dict)


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


def entries(rows: Sequence[Row], features: Callable[[str], Path]) -> list[Entry]:
    """Pool rows, in the order in which methods and tasks first appear.

    Args:
        rows: without errors.
        features: file of a row's features.
    """
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["method"], row["nfe"]), []).append(row)
    errors = reference_errors(rows)
    return [_entry(group, errors, features) for group in groups.values()]


def _entry(rows: list[Row], errors: Errors, features: Callable[[str], Path]) -> Entry:
    # Columns of single images from the rows with the most samples, distances of sets from those with the most images.
    samples = max(r["samples"] for r in rows)
    rich = [r for r in rows if r["samples"] == samples]
    counts = {
        n: sum(r["images"] for r in rows if r["samples"] == n and r["seed"] == 0) for n in {r["samples"] for r in rows}
    }
    most = max(counts, key=lambda n: (counts[n], -n))
    wide = [r for r in rows if r["samples"] == most and r["seed"] == 0]
    images = sum(r["images"] for r in rich if r["seed"] == 0)
    entry = Entry(rows[0]["method"], rows[0]["task"], rows[0]["nfe"], images, samples)
    entry.values = {k: v for k, v in _pooled(rich, errors).items() if math.isfinite(v)}
    sets = [features(r["id"]) for r in wide]
    if counts[most] >= FEWEST and all(p.exists() for p in sets):
        entry.set_images = counts[most]
        entry.values |= set_distances(sets)
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
    for level in LEVELS:
        values[f"inside_{level}"], values[f"width_{level}"] = mean(f"inside_{level}"), mean(f"width_{level}")
        values[f"nominal_{level}"] = rows[0]["nominal"].get(str(level), math.nan)
    count = sum(r["images"] for r in rows)
    values["seconds"] = sum(r["seconds"] for r in rows) / count / rows[0]["samples"]
    for name in ("evaluations", "backward"):
        values[name] = float(np.mean([r[name] for r in rows])) / rows[0]["samples"]
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
