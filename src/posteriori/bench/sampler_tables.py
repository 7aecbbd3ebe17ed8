"""Tables and the figure of :mod:`posteriori.bench.sampler`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posteriori.bench.common import markdown_table

__all__ = ["DISTANCES", "MEASURES", "curve_table", "figure", "solver_table", "summary"]

MEASURES = ("pair", "covariance", "whitened", "residual")
DISTANCES = ("sw2", "mean", "covariance", "weights")


def summary(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Geometric mean over problems of every solver error (1e-3 at least), and the largest of each."""
    values = np.array([[r["solver"][m] for m in MEASURES] for r in rows]) + 1e-3
    return [*np.exp(np.log(values).mean(0)), *values.max(0)]


def solver_table(found: dict[str, list[dict[str, Any]]], first: str) -> str:
    """One line for every attempt: means over problems, and the worst problem."""
    header = [first, *[f"{m}" for m in MEASURES], *[f"worst {m}" for m in MEASURES]]
    return markdown_table(header, [[name, *[f"{v:.3f}" for v in summary(rows)]] for name, rows in found.items()])


def curve_table(curves: dict[str, dict[int, list[dict[str, Any]]]], floors: list[dict[str, Any]]) -> str:
    """Every measure against the evaluations; distances to the exact posterior over their floor."""
    lines = []
    for name, by_nfe in curves.items():
        for k, measure in enumerate(MEASURES):
            lines.append([measure, name, *[f"{summary(rows)[k]:.3f}" for rows in by_nfe.values()]])
    for name, by_nfe in curves.items():
        for measure in DISTANCES:
            ratios = [
                np.exp(np.mean([np.log(_over(r["distances"][measure], f["distances"][measure]))
                                for r, f in zip(rows, floors, strict=True)]))
                for rows in by_nfe.values()
            ]  # fmt: skip
            lines.append([f"{measure} / floor", name, *[f"{r:.2f}" for r in ratios]])
    lines.sort(key=lambda line: line[0])
    nfes = next(iter(curves.values()))
    return markdown_table(["geometric mean over problems", "sampler", *map(str, nfes)], lines, names=2)


def _over(value: float, floor: float) -> float:
    return (value + 1e-4) / (floor + 1e-4)


def figure(curves: dict[str, dict[int, list[dict[str, Any]]]], problems: Sequence[str], path: Path) -> None:
    """Covariance error against evaluations: one panel for every problem, and their mean."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    columns = 5
    fig, axes = plt.subplots(-(-(len(problems) + 1) // columns), columns, figsize=(17, 10), sharex=True)
    for k, axis in enumerate(axes.flat):
        if k > len(problems):
            axis.axis("off")
            continue
        for name, by_nfe in curves.items():
            rows = list(by_nfe.values())
            heights = [summary(r)[1] if k == 0 else r[k - 1]["solver"]["covariance"] for r in rows]
            bold = "(the default)" in name
            axis.loglog(list(by_nfe), heights, marker=".", label=name, linewidth=2.4 if bold else 1.2)
        axis.set_title("all problems (geometric mean)" if k == 0 else problems[k - 1], fontsize=9)
        axis.set_ylim(top=2)  # Heun's few steps are off the scale
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("evaluations")
    for axis in axes[:, 0]:
        axis.set_ylabel("relative error of the covariance")
    fig.legend(*axes.flat[0].get_legend_handles_labels(), loc="lower right", fontsize=9)
    fig.tight_layout()
    fig.savefig(path, dpi=90)
    plt.close(fig)
