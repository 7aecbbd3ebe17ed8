r"""Circular convolution that keeps every ``f``-th entry: super-resolution with any kernel, separable or not.

In the Fourier domain decimation adds up the ``f^d`` frequencies ``omega = nu + a n/f`` (``a = 0..f-1`` per axis) that
look alike on the small grid, so that for every small frequency ``nu`` separately, with the vector ``k`` of the kernel's
transfer function at these frequencies,

    Y = f^(-d/2) k^T X,      A^T A = f^(-d) conj(k) k^T:      lam = |k|^2 / f^d for u = conj(k)/|k|, 0 for the rest.

The basis of a block is a Householder reflection ``H`` with ``H u ~ e_0``: ``x``'s coefficients are ``H X``, ``y`` adds
to the first of them only, and its other ``f^d - 1`` are never touched by it. (The textbook form subtracts from
``A^T y + r x`` what it sees of itself, ``(z - r) gamma``, which cancels at high noise.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from posteriori.operators.base import SpectralFunction, SpectralOperator, full_precision
from posteriori.operators.fourier import complex_dtype, transfer_function

__all__ = ["CircularDownsampling"]

# per block: unit Householder vector, |k|/f^(d/2), phase of u_0, u; all but the second complex
_Blocks = tuple[Tensor, Tensor, Tensor, Tensor]


class CircularDownsampling(SpectralOperator):
    """Convolution of the last dimensions with a kernel, wrapping around the borders, then decimation.

    The kernel is centred on every block of ``factor`` entries, as an average over the block is; with a factor of 1 its
    centre is entry ``size // 2``.

    Args:
        kernel: real tensor whose dimensions are the downsampled ones; with ``per_sample`` the batch comes first.
        factors: one whole number from 1 on, or one for each dimension of the kernel.
        per_sample: whether the first dimension of ``kernel`` is the batch.

    Raises:
        ValueError: on an unusable kernel or factor.
    """

    def __init__(self, kernel: Tensor, factors: int | Sequence[int], *, per_sample: bool = False) -> None:
        k = torch.as_tensor(kernel)
        k = k if k.is_floating_point() else k.float()
        if k.ndim < 1 + per_sample or k.numel() == 0 or not bool(torch.isfinite(k).all()):
            raise ValueError("a downsampling filter must be finite and not empty")
        self.kernel = k if per_sample else k.unsqueeze(0)
        d = self.kernel.ndim - 1
        self.factors = tuple(factors) if isinstance(factors, Sequence) else (factors,) * d
        if len(self.factors) != d or any(int(f) != f or f < 1 for f in self.factors):
            raise ValueError(f"need a factor from 1 on for each of {d} dimensions, got {factors}")
        # A memo of the blocks by size and precision: derived from the kernel alone.
        self._memo: dict[tuple[object, ...], _Blocks] = {}

    @property
    def solver(self) -> str:
        return "exact (polyphase)"

    def samples(self, ndim: int) -> int | None:
        return self.kernel.shape[0] if self.kernel.shape[0] > 1 else None

    def describe(self) -> str:
        by = "x".join(map(str, dict.fromkeys(self.factors)))
        return f"Downsampling({by}, {'x'.join(map(str, self.kernel.shape[1:]))} taps, circular) [{self.solver}]"

    @property
    def _axes(self) -> tuple[int, ...]:
        return tuple(range(-len(self.factors), 0))

    def _split(self, shape: Sequence[int]) -> tuple[int, ...]:
        """``(..., n_1, n_2)`` seen as ``(..., f_1, n_1/f_1, f_2, n_2/f_2)``: alias and small frequency of each axis."""
        d = len(self.factors)
        pairs = [(f, n // f) for f, n in zip(self.factors, shape[-d:], strict=True)]
        return (*shape[:-d], *[size for pair in pairs for size in pair])

    @property
    def _aliases(self) -> tuple[int, ...]:
        return tuple(range(-2 * len(self.factors), 0, 2))

    @property
    def _first_alias(self) -> tuple[Any, ...]:
        return (..., *[i for _ in self.factors for i in (slice(0, 1), slice(None))])

    def _blocks(self, shape: Sequence[int], like: Tensor) -> _Blocks:
        """What the transfer function makes of signals of ``shape`` (with batch), split as by :meth:`_split`."""
        d, sizes = len(self.factors), tuple(shape[-len(self.factors) :])
        if len(shape) <= d or self.kernel.shape[0] not in (1, shape[0]):
            raise ValueError(
                f"{self.kernel.shape[0]} kernels of {d} dimensions do not fit a batch of shape {tuple(shape)}"
            )
        for f, n in zip(self.factors, sizes, strict=True):
            if n % f:
                raise ValueError(f"{n} pixels are not a multiple of the factor {f}: crop or pad first")
        real = like.real.dtype if like.is_complex() else like.dtype
        key = (sizes, len(shape), real, like.device)
        if key in self._memo:
            return self._memo[key]
        with torch.inference_mode(False):  # what is kept must serve training too
            taps = self.kernel.shape[1:]
            # from the centre of the taps on the first entry to their centre on the first block
            offsets = [(f - k) // 2 + (k - 1) // 2 if f > 1 else 0 for f, k in zip(self.factors, taps, strict=True)]
            k = transfer_function(self.kernel, sizes, offsets, half=False)
            k = k.reshape(self._split((k.shape[0], *[1] * (len(shape) - 1 - d), *sizes)))
            energy = (k.real**2 + k.imag**2).sum(self._aliases, keepdim=True)
            silent = energy == 0  # a frequency that no measurement shows: any basis will do
            size = torch.where(silent, 1.0, energy).sqrt()
            unit = torch.zeros_like(k)
            unit[self._first_alias] = 1
            u = torch.where(silent, unit, k.conj() / size)
            phase = u[self._first_alias]
            tiny = phase.abs() == 0
            phase = torch.where(tiny, 1.0, phase / torch.where(tiny, 1.0, phase.abs()))
            # u conj(phase) has a first entry >= 0: adding e_0 to it cannot cancel
            w = u * phase.conj() + unit
            w = w / (w.real**2 + w.imag**2).sum(self._aliases, keepdim=True).sqrt()
            gain = torch.where(silent, 0.0, size) / math.prod(self.factors) ** 0.5
            blocks = tuple(
                part.to(device=like.device, dtype=complex_dtype(real) if part.is_complex() else real)
                for part in (w, gain, phase, u)
            )
        if not self.kernel.requires_grad:  # a kernel being fitted has a graph of its own at every call
            self._memo[key] = blocks  # type: ignore[assignment]
        return blocks  # type: ignore[return-value]

    def _reflect(self, c: Tensor, shape: Sequence[int]) -> Tensor:
        """``H`` on every block of a large spectrum."""
        w = self._blocks(shape, c)[0]
        split = c.reshape(self._split(c.shape))
        return (split - 2 * w * (w.conj() * split).sum(self._aliases, keepdim=True)).reshape(c.shape)

    def _first(self, c: Tensor, shape: Sequence[int]) -> Tensor:
        """First coefficients of every block, ``(..., 1, n_1/f_1, 1, n_2/f_2)``, as all of them: the rest is 0."""
        d = len(self.factors)
        padding = [p for f in reversed(self.factors) for p in (0, 0, 0, f - 1)]
        return functional.pad(c, padding).reshape(*c.shape[: -2 * d], *shape[-d:])

    def forward(self, x: Tensor) -> Tensor:
        _, gain, phase, _ = self._blocks(x.shape, x)
        c = self.coefficients(x).reshape(self._split(x.shape))[self._first_alias]
        small = (-gain * phase.conj() * c).squeeze(self._aliases)
        return torch.fft.ifftn(small, dim=self._axes, norm="ortho").real

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        d = len(self.factors)
        if len(measurement_shape) < d:
            raise ValueError(f"a kernel of {d} dimensions does not fit a measurement of {tuple(measurement_shape)}")
        return (
            *measurement_shape[:-d],
            *[m * f for m, f in zip(measurement_shape[-d:], self.factors, strict=True)],
        )

    def eigenvalues(self, like: Tensor) -> Tensor:
        return self._first(self._blocks(like.shape, like)[1] ** 2, like.shape)

    def coefficients(self, x: Tensor) -> Tensor:
        return self._reflect(torch.fft.fftn(x, dim=self._axes, norm="ortho"), x.shape)

    def signal(self, c: Tensor, like_shape: Sequence[int]) -> Tensor:
        return torch.fft.ifftn(self._reflect(c, like_shape), dim=self._axes, norm="ortho").real

    def adjoint_coefficients(self, y: Tensor) -> Tensor:
        shape = self._x_shape(y)
        _, gain, phase, _ = self._blocks(shape, y)
        c = torch.fft.fftn(y, dim=self._axes, norm="ortho")
        for axis in reversed(self._aliases):
            c = c.unsqueeze(axis)
        return self._first(-gain * phase * c, shape)  # H u = -phase e_0

    @full_precision
    def spectral_diagonal(self, f: SpectralFunction, like: Tensor) -> Tensor:
        # f(A^T A) = f(0) (I - sum u u^H) + sum f(lam) u u^H over the blocks, and the diagonal of u u^H repeats with
        # the factor: |sum_a u_a exp(2 pi i a p / f)|^2.
        u = self._blocks(like.shape, like)[3]
        d, sizes = len(self.factors), like.shape[-len(self.factors) :]
        waves = torch.fft.ifftn(u, dim=self._aliases, norm="forward")
        weight = (waves.real**2 + waves.imag**2) / math.prod(sizes)
        values = f(self.eigenvalues(like))
        split = values.reshape(self._split(values.shape))
        small = tuple(range(1 - 2 * d, 0, 2))
        seen = split[self._first_alias]
        phases = (seen * weight).sum(small)
        if math.prod(self.factors) > 1:  # the last of a block's coefficients is one that A does not see
            last: Any = (..., *[slice(-1, None) for _ in sizes])
            hidden = values[last]
            phases = phases + hidden * (1 - weight.sum(small))
        repeats = [n // f for n, f in zip(sizes, self.factors, strict=True)]
        return phases.repeat(*[1] * (phases.ndim - d), *repeats)
