"""Figures of the photo model: predicted against actual error, power spectra, and gains over the settings of a task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from posteriori.bench.tables import save_figure

__all__ = ["gains", "reliability", "spectra"]

Figures = Mapping[str, Mapping[str, np.ndarray]]
# Okabe and Ito's colours, told apart with any colour vision; markers and dashes tell them apart in grey.
BLUE, ORANGE, BLACK = "#0072B2", "#D55E00", "#000000"


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def reliability(tasks: Figures, path: Path) -> None:
    """Error of the mean against the deviation of the samples, in bins of the deviation, with the ideal line.

    Args:
        tasks: title of a panel -> what :func:`posteriori.bench.photo_calibration.pooled` gives.
        path: of the PNG.
    """
    plt = _pyplot()
    figure, panels = plt.subplots(
        1, len(tasks), figsize=(2.5 * len(tasks) + 0.6, 3.6), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    values = np.concatenate([np.concatenate([f["std"], f["error"]]) for f in tasks.values()])
    low, high = np.nanmin(values) / 1.3, np.nanmax(values) * 1.3
    for panel, (title, f) in zip(panels.flat, tasks.items(), strict=True):
        panel.plot([low, high], [low, high], color=BLACK, lw=1, ls="--", label="ideal: equal")
        shown = np.isfinite(f["std"])
        panel.plot(f["std"][shown], f["error"][shown], "o-", color=BLUE, ms=5, lw=1.5, label="measured")
        panel.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
        ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if low <= t <= high]
        panel.set_xticks(ticks, [f"{t:g}" for t in ticks])
        panel.set_yticks(ticks, [f"{t:g}" for t in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.25)
        panel.tick_params(labelsize=9)
        slope = f"slope {f['slope'][0]:.2f}, " if "slope" in f else ""
        panel.set_title(f"{title}\n{slope}error / deviation {f['ratio'][0]:.2f}", fontsize=9)
    panels.flat[0].legend(fontsize=8, frameon=False, loc="upper left")
    figure.supxlabel("predicted: standard deviation of the samples (images in [-1, 1])", fontsize=10)
    figure.supylabel("actual error of the mean", fontsize=10)
    save_figure(figure, path, dpi=110, colours=64)


def spectra(tasks: Figures, edges: np.ndarray, path: Path) -> None:
    """Power of the truth, of samples and of the mean against frequency, and below it over that of the truth.

    Args:
        tasks: as for :func:`reliability`.
        edges: of the bands, in cycles per pixel.
        path: of the PNG.
    """
    plt = _pyplot()
    figure, panels = plt.subplots(
        2, len(tasks), figsize=(2.5 * len(tasks) + 0.6, 4.6), sharex=True, sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    place = np.sqrt(edges[1:] * edges[:-1])
    for (upper, lower), (title, f) in zip(panels.T, tasks.items(), strict=True):
        upper.plot(place, f["truth"], color=BLACK, lw=2.5, label="truth")
        upper.plot(place, f["truth"] * f["sample"], "o-", color=BLUE, ms=4, lw=1.2, label="samples")
        upper.plot(place, f["truth"] * f["mean"], "s--", color=ORANGE, ms=4, lw=1.2, label="mean, 1 evaluation")
        upper.set(xscale="log", yscale="log")
        upper.set_title(title, fontsize=9)
        lower.axhspan(0.9, 1.1, color="0.85", zorder=0)
        lower.axhline(1, color=BLACK, lw=1)
        lower.plot(place, f["sample"], "o-", color=BLUE, ms=4, lw=1.2)
        lower.plot(place, f["mean"], "s--", color=ORANGE, ms=4, lw=1.2)
        for panel in (upper, lower):
            panel.axvline(0.25, color="0.4", lw=0.8, ls=":")
            panel.grid(alpha=0.25)
            panel.tick_params(labelsize=9)
        ticks = [t for t in (0.01, 0.03, 0.1, 0.25, 0.5) if t >= edges[0]]
        lower.set_xticks(ticks, [f"{t:g}" for t in ticks])
        lower.minorticks_off()
    top = max(1.2, 1.05 * max(float(f["sample"].max()) for f in tasks.values()))
    panels[1, 0].set_ylim(0, min(top, 2.0))
    panels[0, 0].set_ylabel("power", fontsize=10)
    panels[1, 0].set_ylabel("power / truth", fontsize=10)
    panels[0, 0].legend(fontsize=8, frameon=False, loc="lower left")
    figure.supxlabel(
        "frequency in cycles per pixel; dotted: half of Nyquist; grey: the target, 10 % around the truth", fontsize=10
    )
    save_figure(figure, path, dpi=110, colours=64)


def gains(families: Mapping[str, Mapping[float, float]], path: Path) -> None:
    """Gain in dB against the setting, a panel per family.

    Args:
        families: title of a panel -> setting -> gain.
        path: of the PNG.
    """
    plt = _pyplot()
    across = min(len(families), 4)
    down = -(-len(families) // across)
    figure, panels = plt.subplots(
        down, across, figsize=(2.9 * across, 2.3 * down + 0.3), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, (title, curve) in zip(panels.flat, families.items(), strict=False):
        places = range(len(curve))
        panel.plot(places, list(curve.values()), "o-", color=BLUE, ms=5, lw=1.5)
        panel.axhline(0, color=BLACK, lw=1)
        panel.set_xticks(places, [f"{v:g}" for v in curve])
        panel.set_title(title, fontsize=9)
        panel.grid(alpha=0.25)
        panel.tick_params(labelsize=9)
    for panel in list(panels.flat)[len(families) :]:
        panel.set_visible(False)
    figure.supylabel("gain over the smooth estimate, dB", fontsize=10)
    save_figure(figure, path, dpi=110, colours=64)
