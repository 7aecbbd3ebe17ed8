r"""Separable operators: ``A = A_1 (x) ... (x) A_k`` on the last ``k`` dimensions. By a dense SVD of each axis,
``A_i = U_i diag(s_i) V_i^T``, hence

    V = V_1 (x) ... (x) V_k,      lam = (s_1 ... s_k)^2.

Any boundary is as exact as any other, and the cost is two small matrix products per axis: reflect-padded Gaussian blur,
and box, bicubic (antialiased) or custom downsampling by any integer factor, of 1-D signals, images and volumes of any
size. An axis that is averaged over blocks falls apart, ``A_i = I (x) A_block``, and only a block is decomposed; one
that treats both ends alike falls into an even and an odd half (:mod:`posteriori.operators.parity`). Factors are
computed once in float64 per size and kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from posteriori.operators.base import SpectralFunction, SpectralOperator, full_precision
from posteriori.operators.parity import Dense, Halves, Part, blocks_of

Boundary = Literal["reflect", "replicate", "zero", "circular", "valid"]

# Many small products cost more than one with the zeros between the blocks.
SHORT_AXIS = 64
LONGEST_AXIS = 8192  # each of its matrices takes half a gigabyte

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
    """SVD of one axis, or of one of its blocks: the matrix ``(m, n)``, ``V`` ``(n, n)``, ``U diag(s)`` padded to
    ``(m, n)``, ``s`` ``(n,)``."""

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


@dataclass(frozen=True)
class AxisParts:
    """:class:`AxisFactors` of one or several samples, and the product ``A^T A``: ``s`` is ``(S, n)``."""

    matrix: Part
    gram: Part
    v: Part
    us: Part
    s: Tensor

    @staticmethod
    def of(matrices: Sequence[Tensor], halved: bool) -> AxisParts:
        """Of one matrix for each sample, by halves where that is wanted and possible."""
        halves = [blocks_of(m) if halved else None for m in matrices]
        if any(h is None for h in halves):
            whole = _stacked([AxisFactors.of(m) for m in matrices])
            gram = _squared(whole.matrix)
            return AxisParts(Dense(whole.matrix), Dense(gram), Dense(whole.v), Dense(whole.us), whole.s)
        even, odd = (_stacked([AxisFactors.of(h[k]) for h in halves if h is not None]) for k in (0, 1))
        return AxisParts(
            Halves.of(even.matrix, odd.matrix, folds=True, unfolds=True),
            Halves.of(_squared(even.matrix), _squared(odd.matrix), folds=True, unfolds=True),
            Halves.of(even.v, odd.v, folds=False, unfolds=True),
            Halves.of(even.us, odd.us, folds=False, unfolds=True),
            torch.cat([even.s, odd.s], 1),
        )


def _stacked(factors: Sequence[AxisFactors]) -> AxisFactors:
    return AxisFactors(*(torch.stack([getattr(f, name) for f in factors]) for name in ("matrix", "v", "us", "s")))


def _squared(matrix: Tensor) -> Tensor:
    """``M^T M`` without entries that count for nothing: in single precision they are subnormal, and make products ten
    times slower."""
    gram = matrix.mT @ matrix
    return torch.where(gram.abs() < 1e-20 * gram.abs().max(), 0.0, gram)


@lru_cache(maxsize=128)
def _shared_parts(axes: tuple[Axis, ...], n: int, halved: bool) -> AxisParts:
    return AxisParts.of([axis.matrix(n) for axis in axes], halved)


def block(axis: Axis, n: int) -> int:
    """Entries of the equal blocks that an axis of ``n`` falls into; ``n`` when it is one."""
    return axis.factor if isinstance(axis, ResamplingAxis) and axis.kernel == "box" else n


def axis_parts(axes: tuple[Axis, ...], n: int, halved: bool) -> AxisParts:
    """Factors of an axis, given for every sample; small ones (up to 512 entries) are shared by all operators of the
    process.

    Raises:
        ValueError: when the axis is too long for a dense decomposition.
    """
    if n > LONGEST_AXIS:
        raise ValueError(
            f"an axis of {n} entries is too long for a dense SVD (at most {LONGEST_AXIS}): use Blur with "
            "boundary='circular', or BoundaryConvolution, which solves iteratively, or cut the signal"
        )
    return _shared_parts(axes, n, halved) if n <= 512 else AxisParts.of([axis.matrix(n) for axis in axes], halved)


class Separable(SpectralOperator):
    """``A = A_1 (x) ... (x) A_k`` on the last ``k`` dimensions of a signal: ``(B, ..., n)``, ``(B, ..., H, W)``, ....

    Args:
        axes: what is done along each of the last dimensions, in their order: one :class:`Axis`, or a sequence with one
            per sample.
        name: for :meth:`describe`.

    Raises:
        ValueError: without axes, or when they are for different numbers of samples.
    """

    def __init__(self, *axes: Axis | Sequence[Axis], name: str = "Separable") -> None:
        self.axes = tuple(tuple(a) if isinstance(a, Sequence) else (a,) for a in axes)
        counts = {len(a) for a in self.axes}
        if len(counts) != 1 or 0 in counts:
            given = " and ".join(str(len(a)) for a in self.axes)
            raise ValueError(f"got {given or 'no'} factors for the axes: give one, or as many for each axis as samples")
        self._name = name
        # A memo of casts to a size, precision and device: derived from the axes alone.
        self._cast: dict[tuple[object, ...], AxisParts] = {}

    @property
    def solver(self) -> str:
        return "exact (kronecker-svd)"

    def samples(self, ndim: int) -> int | None:
        return len(self.axes[0]) if len(self.axes[0]) > 1 else None

    def describe(self) -> str:
        return f"{self._name} [{self.solver}]"

    def _factors(self, axis: int, n: int, like: Tensor) -> AxisParts:
        """Factors of an axis, cast to ``like``; all but ``s`` of one block where the axis falls into equal ones."""
        # by value: a square image with the same axis twice needs its factors once
        key = (self.axes[axis], n, like.dtype, like.device)
        if key not in self._cast:
            with torch.inference_mode(False):  # what is kept must serve training too
                blocks = {block(a, n) for a in self.axes[axis]}
                size = blocks.pop() if len(blocks) == 1 and n % min(blocks) == 0 else n
                # a block is too small to be worth its halves
                found = axis_parts(self.axes[axis], size, halved=SHORT_AXIS < n == size)
                matrix, gram, v, us = (
                    _short(p.to(like), n // size) if n <= SHORT_AXIS else p.to(like)
                    for p in (found.matrix, found.gram, found.v, found.us)
                )
                self._cast[key] = AxisParts(matrix, gram, v, us, found.s.to(like).repeat(1, n // size))
        return self._cast[key]

    def _parts(self, shape: Sequence[int], like: Tensor) -> list[AxisParts]:
        """The factors of every axis, for signals of ``shape`` with batch."""
        samples, k = len(self.axes[0]), len(self.axes)
        if len(shape) <= k or samples not in (1, shape[0]):
            expected = f" of {samples} samples" if samples > 1 else ""
            dims = {1: "n", 2: "H, W", 3: "D, H, W"}.get(k, f"{k} dimensions")
            raise ValueError(f"{self._name} acts on batches (B, ..., {dims}){expected}, got shape {tuple(shape)}")
        return [self._factors(i, shape[i - k], like) for i in range(k)]

    def forward(self, x: Tensor) -> Tensor:
        return _along_axes([p.matrix for p in self._parts(x.shape, x)], x)

    @full_precision
    def adjoint(self, y: Tensor) -> Tensor:
        return _along_axes([p.matrix.mT for p in self._parts(self._x_shape(y), y)], y)

    @full_precision
    def gram(self, v: Tensor) -> Tensor:
        parts = self._parts(v.shape, v)
        if all(2 * p.matrix.mT.columns > p.matrix.columns for p in parts):
            return _along_axes([p.gram for p in parts], v)
        return self.adjoint(self.forward(v))  # few rows: twice across them is less than once in full

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        k = len(self.axes)
        if len(measurement_shape) < k:
            raise ValueError(f"{self._name} measures {k} dimensions, got a measurement of {tuple(measurement_shape)}")
        lengths = [axis[0].length(m) for axis, m in zip(self.axes, measurement_shape[-k:], strict=True)]
        return (*measurement_shape[:-k], *lengths)

    def eigenvalues(self, like: Tensor) -> Tensor:
        k = len(self.axes)
        s = [
            p.s.reshape(p.s.shape[0], *[1] * (like.ndim - 1 - k + i), p.s.shape[1], *[1] * (k - 1 - i))
            for i, p in enumerate(self._parts(like.shape, like))
        ]
        return math.prod(s[1:], start=s[0]) ** 2

    def coefficients(self, x: Tensor) -> Tensor:
        return _along_axes([p.v.mT for p in self._parts(x.shape, x)], x)

    def signal(self, c: Tensor, like_shape: Sequence[int]) -> Tensor:
        return _along_axes([p.v for p in self._parts(like_shape, c)], c)

    def adjoint_coefficients(self, y: Tensor) -> Tensor:
        shape = (y.shape[0], *self.signal_shape(y.shape[1:]))
        return _along_axes([p.us.mT for p in self._parts(shape, y)], y)

    @full_precision
    def spectral_diagonal(self, f: SpectralFunction, like: Tensor) -> Tensor:
        bases = [p.v for p in self._parts(like.shape, like)]
        diagonal = _along_axes([v.squares() for v in bases], f(self.eigenvalues(like)))
        for i, v in enumerate(bases):
            diagonal = v.mirrored(diagonal, i - len(bases))
        return diagonal


def _short(part: Part, copies: int) -> Part:
    """One matrix with the block repeated along its diagonal; short axes are never halved."""
    assert isinstance(part, Dense)
    return Dense(torch.stack([torch.block_diag(*[m] * copies) for m in part.matrix]))


def _along_axes(matrices: Sequence[Part], x: Tensor) -> Tensor:
    """Multiply the last dimensions of ``x``, one by each matrix, ``(B or 1, rows, columns)``, or every block of as many
    entries as it has columns."""
    for i, matrix in enumerate(matrices):
        axis = i - len(matrices)
        # an axis that is not the last is multiplied from the left, with what follows it as columns
        columns = math.prod(x.shape[axis:][1:])
        blocks = x.shape[axis] // matrix.columns
        flat = x.reshape(x.shape[0], math.prod(x.shape[1:axis]) * blocks, matrix.columns, columns)
        flat = matrix.right(flat.squeeze(-1)).unsqueeze(-1) if axis == -1 else matrix.left(flat)
        x = flat.reshape(flat.shape[0], *x.shape[1:axis], blocks * flat.shape[2], *x.shape[axis:][1:])
    return x


def source_entries(index: Tensor, n: int, boundary: Boundary) -> tuple[Tensor, Tensor]:
    """Entry that each index outside ``[0, n)`` stands for, and whether it stands for one (else for 0)."""
    inside = (index >= 0) & (index < n)
    if boundary == "zero":
        return index.clamp(0, n - 1), inside
    if boundary == "replicate":
        index = index.clamp(0, n - 1)
    elif boundary == "circular":
        index = index % n
    elif boundary == "reflect":  # does not repeat the border entry
        index = index % max(2 * (n - 1), 1)
        index = torch.minimum(index, (2 * (n - 1) - index).abs())
    return index, torch.ones_like(inside)


@dataclass(frozen=True)
class ConvolutionAxis:
    """1-D convolution with ``taps`` (centre at entry ``len // 2``), keeping every ``stride``-th entry.

    With a stride the taps are centred on each block of ``stride`` entries, as an average over the block is. With the
    boundary ``"valid"`` there is no border: kept is where all taps fit, from the first such place on.
    """

    taps: tuple[float, ...]
    boundary: Boundary = "reflect"
    stride: int = 1

    def matrix(self, n: int) -> Tensor:
        k, f = len(self.taps), self.stride
        if self.boundary == "valid":
            m, start = (n - k) // f + 1, 0
            if n < k or (n - k) % f:
                raise ValueError(
                    f"{n} pixels do not hold {k} taps"
                    + (f" at every {f}th place: crop to {k} plus a multiple of {f}" if f > 1 else ": crop the kernel")
                )
        else:
            m, start = n // f, -((k - 1) // 2) if f == 1 else (f - k) // 2
            if n % f:
                raise ValueError(f"{n} pixels are not a multiple of the factor {f}: crop or pad first")
        rows = torch.arange(m)
        matrix = torch.zeros(m, n, dtype=torch.float64)
        for j in range(k):
            columns, exists = source_entries(rows * f + start + j, n, self.boundary)
            matrix[rows, columns] += exists.double() * self.taps[k - 1 - j]  # a convolution flips its kernel
        return matrix

    def length(self, m: int) -> int:
        return (m - 1) * self.stride + len(self.taps) if self.boundary == "valid" else m * self.stride


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
