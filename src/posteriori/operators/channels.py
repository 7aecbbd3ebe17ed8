r"""Operators that mix the channels of each pixel: ``y_p = M x_p`` with a small matrix ``M = U diag(s) V^T``, the same
for all pixels, so ``lam = s^2``. Colorization (grey from colour), spectral response.

And Bayer mosaics, where each pixel measures one of its channels: ``A^T A = diag(mask)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posteriori.operators.base import SpectralFunction, SpectralOperator, full_precision
from posteriori.operators.kronecker import AxisFactors

__all__ = ["Bayer", "ChannelMixing", "Grayscale"]


class ChannelMixing(SpectralOperator):
    """``m`` weighted sums of the ``C`` channels at every place of a signal ``(B, C, ...)``.

    Args:
        matrix: ``(m, C)``, real and finite; ``(B, m, C)`` is one per sample. A row is the response of one band.
        name: for :meth:`describe`.

    Raises:
        ValueError: when the matrix has another number of dimensions, is empty or not finite.
    """

    def __init__(self, matrix: Tensor, name: str = "ChannelMixing") -> None:
        m = torch.as_tensor(matrix)
        m = m if m.is_floating_point() else m.float()
        if m.ndim not in (2, 3) or m.numel() == 0 or not bool(torch.isfinite(m).all()):
            raise ValueError(f"channels are mixed by a finite (m, C) or (B, m, C) matrix, got shape {tuple(m.shape)}")
        self.matrix = m
        self._name = name
        # A memo of the factors by device: derived from the matrix alone.
        self._memo: dict[torch.device, tuple[Tensor, ...]] = {}

    @property
    def solver(self) -> str:
        return "exact (channels)"

    def samples(self, ndim: int) -> int | None:
        return self.matrix.shape[0] if self.matrix.ndim == 3 and self.matrix.shape[0] > 1 else None

    def describe(self) -> str:
        return f"{self._name}({'x'.join(map(str, self.matrix.shape))}) [{self.solver}]"

    def _factors(self, shape: Sequence[int], device: torch.device) -> tuple[Tensor, ...]:
        """``(V, U diag(s), s)``, float64, the samples (or 1) first, for signals of ``shape`` with batch."""
        m, channels = self.matrix.shape[-2:]
        samples = self.matrix.shape[0] if self.matrix.ndim == 3 else 1
        if len(shape) < 2 or shape[1] != channels or samples not in (1, shape[0]):
            expected = f" of {samples} samples" if samples > 1 else ""
            raise ValueError(
                f"a matrix from {channels} to {m} channels acts on batches (B, {channels}, ...){expected}, "
                f"it does not fit shape {tuple(shape)}"
            )
        if device not in self._memo:
            with torch.inference_mode(False), torch.no_grad():  # what is kept must serve training too
                factors = [AxisFactors.of(one) for one in self.matrix.reshape(-1, m, channels)]
                self._memo[device] = tuple(
                    torch.stack([getattr(f, name) for f in factors]).to(device) for name in ("v", "us", "s")
                )
        return self._memo[device]

    def forward(self, x: Tensor) -> Tensor:
        self._factors(x.shape, x.device)
        return _mix(self.matrix.to(x), x)

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        m, channels = self.matrix.shape[-2:]
        if not measurement_shape or measurement_shape[0] != m:
            raise ValueError(f"a matrix with {m} rows does not fit a measurement of shape {tuple(measurement_shape)}")
        return (channels, *measurement_shape[1:])

    # Coefficients are kept in float64: it costs little, and float32 would round what the null space holds at
    # sigma_t = 80 into the measured channels.
    def eigenvalues(self, like: Tensor) -> Tensor:
        s = self._factors(like.shape, like.device)[2]
        return (s**2).reshape(*s.shape, *[1] * (like.ndim - 2))

    def coefficients(self, x: Tensor) -> Tensor:
        return _mix(self._factors(x.shape, x.device)[0].mT, x.double())

    def signal(self, c: Tensor, like_shape: Sequence[int]) -> Tensor:
        return _mix(self._factors(like_shape, c.device)[0], c.double())

    def adjoint_coefficients(self, y: Tensor) -> Tensor:
        return _mix(self._factors(self._x_shape(y), y.device)[1].mT, y.double())

    @full_precision
    def spectral_diagonal(self, f: SpectralFunction, like: Tensor) -> Tensor:
        v = self._factors(like.shape, like.device)[0]
        return _mix(v**2, f(self.eigenvalues(like)).double()).to(like.dtype)


def _mix(matrix: Tensor, x: Tensor) -> Tensor:
    """``matrix``, ``(m, C)`` or ``(B or 1, m, C)``, on the channels of ``x``, ``(B or 1, C, ...)``."""
    mixed = matrix @ x.reshape(*x.shape[:2], -1)
    return mixed.reshape(*mixed.shape[:2], *x.shape[2:])


def Grayscale(weights: Sequence[float] = (0.299, 0.587, 0.114)) -> ChannelMixing:  # noqa: N802
    """Grey from colour: ``(B, C, H, W)`` to ``(B, 1, H, W)``; inverting it is colorization.

    Args:
        weights: of the channels; by default those of ITU-R BT.601 for red, green and blue.
    """
    return ChannelMixing(torch.tensor([list(weights)], dtype=torch.float64), "Grayscale")


class Bayer(SpectralOperator):
    """A mosaic of single colours, ``(B, 3, H, W)`` to ``(B, 1, H, W)``; inverting it is demosaicing.

    Args:
        pattern: the letters ``R``, ``G``, ``B`` of the repeated cell, four of them for 2x2 pixels, row by row
            (``"RGGB"``), or a sequence with one string for each row (a 6x6 cell, say). Any size, odd ones too.

    Raises:
        ValueError: when the pattern is not a rectangle of these letters.
    """

    def __init__(self, pattern: str | Sequence[str] = "RGGB") -> None:
        rows = [pattern[:2], pattern[2:]] if isinstance(pattern, str) else list(pattern)
        sides = {len(row) for row in rows}
        four = not isinstance(pattern, str) or len(pattern) == 4
        if not four or len(sides) != 1 or 0 in sides or not set("".join(rows)) <= set("RGB"):
            raise ValueError(
                f"a mosaic is four of the letters R, G, B, as 'RGGB', or a string for each row: {pattern!r}"
            )
        self.pattern = tuple(rows)

    @property
    def solver(self) -> str:
        return "exact (diagonal)"

    def describe(self) -> str:
        shown = ("" if [len(row) for row in self.pattern] == [2, 2] else "/").join(self.pattern)
        return f"Bayer({shown}) [{self.solver}]"

    def _mask(self, like: Tensor) -> Tensor:
        """``(1, 3, H, W)``: 1 where a channel is measured."""
        h, w = like.shape[-2:]
        cell = torch.tensor([["RGB".index(letter) for letter in row] for row in self.pattern], device=like.device)
        channel = cell[torch.arange(h, device=like.device) % cell.shape[0]]
        channel = channel[:, torch.arange(w, device=like.device) % cell.shape[1]]
        return (channel == torch.arange(3, device=like.device).reshape(1, 3, 1, 1)).to(like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return (self.eigenvalues(x) * x).sum(1, keepdim=True)

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        if len(measurement_shape) != 3 or measurement_shape[0] != 1:
            raise ValueError(f"a mosaic has shape (1, H, W), got a measurement of {tuple(measurement_shape)}")
        return (3, *measurement_shape[1:])

    def eigenvalues(self, like: Tensor) -> Tensor:
        if like.ndim != 4 or like.shape[1] != 3:
            raise ValueError(f"a mosaic is made of colour images (B, 3, H, W), got shape {tuple(like.shape)}")
        return self._mask(like)

    def coefficients(self, x: Tensor) -> Tensor:
        return x

    def signal(self, c: Tensor, like_shape: Sequence[int]) -> Tensor:
        return c

    def adjoint_coefficients(self, y: Tensor) -> Tensor:
        self._x_shape(y)
        return self._mask(y) * y

    def spectral_diagonal(self, f: SpectralFunction, like: Tensor) -> Tensor:
        return f(self.eigenvalues(like))
