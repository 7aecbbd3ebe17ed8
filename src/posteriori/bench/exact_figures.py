"""Figures of the exact benchmark, from its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posteriori.bench.calibration import FUNCTIONS
from posteriori.bench.exact_recipe import FLOOR
from posteriori.bench.runner import Row
from posteriori.bench.tables import save_figure
from posteriori.priors import GaussianMixture

__all__ = ["curves", "pictures", "problem_of", "ranks"]

BINS = 20


def problem_of(row: Row) -> tuple[Any, ...]:
    """What makes two rows rows of one problem."""
    return row["prior"], row["d"], row.get("components", 1), row["operator"], row["sigma_y"], row["seed"]


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for every method; the first one, ours, is black and thick."""
    markers, colours = "osv^D<>ph*Xd", _pyplot().get_cmap("tab20").colors
    return {
        name: {
            "color": "black" if i == 0 else colours[(2 * i - 2) % 20 + (i > 10)],
            "marker": markers[i % len(markers)],
            "lw": 2.0 if i == 0 else 1.0,
            "ms": 3.5,
            "zorder": 3 if i == 0 else 2,
        }
        for i, name in enumerate(names)
    }


def curves(rows: Sequence[Row], names: Sequence[str], path: Path) -> None:
    """Sliced Wasserstein distance over its floor against evaluations, one panel per problem."""
    plt = _pyplot()
    problems = list(dict.fromkeys(problem_of(r) for r in rows))
    columns = min(5, len(problems))
    lines = math.ceil(len(problems) / columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(2.6 * columns, 2.1 * lines + 0.7), sharex=True, squeeze=False, layout="constrained"
    )
    styles = _styles(names)
    for panel in panels.flat[len(problems) :]:
        panel.set_visible(False)
    for panel, problem in zip(panels.flat, problems, strict=False):
        prior, d, _, operator, sigma_y, _ = problem
        for name in names:
            found = sorted(
                (r["nfe"], r["distances"]["sw2"] / r["floor"]["sw2"])
                for r in rows
                if problem_of(r) == problem and r["method"] == name and r["distances"]["sw2"] is not None
            )
            if found:
                panel.plot(*zip(*found, strict=True), label=name, **styles[name])
        panel.axhline(1, color="0.5", lw=0.8, ls="--")
        panel.set(xscale="log", yscale="log")
        panel.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        panel.set_xticks([1, 5, 20, 100], ["1", "5", "20", "100"])
        panel.minorticks_off()
        low, high = panel.get_ylim()
        panel.set_ylim(min(low, 0.7), min(high, 60))
        panel.set_title(f"{prior} {d}, {operator}, {sigma_y:g}", fontsize=8)
        panel.grid(alpha=0.25)
        panel.tick_params(labelsize=7)
    handles: dict[str, Any] = {}
    for panel in panels.flat:
        handles |= {label: line for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    shown = [n for n in names if n in handles]
    figure.legend([handles[n] for n in shown], shown, loc="outside upper center", ncols=6, fontsize=8, frameon=False)
    figure.supxlabel("evaluations", fontsize=9)
    figure.supylabel("sliced Wasserstein-2 / floor", fontsize=9)
    save_figure(figure, path, dpi=85)


def pictures(rows: Sequence[Row], names: Sequence[str], exact: GaussianMixture, path: Path) -> None:
    """Density of a posterior in two dimensions, and samples of every method on it."""
    plt = _pyplot()
    shown = {r["method"]: np.array(r["points"]) for r in rows if "points" in r}
    order = [n for n in (FLOOR, *names) if n in shown]
    columns = min(5, len(order))
    lines = math.ceil(len(order) / columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(2.3 * columns, 2.4 * lines), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    centre, spread = exact.mean.numpy(), exact.covariance.diagonal().sqrt().numpy()
    low, high = centre - 3.5 * spread, centre + 3.5 * spread
    axes = [torch.linspace(float(a), float(b), 220, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
    grid = torch.cartesian_prod(*axes)
    density = exact.log_prob(grid.reshape(-1, *exact.shape)).exp().reshape(220, 220).T.numpy()
    extent = (low[0], high[0], low[1], high[1])
    for panel in panels.flat[len(order) :]:
        panel.set_visible(False)
    for panel, name in zip(panels.flat, order, strict=False):
        panel.imshow(np.sqrt(density), origin="lower", extent=extent, cmap="Blues", aspect="auto")
        x, y = shown[name].T
        panel.plot(x, y, ".", color="C3", ms=2.5, alpha=0.6)
        panel.set_title("exact samples" if name == FLOOR else name, fontsize=9)
        panel.set(xlim=extent[:2], ylim=extent[2:])
        panel.tick_params(labelsize=6)
    save_figure(figure, path, dpi=85)


def ranks(rows: Sequence[Row], names: Sequence[str], path: Path) -> None:
    """Rank histograms: a line of panels per method, a column per function; the band holds 99 % of uniform counts."""
    from scipy.stats import binom

    plt = _pyplot()
    present = {r["method"]: r for r in rows}
    order = [n for n in (FLOOR, *names) if n in present]
    figure, panels = plt.subplots(
        len(order), len(FUNCTIONS), figsize=(8.5, 0.95 * len(order) + 0.3), sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for panel, function in zip(panels[0], FUNCTIONS, strict=True):
        panel.set_title(function, fontsize=9)
    for line, name in zip(panels, order, strict=True):
        row = present[name]
        levels = row["samples"] + 1
        bins = max(b for b in range(1, BINS + 1) if levels % b == 0)  # as many ranks in every bin
        for panel, function in zip(line, FUNCTIONS, strict=True):
            values = (np.array(row["ranks"][function]) + 0.5) / levels
            panel.axhspan(*binom.ppf([0.005, 0.995], len(values), 1 / bins), color="0.85")
            panel.hist(values, bins, range=(0, 1), color="C0" if name != FLOOR else "0.4")
            panel.set_yticks([])
            panel.tick_params(labelsize=6)
        line[0].set_ylabel("exact samples" if name == FLOOR else name, fontsize=7, rotation=0, ha="right", va="center")
    save_figure(figure, path, dpi=85, colours=16)
