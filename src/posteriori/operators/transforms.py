r"""Some coefficients of an orthonormal transform (compressed sensing): ``A = M T diag(r)``.

``T`` is the Hadamard or cosine transform of the last dimensions, ``M`` the mask of the coefficients that are measured,
``r`` random signs or 1. ``T diag(r)`` is orthogonal, hence ``V = diag(r) T^T`` and ``lam = M``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from functools import lru_cache

import torch
from torch import Tensor

from posteriori.operators.base import SpectralFunction, SpectralOperator, full_precision
from posteriori.operators.diagonal import Inpainting, Weighting

__all__ = ["DCT", "Hadamard", "Transformed"]


def _phases(n: int, like: Tensor) -> Tensor:
    k = torch.arange(n, dtype=like.dtype, device=like.device)
    return torch.polar(torch.ones_like(k), math.pi * k / (2 * n))


def _normalisation(n: int, like: Tensor) -> Tensor:
    """What makes ``C_k = sum_j x_j cos(pi (2 j + 1) k / 2 n)`` orthonormal."""
    w = like.new_full((n,), (2 / n) ** 0.5)
    w[0] = n**-0.5
    return w


def _cosines(x: Tensor) -> Tensor:
    """Orthonormal DCT-II of the last dimension, by one Fourier transform of its length (Makhoul 1980)."""
    n = x.shape[-1]
    folded = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1)
    return (torch.fft.fft(folded) * _phases(n, x).conj()).real * _normalisation(n, x)


def _from_cosines(c: Tensor) -> Tensor:
    """Its inverse, which is its transpose: ``F folded = phase (C_k - i C_{n-k})``."""
    n = c.shape[-1]
    c = c / _normalisation(n, c)
    mirrored = torch.nn.functional.pad(c[..., 1:].flip(-1), (1, 0))
    folded = torch.fft.ifft(_phases(n, c) * torch.complex(c, -mirrored)).real
    half = (n + 1) // 2
    x = torch.empty_like(folded)
    x[..., ::2], x[..., 1::2] = folded[..., :half], folded[..., half:].flip(-1)
    return x


def _squared_cosines(f: Tensor) -> Tensor:
    """``sum_k T_kj^2 f_k``: with ``n T_kj^2 = 1 + cos(pi (2 j + 1) 2 k / 2 n)`` for ``k > 0`` again a cosine transform,
    of doubled frequencies; those from ``n`` on fold back with the opposite sign, ``n`` itself is 0 everywhere."""
    n = f.shape[-1]
    doubled = torch.zeros_like(f)
    below = torch.arange(1, (n + 1) // 2, device=f.device)
    above = torch.arange(n // 2 + 1, n, device=f.device)
    doubled[..., 2 * below] = f[..., below]
    doubled[..., 2 * n - 2 * above] = doubled[..., 2 * n - 2 * above] - f[..., above]
    return (f.sum(-1, keepdim=True) + _from_cosines(doubled * (n / 2) ** 0.5)) / n


@lru_cache(maxsize=8)
def _signs(shape: tuple[int, ...], seed: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _walsh_hadamard(x: Tensor, dims: int) -> Tensor:
    """Orthonormal, in natural order, of the last ``dims`` dimensions: ``n log n`` additions."""
    shape = x.shape
    n = math.prod(shape[-dims:])
    x = x.reshape(-1, n)
    step = 1
    while step < n:
        u, v = x.reshape(x.shape[0], -1, 2, step).unbind(2)
        x = torch.stack([u + v, u - v], 2).reshape(x.shape[0], n)
        step *= 2
    return (x / n**0.5).reshape(shape)


class Transformed(SpectralOperator):
    """A mask on the coefficients of an orthonormal transform of the last ``dims`` dimensions.

    Args:
        mask: 1 where a coefficient is measured; shapes as in :class:`Inpainting`. Measurements are laid out like it,
            with 0 where nothing is measured.
        dims: number of dimensions that are transformed: 1 for lines, 2 for images, 3 for volumes.
        scramble: seed of random signs that the signal is multiplied with first, which spread smooth signals evenly
            over all coefficients; none when left out.

    Raises:
        ValueError: when the mask holds other values than 0 and 1, or has fewer dimensions than are transformed.
    """

    def __init__(self, mask: Tensor, dims: int = 2, scramble: int | None = None) -> None:
        self.selection: Weighting = Inpainting(mask)
        if dims < 1 or self.weights.ndim < dims:
            raise ValueError(f"a mask of shape {tuple(self.weights.shape)} has fewer than {dims} dimensions: set dims")
        self.dims, self.scramble = dims, scramble

    @property
    def weights(self) -> Tensor:
        """What the coefficients are multiplied by."""
        return self.selection.weights

    def weighted(self, selection: Weighting) -> Transformed:
        """The same transform with other weights on its coefficients."""
        other = copy(self)
        other.selection = selection
        return other

    @abstractmethod
    def transform(self, x: Tensor) -> Tensor:
        """``T x``."""

    @abstractmethod
    def inverse(self, c: Tensor) -> Tensor:
        """``T^T c``."""

    def samples(self, ndim: int) -> int | None:
        return self.selection.samples(ndim)

    def _scrambled(self, x: Tensor) -> Tensor:
        return x if self.scramble is None else x * _signs(tuple(x.shape[-self.dims :]), self.scramble).to(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.selection.forward(self.coefficients(x)).to(x.dtype)

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(measurement_shape)

    def eigenvalues(self, like: Tensor) -> Tensor:
        return self.selection.eigenvalues(like)

    # Coefficients are kept in float64: sums in float32 would round what is not measured, large at sigma_t = 80, into
    # what is, at a visible size.
    def coefficients(self, x: Tensor) -> Tensor:
        return self.transform(self._scrambled(x.double()))

    def signal(self, c: Tensor, like_shape: Sequence[int]) -> Tensor:
        return self._scrambled(self.inverse(c.double()))

    def adjoint_coefficients(self, y: Tensor) -> Tensor:
        return self.selection.adjoint_coefficients(y)

    def observed(self, y: Tensor) -> Tensor | None:
        return self.selection.observed(y)


class Hadamard(Transformed):
    """Hadamard transform in natural order, exact. The transformed sizes must multiply to a power of two.

    Args:
        mask: 1 where a coefficient is measured; measurements are laid out like it, 0 where nothing is measured.
        dims: number of last dimensions that are transformed.
        scramble: seed of random signs applied to the signal first; none when left out.

    Raises:
        ValueError: when sizes are no power of two, or the mask holds other values than 0 and 1.
    """

    def __init__(self, mask: Tensor, dims: int = 2, scramble: int | None = None) -> None:
        super().__init__(mask, dims, scramble)
        n = math.prod(self.weights.shape[-dims:])
        if n & (n - 1):
            raise ValueError(
                f"a Hadamard transform needs a power of two, got {tuple(self.weights.shape[-dims:])} = {n}: pad, or "
                "use DCT"
            )

    @property
    def solver(self) -> str:
        return "exact (hadamard)"

    def transform(self, x: Tensor) -> Tensor:
        return _walsh_hadamard(x, self.dims)

    def inverse(self, c: Tensor) -> Tensor:
        return _walsh_hadamard(c, self.dims)

    def spectral_diagonal(self, f: SpectralFunction, like: Tensor) -> Tensor:
        axes = tuple(range(-self.dims, 0))  # all entries of T have the same square
        values = f(self.eigenvalues(like))
        return values.expand(*values.shape[: -self.dims], *like.shape[-self.dims :]).mean(axes, keepdim=True)


class DCT(Transformed):
    """Cosine transform (type II, orthonormal), exact.

    Args:
        mask: 1 where a coefficient is measured; measurements are laid out like it, 0 where nothing is measured.
        dims: number of last dimensions that are transformed.
        scramble: seed of random signs applied to the signal first; none when left out.

    Raises:
        ValueError: when the mask holds other values than 0 and 1.
    """

    @property
    def solver(self) -> str:
        return "exact (dct)"

    def _along(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        for axis in range(-self.dims, 0):
            x = function(x.movedim(axis, -1)).movedim(-1, axis)
        return x

    def transform(self, x: Tensor) -> Tensor:
        return self._along(x, _cosines)

    def inverse(self, c: Tensor) -> Tensor:
        return self._along(c, _from_cosines)

    @full_precision
    def spectral_diagonal(self, f: SpectralFunction, like: Tensor) -> Tensor:
        values = f(self.eigenvalues(like)).double().expand(like.shape)
        return self._along(values, _squared_cosines).to(like.dtype)
