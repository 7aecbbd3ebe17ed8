"""Figures of the image benchmark from pooled entries: quality against evaluations, and calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from posteriori.bench.images_pool import Entry
from posteriori.bench.images_tables import QUALITY, Column, comparable
from posteriori.bench.tables import save_figure

__all__ = [
    "OURS", "Style", "calibration_errors", "calibration_figure", "curve_columns", "curve_points", "curves", "styles",
    "ticks",
]  # fmt: skip

OURS = "eps"
# Okabe and Ito's colours without yellow, which is too light for lines; the reddest is ours.
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
NFE_TICKS = (1, 2, 5, 10, 20, 50, 100, 250, 1000)
MARKERS = "s^DvPX"  # matplotlib's names; a circle is ours


@dataclass(frozen=True)
class Style:
    """How a method is drawn: a colour for the blind too, and a marker, so that no two methods share both."""

    colour: str
    marker: str
    ours: bool = False


def styles(methods: Sequence[str]) -> dict[str, Style]:
    """A style for every method, up to 36 of them besides ours."""
    others = [m for m in methods if m != OURS]
    n = len(COLOURS)
    found = {m: Style(COLOURS[i % n], MARKERS[(i + i // n) % n]) for i, m in enumerate(others)}
    return {m: Style("#D55E00", "o", ours=True) if m == OURS else found[m] for m in methods}


def curve_columns(by_task: Mapping[str, Sequence[Entry]]) -> list[Column]:
    """What is drawn against evaluations: of sets, of distributions, of single samples, as far as measured."""
    present = {name for lines in by_task.values() for e in lines for name in e.values}
    wanted = ["frechet" if "frechet" in present else "distance", "crps", "psnr"]
    columns = {c.name: c for c in QUALITY}
    return [columns[name] for name in wanted if name in present]


def curve_points(lines: Sequence[Entry], column: Column) -> dict[str, list[tuple[int, float]]]:
    """``(evaluations, value)`` of every method, in order; 0 evaluations for methods without a network."""
    found: dict[str, list[tuple[int, float]]] = {}
    for i in comparable(lines, column):
        found.setdefault(lines[i].method, []).append((lines[i].nfe, column.scale * lines[i].values[column.name]))
    return {method: sorted(points) for method, points in found.items()}


def ticks(low: float, high: float, log: bool) -> list[float]:
    """At most six round values inside a range; on a logarithmic axis even steps too where these say more."""
    if log and high > 4 * low:
        inside = [m * 10.0**k for k in range(-6, 7) for m in (1, 2, 5) if low <= m * 10.0**k <= high]
    else:
        raw = (high - low) / 5
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw)
        inside = [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return inside[:: max(1, math.ceil(len(inside) / 6))]


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _apart(by_task: Mapping[str, Sequence[Entry]]) -> dict[str, float]:
    """Factors that move methods with one number of evaluations apart where several have the same."""
    numbers: dict[str, set[int]] = {}
    for e in (e for lines in by_task.values() for e in lines):
        numbers.setdefault(e.method, set()).add(e.nfe)
    places: dict[int, list[str]] = {}
    for method, found in numbers.items():
        if len(found) == 1 and method != OURS:
            places.setdefault(max(found), []).append(method)
    return {m: 1.06 ** (i - (len(same) - 1) / 2) for same in places.values() for i, m in enumerate(same)}


def _draw(panel: Any, points: Sequence[tuple[int, float]], style: Style, factor: float) -> None:
    look = {"color": style.colour, "lw": 2.4 if style.ours else 1.2, "zorder": 4 if style.ours else 2}
    if points[0][0] == 0:
        panel.axhline(points[0][1], ls=":", **look)
    drawn = [p for p in points if p[0] > 0]
    if drawn:
        panel.plot(*zip(*[p for p in drawn if p[0] > 1] or drawn, strict=True), **look)
    for nfe, value in drawn:  # one evaluation is no sample: it stays apart from the line
        face = "white" if nfe == 1 else style.colour
        panel.plot(nfe * factor, value, style.marker, **look | {"lw": 0}, mfc=face, ms=6.5 if style.ours else 5)


def _handle(style: Style, line: bool) -> Any:
    from matplotlib.lines import Line2D

    width, size = (2.4, 6.5) if style.ours else (1.2, 5)
    marker = style.marker if line else "None"
    return Line2D([], [], color=style.colour, marker=marker, ls="-" if line else ":", lw=width, ms=size)


def curves(by_task: Mapping[str, Sequence[Entry]], names: Mapping[str, str], path: Path) -> None:
    """A line of panels per task, a column per score: every method a line, or a point at its evaluations."""
    plt, columns = _pyplot(), curve_columns(by_task)
    figure, panels = plt.subplots(
        len(by_task), len(columns), figsize=(3.3 * len(columns), 2.0 * len(by_task) + 1.1), squeeze=False, sharex=True,
        layout="constrained",
    )  # fmt: skip
    methods = list(dict.fromkeys(e.method for lines in by_task.values() for e in lines))
    look, apart = styles(methods), _apart(by_task)
    for row, (task, lines) in zip(panels, by_task.items(), strict=True):
        row[0].set_ylabel(task, fontsize=10)
        for panel, column in zip(row, columns, strict=True):
            for method, points in curve_points(lines, column).items():
                _draw(panel, points, look[method], apart.get(method, 1.0))
            panel.set_xscale("log")
            panel.set_xticks(NFE_TICKS, [str(t) for t in NFE_TICKS])
            panel.set_xlim(0.8, max(110, 1.3 * max(e.nfe for every in by_task.values() for e in every)))
            panel.minorticks_off()
            if not column.largest:
                _log_axis(panel)
            panel.grid(alpha=0.25)
            panel.tick_params(labelsize=7)
    for panel, column in zip(panels[0], columns, strict=True):
        better = "higher" if column.largest else "lower"
        panel.set_title(f"{column.title(names)}\n({better} is better)", fontsize=9)
    sampled = {m for lines in by_task.values() for m in {e.method for e in lines if e.nfe > 0}}
    figure.legend(
        [_handle(look[m], m in sampled) for m in methods], methods, loc="outside upper center", fontsize=8,
        ncols=min(8, len(methods)), frameon=False,
    )  # fmt: skip
    figure.supxlabel(
        "network evaluations per sample (hollow: one, the posterior mean; dotted: without a network; "
        "methods with the same number stand a little apart)",
        fontsize=8,
    )
    save_figure(figure, path, dpi=85)


def _log_axis(panel: Any) -> None:
    """Values on a logarithmic scale with plain numbers: methods that fail would flatten all others."""
    values = [float(v) for line in panel.get_lines() for v in line.get_ydata()]
    if not values or min(values) <= 0:
        return
    low, high = min(values) / 1.08, max(values) * 1.08
    panel.set_yscale("log")
    marks = ticks(low, high, log=True)
    panel.set_yticks(marks, [f"{m:.6g}" for m in marks])
    panel.set_ylim(low, high)
    panel.minorticks_off()


def calibration_errors(entry: Entry) -> dict[str, float]:
    """What is 0 or 1 for samples of the true posterior.

    ``coverage 50`` and ``coverage 90`` less their nominal value; ``residual``, whitened; ``variance``, that of the
    samples over the squared error of the posterior mean. The last follows from the tables' ratios for ``n`` samples:
    ``E|x - x_0|^2`` is that of their mean plus ``(n - 1)/n`` times their variance.
    """
    v, n = entry.values, entry.samples
    found = {f"coverage {k}": v[f"inside_{k}"] - v[f"nominal_{k}"] for k in (50, 90) if f"inside_{k}" in v}
    if "residual" in v:
        found["residual"] = v["residual"]
    if n > 1 and "ratio_one" in v and "ratio_mean" in v:
        found["variance"] = (v["ratio_one"] - v["ratio_mean"]) * n / (n - 1)
    return found


# Of a panel: its title, the value of true posterior samples, and the range, beyond which dots lie on the border.
PANELS = {
    "coverage 50": ("coverage of 50 % intervals\nless nominal", 0.0, (-0.6, 0.4)),
    "coverage 90": ("coverage of 90 % intervals\nless nominal", 0.0, (-0.9, 0.2)),
    "residual": ("residual of samples\n(1: as much noise as there is)", 1.0, (0.1, 10.0)),
    "variance": ("variance of samples over\nerror of the posterior mean", 1.0, (0.03, 10.0)),
}


def calibration_figure(by_task: Mapping[str, Sequence[Entry]], path: Path) -> bool:
    """A line for every method and number of evaluations: a dot for each task, their median large.

    Returns:
        Whether there was anything to draw.
    """
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for lines in by_task.values():
        for e in lines:
            if e.samples > 1 and (errors := calibration_errors(e)):
                found.setdefault((e.method, e.nfe), []).append(errors)
    nominal = {(e.values.get("nominal_50"), e.values.get("nominal_90")) for x in by_task.values() for e in x}
    panels = [p for p in PANELS if any(p in errors for every in found.values() for errors in every)]
    if all(a == b for a, b in nominal) and "coverage 90" in panels:
        panels.remove("coverage 90")  # few samples have one interval only
    if not panels:
        return False
    plt = _pyplot()
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.7 * len(panels) + 1, 0.26 * len(found) + 1.1), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    look = styles(list(dict.fromkeys(e.method for lines in by_task.values() for e in lines)))
    for axis, name in zip(axes[0], panels, strict=True):
        title, ideal, (low, high) = PANELS[name]
        if name == "coverage 50" and "coverage 90" not in panels:
            title = "coverage of intervals\nless nominal"
        axis.axvline(ideal, color="0.3", lw=1)
        for y, ((method, _), every) in enumerate(found.items()):
            values = [min(max(e[name], low), high) for e in every if name in e]
            style = look[method]
            axis.plot(values, [y] * len(values), "o", color=style.colour, ms=3, alpha=0.45, clip_on=False)
            if values:
                size = 8 if style.ours else 6
                axis.plot(median(values), y, style.marker, color=style.colour, ms=size, mec="white", clip_on=False)
        if ideal == 1:
            axis.set_xscale("log")
            marks = [t for t in (0.03, 0.1, 0.3, 1, 3, 10) if low <= t <= high]
            axis.set_xticks(marks, [f"{t:g}" for t in marks])
            axis.minorticks_off()
        axis.set_xlim(low, high)
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    axes[0, 0].set_yticks(range(len(found)), [f"{method} {nfe}" for method, nfe in found])
    axes[0, 0].set_ylim(len(found) - 0.4, -0.6)
    for label, (method, _) in zip(axes[0, 0].get_yticklabels(), found, strict=True):
        label.set_fontweight("bold" if method == OURS else "normal")
    save_figure(figure, path, dpi=85)
    return True
