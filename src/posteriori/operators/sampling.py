r"""Samples of a signal at given places, as a list: ``A^T A = diag(how often each entry is measured)``.

The same measurements laid out like the signal, with 0 where nothing is measured, are
:class:`~posteriori.operators.diagonal.Inpainting`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from posteriori.operators.base import SpectralFunction, SpectralOperator

__all__ = ["Sampling"]


class Sampling(SpectralOperator):
    """Signals ``(B, ..., *shape)`` measured at ``m`` places, as ``(B, ..., m)``: irregular or missing samples.

    Args:
        indices: what is measured: positions ``(m,)`` in a 1-D signal or in the flattened last dimensions, in any
            order, repeated ones too; or a boolean mask of ``shape``, read in row-major order. With ``per_sample`` the
            batch comes first, with as many measurements for each.
        shape: sizes of the last dimensions; a number for 1-D signals; not needed with a mask.
        per_sample: whether the first dimension of ``indices`` is the batch.

    Raises:
        ValueError: when positions lie outside the signal, or masks measure different numbers of entries.
    """

    def __init__(
        self, indices: Tensor | Sequence[int], shape: int | Sequence[int] | None = None, *, per_sample: bool = False
    ) -> None:
        i = torch.as_tensor(indices)
        i = i if per_sample else i.unsqueeze(0)
        if i.dtype == torch.bool:
            shape = tuple(i.shape[1:]) if shape is None else shape
        if shape is None:
            raise ValueError("positions do not tell how long the signal is: give its shape, or a boolean mask")
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if i.dtype == torch.bool:
            if tuple(i.shape[1:]) != self.shape or len(counts := set(i.flatten(1).sum(1).tolist())) != 1:
                raise ValueError(
                    f"a mask of shape {tuple(i.shape[1:])} for signals of {self.shape} must have their shape, and as "
                    "many measurements for each sample: use Inpainting otherwise"
                )
            i = i.flatten(1).nonzero()[:, 1].reshape(i.shape[0], counts.pop())
        n = math.prod(self.shape)
        if i.ndim != 2 or i.shape[0] == 0 or i.is_floating_point() or bool(((i < 0) | (i >= n)).any()):
            raise ValueError(
                f"positions are whole numbers from 0 to {n - 1}, shape (m,) or (B, m) per sample; got shape "
                f"{tuple(i.shape[not per_sample :])}" + (f" from {int(i.min())} to {int(i.max())}" if i.numel() else "")
            )
        self.indices = i.long()

    @property
    def solver(self) -> str:
        return "exact (diagonal)"

    def samples(self, ndim: int) -> int | None:
        return self.indices.shape[0] if self.indices.shape[0] > 1 else None

    def describe(self) -> str:
        return f"Sampling({self.indices.shape[1]} of {'x'.join(map(str, self.shape))}) [{self.solver}]"

    def _indices(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Positions for signals of ``shape`` (with batch), ``(B, ..., m)``."""
        lead = shape[: len(shape) - len(self.shape)]
        if not lead or tuple(shape[len(lead) :]) != self.shape or self.indices.shape[0] not in (1, shape[0]):
            expected = f" of {self.indices.shape[0]} samples" if self.indices.shape[0] > 1 else ""
            raise ValueError(
                f"{self!r} does not fit shape {tuple(shape)}: give batches (B, ..., *{self.shape}){expected}"
            )
        indices = self.indices.to(like.device)
        return indices.reshape(indices.shape[0], *[1] * (len(lead) - 1), -1).expand(*lead, -1)

    def forward(self, x: Tensor) -> Tensor:
        indices = self._indices(x.shape, x)
        return x.reshape(*indices.shape[:-1], -1).gather(-1, indices)

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        if not measurement_shape or measurement_shape[-1] != self.indices.shape[1]:
            raise ValueError(f"{self!r} does not fit a measurement of shape {tuple(measurement_shape)}")
        return (*measurement_shape[:-1], *self.shape)

    def measurement_ndim(self, ndim: int) -> int:
        return ndim - len(self.shape) + 1

    def eigenvalues(self, like: Tensor) -> Tensor:
        self._indices(like.shape, like)
        indices = self.indices.to(like.device)
        counts = like.new_zeros(indices.shape[0], math.prod(self.shape))
        counts = counts.scatter_add(1, indices, torch.ones_like(indices, dtype=like.dtype))
        return counts.reshape(indices.shape[0], *[1] * (like.ndim - 1 - len(self.shape)), *self.shape)

    def coefficients(self, x: Tensor) -> Tensor:
        return x

    def signal(self, c: Tensor, like_shape: Sequence[int]) -> Tensor:
        return c

    def adjoint_coefficients(self, y: Tensor) -> Tensor:
        shape = self._x_shape(y)
        indices = self._indices(shape, y)
        flat = y.new_zeros(*indices.shape[:-1], math.prod(self.shape))
        return flat.scatter_add(-1, indices, y).reshape(shape)

    def spectral_diagonal(self, f: SpectralFunction, like: Tensor) -> Tensor:
        return f(self.eigenvalues(like))
