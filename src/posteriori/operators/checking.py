"""Checks that an operator keeps what it promises; every operator of the library passes them, so should yours."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posteriori.operators.base import LinearOperator
from posteriori.operators.custom import Callable

__all__ = ["CheckRow", "OperatorCheckError", "check", "report"]


class OperatorCheckError(ValueError):
    """An operator failed a check; the message says which, by how much, and what to look at."""


@dataclass(frozen=True)
class CheckRow:
    """One check: its name, measured error, largest error allowed, and advice for when it fails."""

    name: str
    error: float
    limit: float
    advice: str

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # false for NaN


def _relative(u: Tensor, v: Tensor) -> float:
    return float((u - v).norm() / v.norm().clamp_min(1e-30))


def report(
    operator: LinearOperator,
    shape: Sequence[int] | None = None,
    *,
    batch: int = 2,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> list[CheckRow]:
    """Run every check and return the figures.

    Args:
        operator: what to check.
        shape: shape of a signal without the batch. When left out: ``operator.shape``, or that of its mask, else colour
            images of 96x96 (every factor from 2 to 4 divides them).
        batch: number of samples; an operator with parameters per sample decides it itself.
        seed: of the random signals.
        dtype: precision to check in; by default float64, or that of an operator that cannot take it.
    """
    if isinstance(operator, Callable):
        operator = operator.untested()  # a wrong adjoint becomes a row below
    dtype = dtype or getattr(operator, "solve_dtype", torch.float64)
    shape = tuple(shape) if shape is not None else _natural_shape(operator)
    batch = operator.samples(1 + len(shape)) or batch
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=dtype)

    x, z = random(batch, *shape), random(batch, *shape)
    a_x = operator(x)
    if a_x.shape[0] != batch:
        raise OperatorCheckError(
            f"{operator!r} turned a batch of {batch} into {a_x.shape[0]}: keep the batch as the first dimension"
        )
    y = random(*a_x.shape)
    observed = operator.observed(y)
    y = y if observed is None else y * observed
    tight = 1e-8 if dtype == torch.float64 else 1e-3
    back = operator.adjoint(y)
    if back.shape != x.shape:
        raise OperatorCheckError(
            f"{operator!r}: the adjoint gives shape {tuple(back.shape[1:])}, the signal has {tuple(shape)}"
        )
    scale = float((a_x.norm() * y.norm()).clamp_min(1e-30))
    dot = abs(float((a_x * y).sum() - (x * back).sum())) / scale
    combined = operator(2.5 * x - 0.5 * z)
    error = float((combined - (2.5 * a_x - 0.5 * operator(z))).norm() / max(float(combined.norm()), 1e-30))
    rows = [CheckRow("linearity", error, tight, "forward is not linear (an offset, a clamp, a rounding?)")]
    rows.append(CheckRow("dot test <Ax, y> = <x, A'y>", dot, tight, "adjoint is not the transpose of forward"))
    again = float((operator(x) - a_x).abs().max())
    rows.append(CheckRow("same answer twice", again, 0.0, "forward changes state or draws random numbers"))
    one_by_one = a_x
    if batch > 1 and _accepts_single(operator, x):
        one_by_one = torch.cat([operator(x[i : i + 1]) for i in range(batch)])
        rows.append(CheckRow("batch equals loop", _relative(a_x, one_by_one), tight, "samples of a batch mix"))
    a, b = 0.7, 1.9
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a solve that does not converge is told by its residual
        solved = operator.gram_solve(a, b, x, y)
    residual = a * solved + b * operator.adjoint(operator(solved)) - (x + operator.adjoint(y))
    limit = max(tight, 1e-7) if operator.exact else 1e-2
    rows.append(
        CheckRow("gram_solve residual", _relative(residual + x, x), limit, "solve does not match forward and adjoint")
    )
    applied = operator.spectral(lambda lam: 1.0 + lam, x)
    rows.append(
        CheckRow(
            "spectral(1 + lam) = I + A'A",
            _relative(applied, x + operator.adjoint(a_x)),
            max(limit, tight),
            "spectral does not match forward and adjoint",
        )
    )
    return rows


def _natural_shape(operator: LinearOperator) -> tuple[int, ...]:
    """Shape of a signal that the operator is likely to take."""
    known = getattr(operator, "shape", None)
    if known is not None:
        return tuple(known)
    parameter = getattr(operator, "weights", None)
    if parameter is None or parameter.ndim == 0:
        return (3, 96, 96)
    sizes = tuple(parameter.shape[-3:])
    return (3, *sizes) if len(sizes) == 2 else sizes


def _accepts_single(operator: LinearOperator, x: Tensor) -> bool:
    """Operators with per-sample parameters take only their own batch size."""
    try:
        operator(x[:1])
    except (ValueError, RuntimeError):
        return False
    return True


def check(
    operator: LinearOperator,
    shape: Sequence[int] | None = None,
    *,
    batch: int = 2,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> None:
    """Check linearity, the adjoint, batches, and the solves of an operator (arguments as in :func:`report`).

    Raises:
        OperatorCheckError: naming the first check that failed, its error and what to look at.
    """
    for row in report(operator, shape, batch=batch, seed=seed, dtype=dtype):
        if not row.passed:
            raise OperatorCheckError(
                f"{operator!r} failed '{row.name}': error {row.error:.1e}, allowed {row.limit:.0e}; {row.advice}"
            )
