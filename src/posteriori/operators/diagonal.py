r"""Elementwise operators: ``A = diag(w)``, so ``V = I`` and ``lam = w^2``.

Masks (pixel-wise, box, free-form), denoising (``w = 1``), weighting, and the operator that measures nothing
(``w = 0``), with which a posterior sampler is the unconditional sampler.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posteriori.operators.base import SpectralFunction, SpectralOperator

__all__ = ["Identity", "Inpainting", "Nothing", "Weighting"]


class Weighting(SpectralOperator):
    """``A x = w * x`` elementwise; entries with weight 0 are not measured.

    Args:
        weights: tensor aligned with the last dimensions of a signal batch ``(B, *signal)``, as in NumPy
            broadcasting. With as many dimensions as the batch, its first dimension is the batch: one set of weights
            per sample.

    Raises:
        ValueError: when a weight is negative or not finite.
    """

    def __init__(self, weights: Tensor) -> None:
        w = torch.as_tensor(weights)
        w = w if w.is_floating_point() else w.float()
        if not bool(torch.isfinite(w).all()) or bool((w < 0).any()):
            raise ValueError("weights must be finite and non-negative")
        self.weights = w

    @property
    def solver(self) -> str:
        return "exact (diagonal)"

    def samples(self, ndim: int) -> int | None:
        return self.weights.shape[0] if self.weights.ndim == ndim and self.weights.shape[0] > 1 else None

    def _weights(self, like: Tensor) -> Tensor:
        w = self.weights.to(like)
        if w.ndim > like.ndim or (w.ndim == like.ndim and w.shape[0] not in (1, like.shape[0])):
            raise ValueError(
                f"weights (or mask) of shape {tuple(w.shape)} do not fit a batch of shape {tuple(like.shape)}: give "
                "the signal's shape, or one set per sample with the batch first"
            )
        # torch.broadcast_shapes says the same in ten times the time of everything else here
        if any(m not in (1, n) for m, n in zip(reversed(w.shape), reversed(like.shape), strict=False)):
            raise ValueError(f"weights (or mask) of shape {tuple(w.shape)} do not fit signals {tuple(like.shape[1:])}")
        return w.reshape(*[1] * (like.ndim - w.ndim), *w.shape)

    def forward(self, x: Tensor) -> Tensor:
        return self._weights(x) * x

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(measurement_shape)

    def eigenvalues(self, like: Tensor) -> Tensor:
        return self._weights(like) ** 2

    def coefficients(self, x: Tensor) -> Tensor:
        return x

    def signal(self, c: Tensor, like_shape: Sequence[int]) -> Tensor:
        return c

    def adjoint_coefficients(self, y: Tensor) -> Tensor:
        return self._weights(y) * y

    def spectral_diagonal(self, f: SpectralFunction, like: Tensor) -> Tensor:
        return f(self.eigenvalues(like))

    def observed(self, y: Tensor) -> Tensor | None:
        return (self._weights(y) > 0).to(y.dtype)


class Inpainting(Weighting):
    """Keeps the entries where ``mask`` is 1 and drops those where it is 0.

    Args:
        mask: 1 (or True) where measured, 0 where missing; shapes as in :class:`Weighting`, e.g. ``(H, W)``,
            ``(C, H, W)``, or ``(B, 1, H, W)`` for one mask per sample. (Mask *files* of the command line are the
            other way round, white = missing.)

    Raises:
        ValueError: when the mask holds other values.
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask)
        if not bool(((self.weights == 0) | (self.weights == 1)).all()):
            raise ValueError("an inpainting mask holds 1 (measured) and 0 (missing) only; for weights use Weighting")


class Identity(Weighting):
    """``A = I``: denoising."""

    def __init__(self) -> None:
        super().__init__(torch.ones(()))


class Nothing(Weighting):
    """``A = 0``: no measurement. Posterior sampling with it is unconditional sampling."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(()))
