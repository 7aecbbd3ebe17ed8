"""What ``posteriori check`` prints: an operator's checks and figures, as Markdown tables to paste into a report."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from posteriori._version import __version__
from posteriori.operators import CheckRow, LinearOperator, report
from posteriori.operators.profiling import SIGMA_T, SIGMA_Y, Profile, profile

__all__ = ["Inspection", "inspect_operator"]

#: Largest whitened error of the float32 pivot that is accepted of an operator of size 1: a hundredth of the noise that
#: it carries anyway.
TARGET = 1e-2


@dataclass(frozen=True)
class Inspection:
    """Checks of an operator, and its figures where the checks of ``A`` and ``A^T`` passed (else ``None``)."""

    operator: LinearOperator
    shape: tuple[int, ...]
    rows: list[CheckRow]
    figures: Profile | None

    @property
    def failed(self) -> list[CheckRow]:
        return [row for row in self.rows if not row.passed]

    def text(self) -> str:
        """The tables, one block of text."""
        lines = [f"{self.operator!r} on signals {_sizes(self.shape)}", ""]
        checks = [
            (r.name, f"{r.error:.1e}", f"{r.limit:.0e}" if r.limit else "0", "ok" if r.passed else "FAILED")
            for r in self.rows
        ]
        lines += _table(("check", "error", "allowed", ""), checks)
        if self.figures is not None:
            lines += ["", *_table(("figure", ""), _figures(self.figures)), "", *_error_table(self.figures)]
        return "\n".join(lines)


def inspect_operator(operator: LinearOperator, shape: Sequence[int], *, seed: int = 0) -> Inspection:
    """Check an operator and measure it.

    Args:
        operator: what to look at.
        shape: shape of a signal without the batch.
        seed: of the random signals.
    """
    rows = report(operator, shape, seed=seed)
    if not all(row.passed for row in rows):
        return Inspection(operator, tuple(shape), rows, None)  # the figures would be of a wrong solve
    figures = profile(operator, shape, seed=seed)
    return Inspection(operator, tuple(shape), [*rows, *_pivot_rows(figures)], figures)


def _pivot_rows(figures: Profile) -> list[CheckRow]:
    """An exact solve has to be exact in float32; an iterative one has to keep within the bound that it returns."""
    rows = []
    errors = figures.errors
    # what float32 rounds of a pivot of size sigma_t grows with A itself
    target = TARGET * max(1.0, figures.spectrum.largest)
    exact = [e.error for e in errors if e.bound is None]
    if exact:
        advice = "the solve loses the measurement in float32: combine both terms per coefficient, or solve in float64"
        rows.append(CheckRow("pivot, whitened error in float32", max(exact), target, advice))
    excess = [max(e.error - e.bound, 0.0) for e in errors if e.bound is not None and e.measured]
    if excess:
        rows.append(CheckRow("pivot, error beyond the solve's bound", max(excess), target, "the bound is not one"))
    return rows


def _figures(p: Profile) -> list[tuple[str, str]]:
    s = p.spectrum
    at_least, at_most = (">= ", "<= ") if s.method == "lanczos" else ("", "")
    rank = "not known (iterative)" if s.rank is None else f"{s.rank} of {math.prod(p.shape)}"
    shown = f" (batch of {p.batch})" if p.batch > 1 else ""
    return [
        ("measurement", _sizes(p.measurement)),
        ("largest singular value", f"{at_least}{s.largest:.4g}"),
        ("smallest, of those not 0", f"{at_most}{s.smallest:.4g}"),
        ("rank", rank),
        (f"A{shown}", f"{p.forward_ms:.2f} ms"),
        (f"A'{shown}", f"{p.adjoint_ms:.2f} ms"),
        (f"gram_solve{shown}", f"{p.solve_ms:.2f} ms"),
        ("memory of one call", f"{p.memory:.2f} MiB"),
        ("with", f"posteriori {__version__}, torch {torch.__version__}"),
        ("on", f"{platform.machine()}, threads: {torch.get_num_threads()}"),
    ]


def _error_table(p: Profile) -> list[str]:
    cells = {(e.sigma_y, e.sigma_t): e for e in p.errors}
    rows = []
    for sigma_y in SIGMA_Y:
        row = [f"{sigma_y:g}"]
        for sigma_t in SIGMA_T:
            e = cells.get((sigma_y, sigma_t))
            row.append("-" if e is None else f"{e.error:.1e}" if e.measured else f"<= {e.error:.1e}")
        rows.append(row)
    lines = ["Whitened error of the pivot in float32 (a fraction of its own noise; far below 1 is exact enough):", ""]
    lines += _table(("sigma_y \\ sigma_t", *[f"{s:g}" for s in SIGMA_T]), rows)
    notes = []
    if any(not e.measured for e in p.errors):
        notes.append("<=: at most, by the bound that the solve returns.")
    if any(e.error > TARGET for e in p.errors if e.bound is not None):
        notes.append(
            "Above 1e-2 conjugate gradients stopped early: raise max_iterations, or find an operator solved exactly."
        )
    if p.skipped:
        notes.append(f"-: left out, {p.skipped} solves that would take long.")
    return [*lines, *(["", " ".join(notes)] if notes else [])]


def _sizes(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "of one number"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown that is also aligned as it stands: names to the left, numbers to the right."""
    widths = [max(3, *(len(line[i]) for line in (header, *rows))) for i in range(len(header))]

    def show(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return [show(header), show(rule), *map(show, rows)]
