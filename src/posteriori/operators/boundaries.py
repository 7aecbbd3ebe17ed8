r"""Convolution with any kernel, of any dimensions, with any boundary: ``A = (valid convolution) (extension)``.

The signal is extended as the boundary says, or not at all (``"valid"``: the measurement is smaller, as in a picture of
a scene that goes on outside), then convolved where the kernel fits. Neither part has a cheap basis in general: solves
are by conjugate gradients, with padding preconditioned by the same blur wrapping around.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from posteriori.operators.base import full_precision
from posteriori.operators.fourier import CircularConvolution
from posteriori.operators.kronecker import Boundary, source_entries
from posteriori.operators.krylov import KrylovOperator, Surrogate

__all__ = ["BoundaryConvolution", "PaddedConvolution"]


@lru_cache(maxsize=256)
def _fast_size(n: int) -> int:
    """The next number without prime factors above 5: others take a Fourier transform several times as long."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1


@lru_cache(maxsize=256)
def _outside(n: int, margins: tuple[int, int], boundary: Boundary) -> list[Tensor]:
    """Which entries of an axis stand before its first and behind its last one."""
    with torch.inference_mode(False):  # what is kept must serve training too
        places = torch.arange(-margins[0], 0), torch.arange(n, n + margins[1])
        return [source_entries(i, n, boundary)[0] for i in places]


