r"""Operators given as functions: the user's forward model, solved by conjugate gradients."""

from __future__ import annotations

import copy
import math
from collections import abc
from collections.abc import Sequence

import torch
from torch import Tensor

from posteriori.operators.base import SpectralOperator, full_precision, transpose
from posteriori.operators.krylov import KrylovOperator, Surrogate

__all__ = ["Callable"]


class Callable(KrylovOperator):
    """``A`` from a function on batches.

    Args:
        forward: linear function from ``(B, *shape)`` to ``(B, *measurement)``.
        adjoint: its transpose; derived by automatic differentiation when left out. When given it is tested once, on
            its first use: a wrong one would make every restoration wrong without a word.
        shape: shape of a signal without the batch.
        tolerance: whitened error at which solves stop.
        max_iterations: iterations after which a solve gives up with a warning.
        dtype: precision of solves; give ``torch.float32`` when ``forward`` cannot take float64.
        surrogate: an operator much like this one with an exact solve, on the same signals: saves iterations.
        dense_entries: signals and measurements up to this size are solved by dense linear algebra where iterations
            would be many; it takes as many calls of ``forward``. 0 for never.

    Raises:
        ValueError: when ``shape`` is not positive, ``surrogate`` has no exact solve, and on the first use of an
            ``adjoint`` that is not the transpose.
    """

    def __init__(
        self,
        forward: abc.Callable[[Tensor], Tensor],
        adjoint: abc.Callable[[Tensor], Tensor] | None = None,
        *,
        shape: Sequence[int],
        tolerance: float = 1e-3,
        max_iterations: int = 2000,
        dtype: torch.dtype = torch.float64,
        surrogate: SpectralOperator | None = None,
        dense_entries: int = KrylovOperator.dense_entries,
    ) -> None:
        if not shape or math.prod(shape) < 1:
            raise ValueError(f"a signal needs a shape of positive sizes, got {tuple(shape)}")
        if surrogate is not None and not isinstance(surrogate, SpectralOperator):
            raise ValueError(f"a surrogate has an exact solve, {surrogate} has none: leave it out")
        self._forward = forward
        self._adjoint = adjoint
        self.shape = tuple(shape)
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self._dtype = dtype
        self._surrogate = surrogate
        self.dense_entries = dense_entries
        self._tested = adjoint is None

    @property
    def solve_dtype(self) -> torch.dtype:
        return self._dtype

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x)

    def measurement_ndim(self, ndim: int) -> int:
        with torch.no_grad():
            return self(torch.zeros(1, *self.shape)).ndim

    @full_precision
    def adjoint(self, y: Tensor) -> Tensor:
        if self._adjoint is not None:
            if not self._tested:
                self._dot_test(y)
                self._tested = True
            return self._adjoint(y)
        return transpose(self._forward, self.shape, y)

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        return self.shape

    def surrogate(self, like: Tensor) -> Surrogate | None:
        return None if self._surrogate is None else Surrogate.of(self._surrogate, like)

    @torch.no_grad()
    def _dot_test(self, y: Tensor) -> None:
        """``<A x, z> = <x, A^T z>`` at a random ``x``; ``z`` is half ``A x``, which sees a wrong scale at any size, and
        half random, which sees a wrong direction."""
        assert self._adjoint is not None
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(y.shape[0], *self.shape, generator=generator, dtype=torch.float64).to(y)
        a_x = self._forward(x)
        noise = torch.randn(a_x.shape, generator=generator, dtype=torch.float64).to(a_x)
        z = a_x / a_x.norm().clamp_min(1e-30) + noise / noise.norm()
        back = self._adjoint(z)
        if back.shape != x.shape:
            raise ValueError(
                f"the adjoint gives shape {tuple(back.shape[1:])}, the signal has {self.shape}: "
                "leave the adjoint out to have it derived"
            )
        left, right = (float((u.double() * v.double()).sum()) for u, v in ((a_x, z), (x, back)))
        mismatch = abs(left - right) / max(float(a_x.double().norm()), 1e-30)
        if not mismatch <= 1e-4:
            raise ValueError(
                f"the adjoint is not the transpose of forward: <Ax, z> and <x, A'z> differ by {mismatch:.1e} of "
                "|Ax| |z| (allowed 1e-4), or forward is not linear: leave the adjoint out to have it derived"
            )

    def untested(self) -> Callable:
        """The same operator without the test of its adjoint, for those that test it themselves."""
        other = copy.copy(self)
        other._tested = True
        return other
