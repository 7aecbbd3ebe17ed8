"""Tables and pictures for reports: one table in Markdown, LaTeX, CSV and HTML; figures as small PNG files."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posteriori.bench.common import markdown_table
from posteriori.checkpoint import write_atomically

__all__ = ["Table", "save_figure"]

_SPECIAL = {c: "\\" + c for c in "&%$#_{}"} | {
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
}


@dataclass(frozen=True)
class Table:
    """A table that prints itself.

    Attributes:
        title: what it shows, one sentence without markup.
        header: of the columns.
        rows: cells, text or numbers; numbers are shown with two decimals, missing ones are "".
        names: how many columns, from the left, are names and not numbers.
        bold: ``(row, column)`` of the cells to be set in bold, where the format has it.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    names: int = 1
    bold: frozenset[tuple[int, int]] = frozenset()

    def markdown(self) -> str:
        return markdown_table(self.header, self._cells(lambda c: c, "**{}**"), self.names)

    def _cells(self, escape: Callable[[str], str], bold: str) -> list[list[str]]:
        texts = [[escape(f"{c:.2f}" if isinstance(c, float) else str(c)) for c in row] for row in self.rows]
        return [
            [bold.format(c) if (i, j) in self.bold else c for j, c in enumerate(row)] for i, row in enumerate(texts)
        ]

    def latex(self) -> str:
        """A ``table`` for the package booktabs."""
        columns = "l" * self.names + "r" * (len(self.header) - self.names)
        rows = [[_latex(h) for h in self.header], *self._cells(_latex, r"\textbf{{{}}}")]
        lines = [" & ".join(row) + r" \\" for row in rows]
        body = [lines[0], r"\midrule", *lines[1:]]
        return "\n".join(
            [r"\begin{table}", r"\centering", rf"\caption{{{_latex(self.title)}}}", rf"\begin{{tabular}}{{{columns}}}",
             r"\toprule", *body, r"\bottomrule", r"\end{tabular}", r"\end{table}"]
        )  # fmt: skip

    def html(self) -> str:
        """A ``<table>``: headers are buttons, for a script that sorts; ``data-name`` of a line is its first cell."""
        head = "".join(f'<th scope="col"><button type="button">{html.escape(h)}</button></th>' for h in self.header)
        lines = [f"<caption>{html.escape(self.title)}</caption>", f"<thead><tr>{head}</tr></thead>", "<tbody>"]
        for row, cells in zip(self.rows, self._cells(html.escape, "<b>{}</b>"), strict=True):
            body = f'<th scope="row">{cells[0]}</th>' + "".join(
                f"<td{' class=text' if j < self.names else ''}>{c}</td>" for j, c in enumerate(cells[1:], 1)
            )
            lines.append(f'<tr data-name="{html.escape(str(row[0]))}">{body}</tr>')
        return "\n".join(["<table>", *lines, "</tbody>", "</table>"])

    def csv(self) -> str:
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows([self.header, *self.rows])
        return stream.getvalue()


def _latex(text: str) -> str:
    return "".join(_SPECIAL.get(c, c) for c in text)


def save_figure(figure: Any, path: Path, dpi: int = 100, colours: int = 128) -> None:
    """Write a matplotlib figure as a PNG with a palette, a quarter of the size of one without; closes it."""
    from matplotlib import pyplot as plt
    from PIL import Image

    raw, small = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, dpi=dpi, format="png")
    plt.close(figure)
    with Image.open(raw) as opened:
        flat = opened.convert("RGB").quantize(colours, dither=Image.Dither.NONE)
    flat.save(small, "PNG", optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, small.getvalue())
