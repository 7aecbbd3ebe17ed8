r"""``B A`` where no structure survives, and what is close to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posteriori.operators.base import LinearOperator, SpectralOperator, full_precision, name_of
from posteriori.operators.cropping import Crop, Pad
from posteriori.operators.diagonal import Weighting
from posteriori.operators.fourier import FourierOperator
from posteriori.operators.kronecker import Separable
from posteriori.operators.krylov import KrylovOperator, Surrogate
from posteriori.operators.sampling import Sampling

__all__ = ["Composition", "acts_in_space", "approximation", "factors", "only_in_space"]


class Composition(KrylovOperator):
    """``B A`` without a structure of its own, solved by conjugate gradients.

    Args:
        operators: in the order of writing, the last acts first. Nested compositions are flattened.
    """

    def __init__(self, *operators: LinearOperator) -> None:
        self.operators = tuple(f for A in operators for f in factors(A))
        iterative = [A for A in self.operators if isinstance(A, KrylovOperator)]
        self.tolerance = min((A.tolerance for A in iterative), default=KrylovOperator.tolerance)
        self.max_iterations = max((A.max_iterations for A in iterative), default=KrylovOperator.max_iterations)
        self.dense_entries = min((A.dense_entries for A in iterative), default=KrylovOperator.dense_entries)

    @property
    def solve_dtype(self) -> torch.dtype:
        single = any(isinstance(A, KrylovOperator) and A.solve_dtype == torch.float32 for A in self.operators)
        return torch.float32 if single else torch.float64

    def samples(self, ndim: int) -> int | None:
        for A in reversed(self.operators):
            if (count := A.samples(ndim)) is not None:
                return count
            ndim = A.measurement_ndim(ndim)
        return None

    def measurement_ndim(self, ndim: int) -> int:
        for A in reversed(self.operators):
            ndim = A.measurement_ndim(ndim)
        return ndim

    def core(self, ndim: int) -> int:
        return 2 if ndim == 4 and all(acts_in_space(A) for A in self.operators) else ndim - 1

    def surrogate(self, like: Tensor) -> Surrogate | None:
        """For masks, weights and samples after an operator with an exact solve: its spectrum diluted by their mean.
        More factors, or an inner one that is itself approximated, lose more than they save."""
        inner, outer = self.operators[-1], self.operators[0]
        if len(self.operators) > 2 or not isinstance(inner, SpectralOperator):
            return None
        share = approximation(outer, inner(torch.zeros_like(like)))
        if not isinstance(share, Tensor):
            return None
        return Surrogate(inner, share.reshape(-1, *[1] * (like.ndim - 1)) * inner.eigenvalues(like))

    def forward(self, x: Tensor) -> Tensor:
        for A in reversed(self.operators):
            x = A(x)
        return x

    @full_precision
    def adjoint(self, y: Tensor) -> Tensor:
        for A in self.operators:
            y = A.adjoint(y)
        return y

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        for A in self.operators:
            measurement_shape = A.signal_shape(measurement_shape)
        return tuple(measurement_shape)

    def observed(self, y: Tensor) -> Tensor | None:
        outer, *rest = self.operators
        own = outer.observed(y)
        if not (rest and isinstance(outer, Weighting)):
            return own
        inner = Composition(*rest).observed(y)  # what was filler before weighting is so after it
        return own if inner is None or own is None else own * inner

    def describe(self) -> str:
        return f"{' @ '.join(map(name_of, self.operators))} [{self.solver}]"


def factors(A: LinearOperator) -> tuple[LinearOperator, ...]:
    """What a composition is made of; ``(A,)`` when it is none."""
    return A.operators if isinstance(A, Composition) else (A,)


def only_in_space(A: LinearOperator) -> bool:
    """Whether ``A`` acts alike on all channels of images ``(B, C, H, W)``, and on no more than their two sides."""
    if isinstance(A, Weighting):
        return A.weights.ndim <= 2 or A.weights.shape[-3] == 1
    if isinstance(A, FourierOperator):
        return len(A.axes) <= 2
    return (isinstance(A, Separable) and len(A.axes) <= 2) or (isinstance(A, Crop | Pad) and len(A.margins) <= 2)


def acts_in_space(A: LinearOperator) -> bool:
    """Whether ``A`` acts alike on all channels of images ``(B, C, H, W)``, and on no more than their two sides."""
    return only_in_space(A) or (isinstance(A, KrylovOperator) and A.core(4) <= 2)


def approximation(A: LinearOperator, like: Tensor) -> Surrogate | Tensor | None:
    """What is close to ``A^T A`` on signals like ``like``: a spectrum in a basis, or the mean of a diagonal that masks,
    weights and samples have, ``(B or 1, 1, ...)``, standing for a multiple of the identity; ``None`` without either."""
    if isinstance(A, Weighting | Sampling):
        return A.eigenvalues(like).flatten(1).mean(1).reshape(-1, *[1] * (like.ndim - 1))
    if isinstance(A, SpectralOperator):
        return Surrogate.of(A, like)
    return A.surrogate(like) if isinstance(A, KrylovOperator) else None
