r"""Parts of a signal, and signals inside a larger frame: ``Crop`` and ``Pad``, each the other's transpose.

A crop measures what it keeps, so ``A^T A`` is diagonal like a mask's; ``Crop @ CircularConvolution`` is a blur that
assumes nothing about what lies outside the picture. Padding keeps lengths: ``Pad^T Pad = I``. Both act on the last
dimensions, one for each margin given: of vectors, images, volumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from posteriori.operators.base import SpectralFunction, SpectralOperator

Margin = int | tuple[int, int]

__all__ = ["Crop", "CropAxis", "Pad", "PadAxis"]


class _Framed(SpectralOperator):
    """What a crop and a padding share; ``margins`` are those of the last dimensions, as pairs (before, after)."""

    def __init__(self, *margins: Margin) -> None:
        self.margins = tuple((m, m) if isinstance(m, int) else (int(m[0]), int(m[1])) for m in margins)
        if not margins or min(v for pair in self.margins for v in pair) < 0:
            raise ValueError(
                f"margins are whole numbers from 0 on, one or a pair (before, after) for each of the last dimensions: "
                f"got {margins}"
            )

    @property
    def solver(self) -> str:
        return "exact (diagonal)"

    def describe(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{m[0]}+{m[1]}' for m in self.margins)}) [{self.solver}]"

    def _resized(self, shape: Sequence[int], sign: int) -> tuple[int, ...]:
        count = len(self.margins)
        sizes = [n + sign * sum(m) for n, m in zip(shape[-count:], self.margins, strict=False)]
        if len(shape) < count or min(sizes) < 1:
            raise ValueError(f"the margins of {self.describe()} do not fit shape {tuple(shape)}: they leave nothing")
        return (*shape[:-count], *sizes)

    def _inside(self, z: Tensor) -> Tensor:
        """Without the margins."""
        self._resized(z.shape[1:], -1)
        for i, (before, after) in enumerate(self.margins, start=-len(self.margins)):
            z = z.narrow(i, before, z.shape[i] - before - after)
        return z

    def _framed(self, z: Tensor) -> Tensor:
        """With margins of 0."""
        self._resized(z.shape[1:], 1)
        return functional.pad(z, [v for pair in reversed(self.margins) for v in pair])

    def coefficients(self, x: Tensor) -> Tensor:
        return x

    def signal(self, c: Tensor, like_shape: Sequence[int]) -> Tensor:
        return c

    def spectral_diagonal(self, f: SpectralFunction, like: Tensor) -> Tensor:
        return f(self.eigenvalues(like))


class Crop(_Framed):
    """Keeps the inside of a signal and drops its margins.

    Args:
        margins: entries dropped in each of the last dimensions: one number for both sides, or ``(before, after)``.

    Raises:
        ValueError: when a margin is negative, or (on a signal) nothing is left.
    """

    @staticmethod
    def box(start: Sequence[int], size: Sequence[int], shape: Sequence[int]) -> Crop:
        """The part of ``size`` that begins at ``start`` of signals whose last dimensions are ``shape``.

        Raises:
            ValueError: when it does not lie inside.
        """
        if not len(start) == len(size) == len(shape):
            raise ValueError(f"start, size and shape of a box have one entry per dimension: {start}, {size}, {shape}")
        margins = [(s, n - s - k) for s, k, n in zip(start, size, shape, strict=True)]
        if min(v for m in margins for v in m) < 0 or min(size) < 1:
            raise ValueError(
                f"a box of {tuple(size)} at {tuple(start)} does not lie inside {tuple(shape)}: move or shrink it"
            )
        return Crop(*margins)

    def forward(self, x: Tensor) -> Tensor:
        return self._inside(x)

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        return self._resized(measurement_shape, 1)

    def eigenvalues(self, like: Tensor) -> Tensor:
        return self._framed(like.new_ones(1, *self._resized(like.shape[1:], -1)))

    def adjoint_coefficients(self, y: Tensor) -> Tensor:
        return self._framed(y)


class Pad(_Framed):
    """Puts a signal into a larger frame of zeros, which are no measurements.

    Args:
        margins: entries added in each of the last dimensions: one number for both sides, or ``(before, after)``.

    Raises:
        ValueError: when a margin is negative.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self._framed(x)

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        return self._resized(measurement_shape, -1)

    def eigenvalues(self, like: Tensor) -> Tensor:
        self._resized(like.shape[1:], 1)
        return like.new_ones([1] * like.ndim)

    def adjoint_coefficients(self, y: Tensor) -> Tensor:
        return self._inside(y)

    def observed(self, y: Tensor) -> Tensor | None:
        return self._framed(y.new_ones(1, *self.signal_shape(y.shape[1:])))


@dataclass(frozen=True)
class CropAxis:
    """Along one axis: drops entries at both ends."""

    before: int
    after: int

    def matrix(self, n: int) -> Tensor:
        return torch.eye(n, dtype=torch.float64)[self.before : n - self.after]

    def length(self, m: int) -> int:
        return m + self.before + self.after


@dataclass(frozen=True)
class PadAxis:
    """Along one axis: adds zeros at both ends."""

    before: int
    after: int

    def matrix(self, n: int) -> Tensor:
        return CropAxis(self.before, self.after).matrix(n + self.before + self.after).T

    def length(self, m: int) -> int:
        return m - self.before - self.after
