r"""Convolution with any kernel, of any dimensions, with any boundary: ``A = (valid convolution) (extension)``.

The signal is extended as the boundary says, or not at all (``"valid"``: the measurement is smaller, as in a picture of
a scene that goes on outside), then convolved where the kernel fits. Neither part has a cheap basis in general: solves
are by conjugate gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posteriori.operators.base import full_precision, transpose
from posteriori.operators.kronecker import Boundary, source_entries
from posteriori.operators.krylov import KrylovOperator

__all__ = ["BoundaryConvolution"]


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

    def samples(self, ndim: int) -> int | None:
        return self.kernel.shape[0] if self.kernel.shape[0] > 1 else None

    def describe(self) -> str:
        return f"Blur({'x'.join(map(str, self.kernel.shape[1:]))}, {self.boundary}) [{self.solver}]"

    def forward(self, x: Tensor) -> Tensor:
        taps = self.kernel.shape[1:]
        d = len(taps)
        if x.ndim <= d or self.kernel.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"{self.kernel.shape[0]} kernels of {d} dimensions do not fit a batch of shape {tuple(x.shape)}"
            )
        axes = tuple(range(-d, 0))
        if self.boundary == "valid":
            if any(k > n for k, n in zip(taps, x.shape[-d:], strict=True)):
                raise ValueError(f"a kernel of {tuple(taps)} does not fit into a signal of {tuple(x.shape[-d:])}")
        else:
            for axis, k in zip(axes, taps, strict=True):
                x = self._extend(x, axis, k)
        # circular convolution of the extended signal is the convolution wherever the kernel does not wrap
        sizes = x.shape[-d:]
        transfer = torch.fft.rfftn(self.kernel.to(x), s=sizes, dim=axes)
        transfer = transfer.reshape(transfer.shape[0], *[1] * (x.ndim - 1 - d), *transfer.shape[1:])
        full = torch.fft.irfftn(torch.fft.rfftn(x, dim=axes) * transfer, s=sizes, dim=axes)
        return full[(..., *[slice(k - 1, None) for k in taps])]

    def _extend(self, x: Tensor, axis: int, k: int) -> Tensor:
        n = x.shape[axis]
        index, exists = source_entries(torch.arange(-(k - 1 - k // 2), n + k // 2), n, self.boundary)
        extended = x.index_select(axis, index.to(x.device))
        shape = (-1, *[1] * (-1 - axis))
        return extended if bool(exists.all()) else extended * exists.to(extended).reshape(shape)

    @full_precision
    def adjoint(self, y: Tensor) -> Tensor:
        return transpose(self.forward, self.signal_shape(y.shape[1:]), y)

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        taps = self.kernel.shape[1:]
        lead, sizes = measurement_shape[: -len(taps)], measurement_shape[-len(taps) :]
        grown = 1 if self.boundary == "valid" else 0
        return (*lead, *[m + grown * (k - 1) for m, k in zip(sizes, taps, strict=True)])
