r"""Circular convolution: ``A = F^* diag(K) F``, so ``V = F^*`` (unitary Fourier transform) and ``lam = |K|^2``."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from posteriori.operators.base import SpectralFunction, SpectralOperator

__all__ = ["CircularConvolution", "FourierOperator"]


class FourierOperator(SpectralOperator):
    """What is diagonal in the Fourier transform of a signal's last dimensions, ``axes``: subclasses give ``K``."""

    axes: tuple[int, ...]

    @abstractmethod
    def transfer(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """``K``, complex, shape ``(B or 1, 1, ..., *rfft sizes)`` for signals of ``shape`` (with batch)."""

    @property
    def solver(self) -> str:
        return "exact (fft)"

    def _shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape[i] for i in self.axes)

    def forward(self, x: Tensor) -> Tensor:
        return self.signal(self.transfer(x.shape, x) * self.coefficients(x), x.shape)

    def gram(self, v: Tensor) -> Tensor:
        return self.spectral(lambda lam: lam, v)

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(measurement_shape)

    def eigenvalues(self, like: Tensor) -> Tensor:
        k = self.transfer(like.shape, like)
        return k.real**2 + k.imag**2

    def coefficients(self, x: Tensor) -> Tensor:
        return torch.fft.rfftn(x, dim=self.axes, norm="ortho")

    def signal(self, c: Tensor, like_shape: Sequence[int]) -> Tensor:
        return torch.fft.irfftn(c, s=self._shape(like_shape), dim=self.axes, norm="ortho")

    def adjoint_coefficients(self, y: Tensor) -> Tensor:
        return self.transfer(y.shape, y).conj() * self.coefficients(y)

    def spectral_diagonal(self, f: SpectralFunction, like: Tensor) -> Tensor:
        values = f(self.eigenvalues(like))
        weight = torch.full((values.shape[-1],), 2.0, dtype=values.dtype, device=values.device)
        weight[0] = 1  # the halved transform keeps these columns once
        if like.shape[-1] % 2 == 0:
            weight[-1] = 1
        return (values * weight).sum(self.axes, keepdim=True) / math.prod(self._shape(like.shape))


class CircularConvolution(FourierOperator):
    """Convolution of the last dimensions of a signal with a kernel, wrapping around its borders.

    Args:
        kernel: real tensor whose dimensions are the convolved ones (``(k,)`` for 1-D signals, ``(kh, kw)`` for
            images, any number for volumes); its centre is entry ``size // 2``. With ``per_sample`` the batch comes
            first: ``(B, kh, kw)``.
        per_sample: whether the first dimension of ``kernel`` is the batch.

    Raises:
        ValueError: when the kernel is empty or not finite.
    """

    def __init__(self, kernel: Tensor, *, per_sample: bool = False) -> None:
        k = torch.as_tensor(kernel)
        k = k if k.is_floating_point() else k.float()
        if k.numel() == 0 or not bool(torch.isfinite(k).all()):
            raise ValueError("a blur kernel must be finite and not empty")
        self.kernel = k if per_sample else k.unsqueeze(0)
        self.axes = tuple(range(-(self.kernel.ndim - 1), 0))
        # A memo of transfer functions by size and precision: derived from the kernel alone.
        self._transfer: dict[tuple[object, ...], Tensor] = {}

    def samples(self, ndim: int) -> int | None:
        return self.kernel.shape[0] if self.kernel.shape[0] > 1 else None

    def transfer(self, shape: Sequence[int], like: Tensor) -> Tensor:
        sizes = self._shape(shape)
        if self.kernel.shape[0] not in (1, shape[0]):
            raise ValueError(
                f"{self.kernel.shape[0]} kernels do not fit a batch of {shape[0]}: give one for each sample"
            )
        real = like.real.dtype if like.is_complex() else like.dtype
        key = (sizes, len(shape), real, like.device)
        if key in self._transfer:
            return self._transfer[key]
        with torch.inference_mode(False):  # what is kept must serve training too
            k = transfer_function(self.kernel, sizes)
            k = k.reshape(k.shape[0], *[1] * (len(shape) - k.ndim), *k.shape[1:])
            k = k.to(device=like.device, dtype=complex_dtype(real))
        if not self.kernel.requires_grad:  # a kernel being fitted has a graph of its own at every call
            self._transfer[key] = k
        return k


def transfer_function(
    kernel: Tensor, sizes: Sequence[int], offsets: Sequence[int] | None = None, *, half: bool = True
) -> Tensor:
    """Fourier transform of kernels ``(B, *k)`` on a grid of ``sizes``, in complex128.

    Args:
        kernel: real; the centre is entry ``size // 2``.
        sizes: of the grid, none smaller than the kernel's.
        offsets: how many entries further on the convolution is read, along each dimension.
        half: keep only the non-negative frequencies of the last dimension, as ``rfftn``.

    Raises:
        ValueError: when the kernel is larger than the grid.
    """
    given = tuple(kernel.shape[1:])
    if any(k > n for k, n in zip(given, sizes, strict=True)):
        raise ValueError(f"a kernel of {given} does not fit a signal of {tuple(sizes)}: crop the kernel")
    axes = tuple(range(1, kernel.ndim))
    padded = kernel.new_zeros(kernel.shape[0], *sizes, dtype=torch.float64)
    padded[(slice(None), *[slice(0, k) for k in given])] = kernel.double()
    shifts = [-(k // 2) - o for k, o in zip(given, offsets or [0] * len(given), strict=True)]
    padded = torch.roll(padded, shifts, axes)
    return torch.fft.rfftn(padded, dim=axes) if half else torch.fft.fftn(padded, dim=axes)


def complex_dtype(real: torch.dtype) -> torch.dtype:
    return torch.complex128 if real == torch.float64 else torch.complex64
