r"""Some coefficients of an orthonormal transform (compressed sensing): ``A = M T diag(r)``.

``T`` is the Hadamard or cosine transform of the last dimensions, ``M`` the mask of the coefficients that are measured,
``r`` random signs or 1. ``T diag(r)`` is orthogonal, hence ``V = diag(r) T^T`` and ``lam = M``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from posteriori.operators.base import SpectralFunction, full_precision
from posteriori.operators.diagonal import Inpainting

__all__ = ["DCT", "Hadamard"]


@lru_cache(maxsize=32)
def _cosines(n: int) -> Tensor:
    """Orthonormal DCT-II, float64 ``(n, n)``."""
    with torch.inference_mode(False):
        k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
        matrix = (2 / n) ** 0.5 * torch.cos(math.pi * k * (2 * i + 1) / (2 * n))
        matrix[0] = n**-0.5
        return matrix


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


class _Transformed(Inpainting):
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
        super().__init__(mask)
        if dims < 1 or self.weights.ndim < dims:
            raise ValueError(f"a mask of shape {tuple(self.weights.shape)} has fewer than {dims} dimensions: set dims")
        self.dims, self.scramble = dims, scramble

    def transform(self, x: Tensor) -> Tensor:
        """``T x``."""
        raise NotImplementedError

    def inverse(self, c: Tensor) -> Tensor:
        """``T^T c``."""
        raise NotImplementedError

    def _scrambled(self, x: Tensor) -> Tensor:
        return x if self.scramble is None else x * _signs(tuple(x.shape[-self.dims :]), self.scramble).to(x)

    def forward(self, x: Tensor) -> Tensor:
        return self._weights(x) * self.coefficients(x)

    def coefficients(self, x: Tensor) -> Tensor:
        return self.transform(self._scrambled(x))

    def signal(self, c: Tensor, like_shape: Sequence[int]) -> Tensor:
        return self._scrambled(self.inverse(c))


class Hadamard(_Transformed):
    """Hadamard transform in natural order, exact. Arguments as in the cosine transform's :class:`DCT`; the transformed
    sizes must multiply to a power of two.

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


class DCT(_Transformed):
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

    def _along(self, x: Tensor, power: int, transposed: bool) -> Tensor:
        for axis in range(-self.dims, 0):
            matrix = _cosines(x.shape[axis]).to(x) ** power
            matrix = matrix.T if transposed else matrix
            x = (x.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
        return x

    def transform(self, x: Tensor) -> Tensor:
        return self._along(x, 1, False)

    def inverse(self, c: Tensor) -> Tensor:
        return self._along(c, 1, True)

    @full_precision
    def spectral_diagonal(self, f: SpectralFunction, like: Tensor) -> Tensor:
        return self._along(f(self.eigenvalues(like)).expand(like.shape), 2, True)
