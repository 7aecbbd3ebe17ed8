r"""Products of operators whose structure survives:

    rows that pick one entry each       A^T A = diag(R_1^T ... R_k^T 1), R_i the squares of the entries
                                        masks, weights, crops, paddings, samples, mosaics
    circular convolutions               K = K_1 ... K_k
    what is done along each axis        the axes' matrices multiply
    channels and space                  M (x) S:  V = V_M (x) V_S,  lam_jk = lam_M,j lam_S,k

:func:`posteriori.operators.algebra.compose` chooses among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posteriori.operators.base import LinearOperator, SpectralFunction, SpectralOperator, name_of
from posteriori.operators.channels import Bayer, ChannelMixing
from posteriori.operators.cropping import Crop, Pad
from posteriori.operators.diagonal import Weighting
from posteriori.operators.fourier import CircularConvolution, FourierOperator
from posteriori.operators.kronecker import Axis
from posteriori.operators.sampling import Sampling

__all__ = ["ChannelProduct", "ConvolutionProduct", "Picking", "PickingProduct", "ProductAxis", "first_samples"]


def first_samples(operators: Sequence[LinearOperator], ndim: int) -> int | None:
    """Batch size that any of the operators is tied to; all act on batches of ``ndim`` dimensions."""
    return next((s for A in operators if (s := A.samples(ndim)) is not None), None)


class PickingProduct(SpectralOperator):
    """Operators every measurement of which is a multiple of one entry, one after the other.

    Args:
        operators: in the order of writing, the last acts first; each a :data:`Picking`.
    """

    def __init__(self, *operators: SpectralOperator) -> None:
        nested = [A.operators if isinstance(A, PickingProduct) else (A,) for A in operators]
        self.operators: tuple[SpectralOperator, ...] = tuple(A for group in nested for A in group)

    @property
    def solver(self) -> str:
        return "exact (diagonal)"

    def samples(self, ndim: int) -> int | None:
        return first_samples(self.operators, ndim)

    def describe(self) -> str:
        return f"{' @ '.join(map(name_of, self.operators))} [{self.solver}]"

    def forward(self, x: Tensor) -> Tensor:
        for A in reversed(self.operators):
            x = A.forward(x)
        return x

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        for A in self.operators:
            measurement_shape = A.signal_shape(measurement_shape)
        return tuple(measurement_shape)

    def eigenvalues(self, like: Tensor) -> Tensor:
        signals = like.shape[0] if self.samples(like.ndim) is not None else 1
        lam = torch.ones_like(self.forward(like.new_zeros(signals, *like.shape[1:])))
        for A in self.operators:
            lam = A.eigenvalues(lam) * lam if isinstance(A, Weighting) else A.adjoint_coefficients(lam)
        return lam

    def coefficients(self, x: Tensor) -> Tensor:
        return x

    def signal(self, c: Tensor, like_shape: Sequence[int]) -> Tensor:
        return c

    def adjoint_coefficients(self, y: Tensor) -> Tensor:
        for A in self.operators:
            y = A.adjoint_coefficients(y)
        return y

    def spectral_diagonal(self, f: SpectralFunction, like: Tensor) -> Tensor:
        return f(self.eigenvalues(like))

    def observed(self, y: Tensor) -> Tensor | None:
        ones = y.new_ones(y.shape[0], *self.signal_shape(y.shape[1:]))
        return (self.forward(ones) > 0).to(y.dtype)


Picking = Weighting | Crop | Pad | Sampling | Bayer | PickingProduct


class ConvolutionProduct(FourierOperator):
    """Circular convolutions one after the other.

    Args:
        convolutions: of the same dimensions.
    """

    def __init__(self, *convolutions: CircularConvolution) -> None:
        self.convolutions = convolutions
        self.axes = convolutions[0].axes

    def samples(self, ndim: int) -> int | None:
        return first_samples(self.convolutions, ndim)

    def transfer(self, shape: Sequence[int], like: Tensor) -> Tensor:
        first, *rest = (A.transfer(shape, like) for A in self.convolutions)
        for k in rest:
            first = first * k
        return first


@dataclass(frozen=True)
class ProductAxis:
    """Along one axis: ``outer`` after ``inner``."""

    outer: Axis
    inner: Axis

    def matrix(self, n: int) -> Tensor:
        inner = self.inner.matrix(n)
        return self.outer.matrix(inner.shape[0]) @ inner

    def length(self, m: int) -> int:
        return self.inner.length(self.outer.length(m))


class ChannelProduct(SpectralOperator):
    """Mixes the channels of images (or lines, volumes) and acts on all of them alike in space, in either order.

    Args:
        mixing: of the channels ``(B, C, ...)``.
        space: acts on the dimensions after the channels only.
    """

    def __init__(self, mixing: ChannelMixing, space: SpectralOperator) -> None:
        self.mixing = mixing
        self.space = space

    @property
    def solver(self) -> str:
        return f"exact (channels x {self.space.solver.removeprefix('exact (').removesuffix(')')})"

    def samples(self, ndim: int) -> int | None:
        return first_samples((self.mixing, self.space), ndim)

    def describe(self) -> str:
        return f"{' @ '.join(map(name_of, (self.mixing, self.space)))} [{self.solver}]"

    def forward(self, x: Tensor) -> Tensor:
        return self.mixing.forward(self.space.forward(x))

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        return self.mixing.signal_shape(self.space.signal_shape(measurement_shape))

    def eigenvalues(self, like: Tensor) -> Tensor:
        return self.mixing.eigenvalues(like) * self.space.eigenvalues(like)

    # Channels first: their mixing acts on real numbers, the coefficients in space may be complex.
    def coefficients(self, x: Tensor) -> Tensor:
        return self.space.coefficients(self.mixing.coefficients(x))

    def signal(self, c: Tensor, like_shape: Sequence[int]) -> Tensor:
        return self.mixing.signal(self.space.signal(c, like_shape), like_shape)

    def adjoint_coefficients(self, y: Tensor) -> Tensor:
        return self.space.adjoint_coefficients(self.mixing.adjoint_coefficients(y))

    def spectral_diagonal(self, f: SpectralFunction, like: Tensor) -> Tensor:
        double = like.new_empty(1, dtype=torch.float64).expand(like.shape)  # as coefficients of channels are
        modes = self.space.spectral_diagonal(lambda _: f(self.eigenvalues(double)), double)
        return self.mixing.spectral_diagonal(lambda _: modes, like)

    def observed(self, y: Tensor) -> Tensor | None:
        return self.space.observed(y)
