r"""Matrices that do not change when rows and columns are both reversed: half the work of dense ones.

With ``M[m-1-i, n-1-j] = M[i, j]`` even vectors become even ones, and odd ones odd. In the orthonormal basis

    even  (x_j + x_{n-1-j}) / sqrt(2)  and the middle entry of an odd length,      odd  (x_j - x_{n-1-j}) / sqrt(2)

``M`` falls into two blocks of half its size: a singular value decomposition takes a quarter of the time, products half.
Symmetric kernels with any boundary that treats both ends alike (reflect, replicate, zero, circular) are of this kind.
The factors ``1/sqrt(2)`` are part of the blocks, so that folding a signal is one sum and one difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Dense", "Halves", "Part", "blocks_of", "fold", "normalised", "unfold"]


def fold(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Sums (with the middle entry of an odd length) and differences of mirrored entries along a dimension (negative):
    ``n - n // 2`` and ``n // 2`` of them."""
    n = x.shape[dim]
    h = n // 2
    first, last = x.narrow(dim, 0, h), x.narrow(dim, n - h, h).flip(dim)
    even = torch.cat([first + last, x.narrow(dim, h, 1)], dim) if n % 2 else first + last
    return even, first - last


def unfold(even: Tensor, odd: Tensor, dim: int) -> Tensor:
    """The transpose of :func:`fold`; with both over ``sqrt(2)`` where entries are paired its inverse."""
    h = odd.shape[dim]
    paired = even.narrow(dim, 0, h)
    return torch.cat([paired + odd, even.narrow(dim, h, even.shape[dim] - h), (paired - odd).flip(dim)], dim)


def normalised(block: Tensor, dim: int, paired: int) -> Tensor:
    """The first ``paired`` entries along a dimension over ``sqrt(2)``: folded ones in the orthonormal basis."""
    weights = torch.ones(block.shape[dim], dtype=block.dtype)
    weights[:paired] = math.sqrt(0.5)
    return block * weights.reshape(-1, *[1] * (-1 - dim))


def blocks_of(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """The even and the odd block of a matrix ``(m, n)``, or ``None`` when reversing changes it."""
    if float((matrix - matrix.flip(0, 1)).abs().max()) > 1e-14 * float(matrix.abs().max()):
        return None
    m, n = matrix.shape
    columns = [normalised(part, -1, n // 2) for part in fold(matrix, -1)]
    even, odd = fold(columns[0], -2)[0], fold(columns[1], -2)[1]
    return normalised(even, -2, m // 2), normalised(odd, -2, m // 2)


@dataclass(frozen=True)
class Dense:
    """A matrix ``(S, rows, columns)``, one for each of ``S`` samples or for all."""

    matrix: Tensor

    @property
    def columns(self) -> int:
        return self.matrix.shape[2]

    @property
    def mT(self) -> Dense:  # noqa: N802 - as a tensor's
        return Dense(self.matrix.mT)

    def to(self, like: Tensor) -> Dense:
        return Dense(self.matrix.to(like))

    def left(self, x: Tensor) -> Tensor:
        """The product with columns ``(B, L, columns, K)``."""
        return self.matrix.unsqueeze(1) @ x

    def right(self, x: Tensor) -> Tensor:
        """The product with rows ``(B, L, columns)``."""
        return x @ self.matrix.mT

    def squares(self) -> Dense:
        """Every entry squared."""
        return Dense(self.matrix**2)

    def mirrored(self, x: Tensor, dim: int) -> Tensor:
        """What :meth:`squares` gave, along a dimension of ``x``: complete."""
        return x


@dataclass(frozen=True)
class Halves:
    """A matrix by its blocks, ``(S, rows, columns)`` each.

    Attributes:
        even, odd: the blocks, normalised along the dimensions that are folded.
        folds: whether vectors are folded before the blocks; coefficients come as even and odd ones already.
        unfolds: whether they are unfolded behind them.
    """

    even: Tensor
    odd: Tensor
    folds: bool
    unfolds: bool

    @staticmethod
    def of(even: Tensor, odd: Tensor, folds: bool, unfolds: bool) -> Halves:
        """From blocks in the orthonormal basis."""
        for dim, folded in ((-1, folds), (-2, unfolds)):
            if folded:
                paired = odd.shape[dim]
                even, odd = normalised(even, dim, paired), normalised(odd, dim, paired)
        return Halves(even, odd, folds, unfolds)

    @property
    def columns(self) -> int:
        return self.even.shape[2] + self.odd.shape[2]

    @property
    def mT(self) -> Halves:  # noqa: N802
        return Halves(self.even.mT, self.odd.mT, self.unfolds, self.folds)

    def to(self, like: Tensor) -> Halves:
        return Halves(self.even.to(like), self.odd.to(like), self.folds, self.unfolds)

    def left(self, x: Tensor) -> Tensor:
        even, odd = self._parts(x, -2)
        even, odd = self.even.unsqueeze(1) @ even, self.odd.unsqueeze(1) @ odd
        return unfold(even, odd, -2) if self.unfolds else torch.cat([even, odd], -2)

    def right(self, x: Tensor) -> Tensor:
        even, odd = self._parts(x, -1)
        even, odd = even @ self.even.mT, odd @ self.odd.mT
        return unfold(even, odd, -1) if self.unfolds else torch.cat([even, odd], -1)

    def _parts(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        if self.folds:
            return fold(x, dim)
        sizes = [self.even.shape[2], self.odd.shape[2]]
        even, odd = x.split(sizes, dim)
        return even, odd

    def squares(self) -> Dense:
        """Every entry of the first half of the rows squared (of a matrix that unfolds): the other half is the same."""
        missing = self.even.shape[1] - self.odd.shape[1]
        whole = torch.cat([self.even, torch.nn.functional.pad(self.odd, (0, 0, 0, missing))], 2)
        return Dense(whole**2)

    def mirrored(self, x: Tensor, dim: int) -> Tensor:
        """What :meth:`squares` gave, along a dimension of ``x``, continued to all rows."""
        return torch.cat([x, x.narrow(dim, 0, self.odd.shape[1]).flip(dim)], dim)


Part = Dense | Halves
