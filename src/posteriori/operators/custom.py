r"""Operators given as functions: the user's forward model, solved by conjugate gradients."""

from __future__ import annotations

import math
from collections import abc
from collections.abc import Sequence

import torch
from torch import Tensor

from posteriori.operators.base import full_precision, transpose
from posteriori.operators.krylov import KrylovOperator

__all__ = ["Callable"]


class Callable(KrylovOperator):
    """``A`` from a function on batches.

    Args:
        forward: linear function from ``(B, *shape)`` to ``(B, *measurement)``.
        adjoint: its transpose; derived by automatic differentiation when left out.
        shape: shape of a signal without the batch.
        tolerance: whitened error at which solves stop.
        max_iterations: iterations after which a solve gives up with a warning.
        dtype: precision of solves; give ``torch.float32`` when ``forward`` cannot take float64.

    Raises:
        ValueError: when ``shape`` is not positive.
    """

    def __init__(
        self,
        forward: abc.Callable[[Tensor], Tensor],
        adjoint: abc.Callable[[Tensor], Tensor] | None = None,
        *,
        shape: Sequence[int],
        tolerance: float = 1e-3,
        max_iterations: int = 500,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if not shape or math.prod(shape) < 1:
            raise ValueError(f"a signal needs a shape of positive sizes, got {tuple(shape)}")
        self._forward = forward
        self._adjoint = adjoint
        self.shape = tuple(shape)
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self._dtype = dtype

    @property
    def solve_dtype(self) -> torch.dtype:
        return self._dtype

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x)

    @full_precision
    def adjoint(self, y: Tensor) -> Tensor:
        if self._adjoint is not None:
            return self._adjoint(y)
        return transpose(self._forward, self.shape, y)

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        return self.shape