class BoundaryConvolution(KrylovOperator):
    """Convolution of the last dimensions of a signal with a kernel.

    Args:
        kernel: real tensor whose dimensions are the convolved ones, centre at entry ``size // 2``; with
            ``per_sample`` the batch comes first.
        boundary: ``"reflect"``, ``"replicate"``, ``"zero"``, ``"circular"``, or ``"valid"`` (only where the kernel
            fits).
        per_sample: whether the first dimension of ``kernel`` is the batch.

    Raises:
        ValueError: on an unusable kernel or boundary.
    """

    def __init__(self, kernel: Tensor, boundary: Boundary = "reflect", *, per_sample: bool = False) -> None:
        k = torch.as_tensor(kernel)
        k = k if k.is_floating_point() else k.float()
        if k.ndim < 1 + per_sample or k.numel() == 0 or not bool(torch.isfinite(k).all()):
            raise ValueError(f"a blur kernel is finite and not empty, the batch first per sample; got {tuple(k.shape)}")
        if boundary not in ("reflect", "replicate", "zero", "circular", "valid"):
            raise ValueError(
                f"unknown boundary {boundary!r}: choose 'reflect', 'replicate', 'zero', 'circular' or 'valid'"
            )
        self.kernel = k if per_sample else k.unsqueeze(0)
        self.boundary: Boundary = boundary
        self.taps = tuple(self.kernel.shape[1:])
        self._axes = tuple(range(-len(self.taps), 0))
        # What lies before the first and behind the last entry of each axis.
        self._margins = [(0, 0) if boundary == "valid" else (k - 1 - k // 2, k // 2) for k in self.taps]
        # Memos by size: derived from the kernel alone.
        self._transfers: dict[tuple[object, ...], Tensor] = {}
        self._surrogates: dict[tuple[int, ...], CircularConvolution] = {}

    def core(self, ndim: int) -> int:
        return len(self.taps)

    def samples(self, ndim: int) -> int | None:
        return self.kernel.shape[0] if self.kernel.shape[0] > 1 else None

    def describe(self) -> str:
        return f"Blur({'x'.join(map(str, self.taps))}, {self.boundary}) [{self.solver}]"

    def _sizes(self, shape: Sequence[int]) -> list[int]:
        """Sizes for the transform of an extended signal, as large as it or a little larger where that is faster."""
        d = len(self.taps)
        if len(shape) <= d or self.kernel.shape[0] not in (1, shape[0]):
            raise ValueError(
                f"{self.kernel.shape[0]} kernels of {d} dimensions do not fit a batch of shape {tuple(shape)}"
            )
        if self.boundary == "valid" and any(k > n for k, n in zip(self.taps, shape[-d:], strict=True)):
            raise ValueError(f"a kernel of {self.taps} does not fit into a signal of {tuple(shape[-d:])}")
        return [_fast_size(n + sum(m)) for n, m in zip(shape[-d:], self._margins, strict=True)]

    def _transfer(self, sizes: list[int], like: Tensor) -> Tensor:
        key = (*sizes, like.ndim, like.dtype, like.device)
        if key in self._transfers:
            return self._transfers[key]
        with torch.inference_mode(False):  # what is kept must serve training too
            found = torch.fft.rfftn(self.kernel.to(like), s=sizes, dim=self._axes)
            found = found.reshape(found.shape[0], *[1] * (like.ndim - found.ndim), *found.shape[1:])
        if not self.kernel.requires_grad:  # a kernel being fitted has a graph of its own at every call
            self._transfers[key] = found
        return found

    def forward(self, x: Tensor) -> Tensor:
        sizes, extended = self._sizes(x.shape), x
        for axis in self._axes if self.boundary != "valid" else ():
            if self.boundary == "zero":
                extended = functional.pad(extended, (*[0] * (2 * (-1 - axis)), *self._margins[axis]))
                continue
            before, behind = (
                extended.index_select(axis, i.to(x.device))
                for i in _outside(x.shape[axis], self._margins[axis], self.boundary)
            )
            extended = torch.cat([before, extended, behind], axis)
        # circular convolution of the extended signal equals the convolution wherever the kernel does not wrap
        product = torch.fft.rfftn(extended, s=sizes, dim=self._axes) * self._transfer(sizes, x)
        full = torch.fft.irfftn(product, s=sizes, dim=self._axes)
        kept = [slice(k - 1, extended.shape[axis]) for axis, k in zip(self._axes, self.taps, strict=True)]
        return full[(..., *kept)]

    @full_precision
    def adjoint(self, y: Tensor) -> Tensor:
        shape = (y.shape[0], *self.signal_shape(y.shape[1:]))
        sizes = self._sizes(shape)
        room = [
            (k - 1, size - (k - 1) - y.shape[axis]) for axis, size, k in zip(self._axes, sizes, self.taps, strict=True)
        ]
        embedded = functional.pad(y, [n for pair in reversed(room) for n in pair])
        product = torch.fft.rfftn(embedded, dim=self._axes) * self._transfer(sizes, y).conj()
        folded = torch.fft.irfftn(product, s=sizes, dim=self._axes)
        for axis in self._axes:
            n, (before, behind) = shape[axis], self._margins[axis]
            core = folded.narrow(axis, before, n)
            if self.boundary not in ("zero", "valid"):
                parts = folded.narrow(axis, 0, before), folded.narrow(axis, before + n, behind)
                for index, part in zip(_outside(n, (before, behind), self.boundary), parts, strict=True):
                    core = core.index_add(axis, index.to(y.device), part)
            folded = core
        return folded

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        lead, sizes = measurement_shape[: -len(self.taps)], measurement_shape[-len(self.taps) :]
        grown = 1 if self.boundary == "valid" else 0
        return (*lead, *[m + grown * (k - 1) for m, k in zip(sizes, self.taps, strict=True)])

    def surrogate(self, like: Tensor) -> Surrogate | None:
        """The same blur wrapping around, of a kernel that is wrapped too where it is wider than the signal. It saves
        nothing where the measurement is smaller than the signal."""
        if self.boundary == "valid":
            return None
        sizes = tuple(like.shape[-len(self.taps) :])
        if sizes in self._surrogates:
            return Surrogate.of(self._surrogates[sizes], like)
        with torch.inference_mode(False):  # what is kept must serve training too
            wrapped = self.kernel.detach().double()
            for axis, k, n in zip(self._axes, self.taps, sizes, strict=True):
                index = ((torch.arange(k) - k // 2 + n // 2) % n).to(wrapped.device)
                room = wrapped.new_zeros([n if i - wrapped.ndim == axis else m for i, m in enumerate(wrapped.shape)])
                wrapped = room.index_add(axis, index, wrapped)
            found = CircularConvolution(wrapped, per_sample=True)
        if not self.kernel.requires_grad:
            self._surrogates[sizes] = found
        return Surrogate.of(found, like)


class PaddedConvolution(BoundaryConvolution):
    """Convolution of images with one kernel after padding the borders.

    Args:
        kernel: ``(kh, kw)``, centre at entry ``size // 2``.
        boundary: ``"reflect"``, ``"replicate"`` or ``"zero"``.

    Raises:
        ValueError: on an unusable kernel or boundary.
    """

    def __init__(self, kernel: Tensor, boundary: Boundary = "reflect") -> None:
        k = torch.as_tensor(kernel)
        if k.ndim != 2 or k.numel() == 0 or not bool(torch.isfinite(k).all()):
            raise ValueError(f"a blur kernel is a finite (kh, kw) tensor, got shape {tuple(k.shape)}")
        if boundary not in ("reflect", "replicate", "zero"):
            raise ValueError(f"unknown boundary {boundary!r} for padding: choose reflect, replicate or zero")
        super().__init__(k, boundary)

    def _sizes(self, shape: Sequence[int]) -> list[int]:
        if self.boundary == "reflect" and any(
            max(margins) >= n for n, margins in zip(shape[-2:], self._margins, strict=True)
        ):
            raise ValueError(
                f"a kernel of {self.taps} is too large to reflect a {shape[-2]}x{shape[-1]} image: crop it"
            )
        return super()._sizes(shape)
