"""Curves of the image benchmark as SVG inside a page: in the page's colours, and its script can hide methods.

A chart is text: no library draws it. Values that a pointer sees are those of the tables.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from posteriori.bench.images_figures import NFE_TICKS, Style, curve_points, ticks
from posteriori.bench.images_pool import Entry
from posteriori.bench.images_tables import Column

__all__ = ["chart", "marker"]

WIDTH, HEIGHT = 340, 240
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 38, 34
# Outlines of matplotlib's markers in a square of [-1, 1].
SHAPES = {
    "s": "M-.85-.85H.85V.85H-.85Z",
    "^": "M0-1L1 .8H-1Z",
    "v": "M0 1L1-.8H-1Z",
    "D": "M0-1.1L1.1 0 0 1.1-1.1 0Z",
    "P": "M-.35-1H.35V-.35H1V.35H.35V1H-.35V.35H-1V-.35H-.35Z",
    "X": "M-1-.5L-.5-1 0-.5 .5-1 1-.5 .5 0 1 .5 .5 1 0 .5-.5 1-1 .5-.5 0Z",
    "o": "M-1 0A1 1 0 1 1 1 0A1 1 0 1 1-1 0Z",
}


def marker(style: Style, x: float, y: float, hollow: bool = False, title: str = "") -> str:
    """A method's marker; ``title`` is shown to a pointer that rests on it."""
    size = 5 if style.ours else 4
    fill = "var(--paper)" if hollow else style.colour
    told = f"<title>{html.escape(title)}</title>" if title else ""
    return (
        f'<path d="{SHAPES[style.marker]}" transform="translate({x:.1f} {y:.1f}) scale({size})" fill="{fill}" '
        f'stroke="{style.colour}" stroke-width="{1.5 / size:.2f}">{told}</path>'
    )


def _range(values: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low / 1.1, high * 1.1
    space = 0.07 * (high - low) or 0.5
    return low - space, high + space


def chart(lines: Sequence[Entry], column: Column, names: Mapping[str, str], look: Mapping[str, Style]) -> str:
    """One score of one task against evaluations; ``data-name`` of every method's group is its name."""
    points = {m: p for m, p in curve_points(lines, column).items() if p}
    values = [v for p in points.values() for _, v in p]
    if not values:
        return ""
    log = not column.largest and min(values) > 0
    low, high = _range(values, log)
    most = max(10, *(e.nfe for e in lines))

    def across(nfe: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (0.04 + 0.92 * math.log(nfe) / math.log(most))

    def up(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    parts = []
    for value in ticks(low, high, log):
        y = up(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{y + 3:.1f}" text-anchor="end">{value:.6g}</text>')
    for nfe in [n for n in NFE_TICKS if n <= most]:
        parts.append(f'<text x="{across(nfe):.1f}" y="{HEIGHT - BOTTOM + 13}" text-anchor="middle">{nfe}</text>')
    for method, track in sorted(points.items(), key=lambda item: look[item[0]].ours):  # ours on top
        style, inner = look[method], []
        stroke = f'stroke="{style.colour}" stroke-width="{2.5 if style.ours else 1.3}" fill="none"'
        shown = f".{column.digits}f"
        for nfe, value in track:
            told = f"{method}: {value:{shown}}" + (f" at {nfe} NFE" if nfe else "")
            if nfe == 0:
                inner.append(
                    f'<path d="M{LEFT} {up(value):.1f}H{WIDTH - RIGHT}" {stroke} stroke-dasharray="2 3">'
                    f"<title>{html.escape(told)}</title></path>"
                )
            else:
                inner.append(marker(style, across(nfe), up(value), nfe == 1, told))
        drawn = " ".join(f"{across(nfe):.1f},{up(value):.1f}" for nfe, value in track if nfe > 1)
        inner.insert(0, f'<polyline points="{drawn}" {stroke}/>' if " " in drawn else "")
        parts.append(f'<g data-name="{html.escape(method)}">{"".join(inner)}</g>')
    title = html.escape(column.title(names))
    better = "higher" if column.largest else "lower"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title} against evaluations; values are in the '
        f'table"><text class="title" x="{LEFT}" y="13">{title}</text>'
        f'<text x="{LEFT}" y="26">{better} is better</text>{"".join(parts)}'
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">network evaluations (NFE)</text>'
        "</svg>"
    )
