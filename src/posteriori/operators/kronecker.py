r"""Separable operators: ``A = A_h (x) A_w``. Per axis ``A_i = U_i diag(s_i) V_i^T`` by a dense SVD, hence

    V = V_h (x) V_w,      lam_jk = (s_h,j s_w,k)^2.

Any boundary is as exact as any other, and the cost is four small matrix products: reflect-padded Gaussian blur, and
box, bicubic (antialiased) or custom downsampling by any integer factor, for any image size. Factors are computed once
in float64 per size and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from posteriori.operators.base import SpectralFunction, SpectralOperator, full_precision

Boundary = Literal["reflect", "replicate", "zero", "circular"]

__all__ = ["Axis", "ConvolutionAxis", "ResamplingAxis", "Separable"]


class Axis(Protocol):
    """What ``A`` does along one axis. Hashable, so that factors can be shared between operators."""

    def matrix(self, n: int) -> Tensor:
        """Float64 matrix ``(m, n)`` for an axis of ``n`` entries."""
        ...

    def length(self, m: int) -> int:
        """``n`` of the signal whose measurement has ``m`` entries."""
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class AxisFactors:
    """SVD of one axis: the matrix ``(m, n)``, ``V`` ``(n, n)``, ``U diag(s)`` padded to ``(m, n)``, ``s`` ``(n,)``."""

    matrix: Tensor
    v: Tensor
    us: Tensor
    s: Tensor

    @staticmethod
    def of(matrix: Tensor) -> AxisFactors:
        matrix = matrix.double()
        m, n = matrix.shape
        u, s, vt = torch.linalg.svd(matrix, full_matrices=True)
        k = min(m, n)
        padded = matrix.new_zeros(n)
        padded[:k] = s[:k]
        us = matrix.new_zeros(m, n)
        us[:, :k] = u[:, :k] * s[:k]
        return AxisFactors(matrix, vt.T.contiguous(), us, padded)


@lru_cache(maxsize=128)
def _shared_factors(axis: Axis, n: int) -> AxisFactors:
    return AxisFactors.of(axis.matrix(n))


def axis_factors(axis: Axis, n: int) -> AxisFactors:
    """Factors of an axis; small ones (up to 512 entries) are shared by all operators of the process."""
    return _shared_factors(axis, n) if n <= 512 else AxisFactors.of(axis.matrix(n))


class Separable(SpectralOperator):
    """``A = A_h (x) A_w`` on the last two dimensions of a signal ``(B, ..., H, W)``.

    Args:
        height, width: what is done along each axis: one :class:`Axis`, or a sequence with one per sample.
        name: for :meth:`describe`.
    """

    def __init__(self, height: Axis | Sequence[Axis], width: Axis | Sequence[Axis], name: str = "Separable") -> None:
        heights = tuple(height) if isinstance(height, Sequence) else (height,)
        widths = tuple(width) if isinstance(width, Sequence) else (width,)
        if len(heights) != len(widths):
            raise ValueError(f"{len(heights)} height and {len(widths)} width factors: give as many of both")
        self.axes = (heights, widths)
        self._name = name
        # A memo of casts to a size, precision and device: derived from the axes alone.
        self._cast: dict[tuple[object, ...], tuple[Tensor, ...]] = {}

    @property
    def solver(self) -> str:
        return "exact (kronecker-svd)"

    def samples(self, ndim: int) -> int | None:
        return len(self.axes[0]) if len(self.axes[0]) > 1 else None

    def describe(self) -> str:
        return f"{self._name} [{self.solver}]"

    def _factors(self, axis: int, n: int, like: Tensor) -> tuple[Tensor, ...]:
        """``(matrix, V, U diag(s), s)`` of an axis, each ``(B or 1, 1, ..., rows, columns)``, cast to ``like``."""
        # by value: a square image with the same axis twice needs its factors once
        key = (self.axes[axis], n, like.dtype, like.device, like.ndim)
        if key in self._cast:
            return self._cast[key]
        with torch.inference_mode(False):  # what is kept must serve training too
            factors = [axis_factors(a, n) for a in self.axes[axis]]
            parts = []
            for name in ("matrix", "v", "us", "s"):
                part = torch.stack([getattr(f, name) for f in factors]).to(like)
                parts.append(part.reshape(part.shape[0], *[1] * (like.ndim - 3), *part.shape[1:]))
            self._cast[key] = tuple(parts)
        return self._cast[key]

    def _pair(self, part: int, shape: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
        samples = len(self.axes[0])
        if len(shape) < 3 or samples not in (1, shape[0]):
            expected = f" of {samples} samples" if samples > 1 else ""
            raise ValueError(f"{self._name} acts on batches (B, ..., H, W){expected}, got shape {tuple(shape)}")
        return self._factors(0, shape[-2], like)[part], self._factors(1, shape[-1], like)[part]

    def forward(self, x: Tensor) -> Tensor:
        h, w = self._pair(0, x.shape, x)
        return h @ x @ w.mT

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        *lead, h, w = measurement_shape
        return (*lead, self.axes[0][0].length(h), self.axes[1][0].length(w))

    def eigenvalues(self, like: Tensor) -> Tensor:
        s_h, s_w = self._pair(3, like.shape, like)
        return (s_h.unsqueeze(-1) * s_w.unsqueeze(-2)) ** 2

    def coefficients(self, x: Tensor) -> Tensor:
        v_h, v_w = self._pair(1, x.shape, x)
        return v_h.mT @ x @ v_w

    def signal(self, c: Tensor, like_shape: Sequence[int]) -> Tensor:
        v_h, v_w = self._pair(1, like_shape, c)
        return v_h @ c @ v_w.mT

    def adjoint_coefficients(self, y: Tensor) -> Tensor:
        us_h, us_w = self._pair(2, (y.shape[0], *self.signal_shape(y.shape[1:])), y)
        return us_h.mT @ y @ us_w

    @full_precision
    def spectral_diagonal(self, f: SpectralFunction, like: Tensor) -> Tensor:
        v_h, v_w = self._pair(1, like.shape, like)
        return v_h**2 @ f(self.eigenvalues(like)) @ (v_w**2).mT


def _source(index: int, n: int, boundary: Boundary) -> int | None:
    """Entry that an index outside ``[0, n)`` stands for."""
    if 0 <= index < n:
        return index
    if boundary == "zero":
        return None
    if boundary == "replicate":
        return min(max(index, 0), n - 1)
    if boundary == "circular":
        return index % n
    if n == 1:
        return 0
    index %= 2 * (n - 1)  # "reflect" does not repeat the border entry
    return index if index < n else 2 * (n - 1) - index


@dataclass(frozen=True)
class ConvolutionAxis:
    """1-D convolution with ``taps`` (centre at entry ``len // 2``), keeping every ``stride``-th entry.

    With a stride the taps are centred on each block of ``stride`` entries, as an average over the block is.
    """

    taps: tuple[float, ...]
    boundary: Boundary = "reflect"
    stride: int = 1

    def matrix(self, n: int) -> Tensor:
        if n % self.stride:
            raise ValueError(f"{n} pixels are not a multiple of the factor {self.stride}: crop or pad first")
        k, m = len(self.taps), n // self.stride
        start = -((k - 1) // 2) if self.stride == 1 else (self.stride - k) // 2
        matrix = torch.zeros(m, n, dtype=torch.float64)
        rows = torch.arange(m)
        for j in range(k):
            sources = [_source(int(i) * self.stride + start + j, n, self.boundary) for i in rows]
            kept = torch.tensor([s is not None for s in sources], dtype=torch.float64)
            columns = torch.tensor([s or 0 for s in sources])
            matrix[rows, columns] += kept * self.taps[k - 1 - j]  # a convolution flips its kernel
        return matrix

    def length(self, m: int) -> int:
        return m * self.stride


@dataclass(frozen=True)
class ResamplingAxis:
    """Antialiased downsampling by an integer factor.

    ``"box"`` averages blocks. ``"bicubic"`` is the Catmull-Rom cubic (a = -0.5) stretched by ``factor``, its weights
    normalised to sum to one also where the border cuts it: what Pillow and
    ``torch.nn.functional.interpolate(mode="bicubic", antialias=True)`` compute.
    """

    factor: int
    kernel: Literal["box", "bicubic"] = "box"

    def matrix(self, n: int) -> Tensor:
        m = n // self.factor
        if m * self.factor != n:
            raise ValueError(f"{n} pixels are not a multiple of the factor {self.factor}: crop or pad first")
        if self.kernel == "box":
            return torch.eye(m, dtype=torch.float64).repeat_interleave(self.factor, 1) / self.factor
        centre = (torch.arange(m, dtype=torch.float64) + 0.5) * self.factor
        x = (torch.arange(n, dtype=torch.float64) + 0.5 - centre[:, None]).abs() / self.factor
        a = -0.5
        near = ((a + 2) * x - (a + 3)) * x**2 + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
        return weights / weights.sum(1, keepdim=True)

    def length(self, m: int) -> int:
        return m * self.factor
