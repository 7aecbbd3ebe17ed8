r"""Any matrix that fits in memory: ``M = U diag(s) V^T`` by one dense SVD."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from posteriori.operators.base import SpectralFunction, SpectralOperator, full_precision
from posteriori.operators.kronecker import AxisFactors

__all__ = ["Matrix"]


class Matrix(SpectralOperator):
    """``y = M x`` with ``x`` flattened.

    Args:
        matrix: ``(m, n)``, real and finite.
        shape: shape of a signal (its product is ``n``); ``(n,)`` when left out.

    Raises:
        ValueError: when the matrix is not two-dimensional, not finite, or does not fit ``shape``.
    """

    def __init__(self, matrix: Tensor, shape: Sequence[int] | None = None) -> None:
        m = torch.as_tensor(matrix)
        if m.ndim != 2 or not bool(torch.isfinite(m).all()):
            raise ValueError(f"a matrix operator needs a finite (m, n) matrix, got shape {tuple(m.shape)}")
        self.matrix = m
        self.shape = tuple(shape) if shape is not None else (m.shape[1],)
        if math.prod(self.shape) != m.shape[1]:
            raise ValueError(f"a matrix with {m.shape[1]} columns does not act on signals of shape {self.shape}")

    @property
    def solver(self) -> str:
        return "exact (svd)"

    @cached_property
    def _svd(self) -> AxisFactors:
        with torch.inference_mode(False):  # what is kept must serve training too
            return AxisFactors.of(self.matrix)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix.to(x).T

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        return self.shape

    def measurement_ndim(self, ndim: int) -> int:
        return 2

    # Coefficients are kept in float64: a sum over n entries in float32 rounds what the null space holds at
    # sigma_t = 80 into the measured directions at a visible size.
    def eigenvalues(self, like: Tensor) -> Tensor:
        lam = self._svd.s.to(like.device) ** 2
        return lam.reshape(1, *self.shape)

    def coefficients(self, x: Tensor) -> Tensor:
        return (x.flatten(1).double() @ self._svd.v.to(x.device)).reshape(x.shape)

    def signal(self, c: Tensor, like_shape: Sequence[int]) -> Tensor:
        return (c.flatten(1).double() @ self._svd.v.to(c.device).T).reshape(*like_shape)

    def adjoint_coefficients(self, y: Tensor) -> Tensor:
        return (y.flatten(1).double() @ self._svd.us.to(y.device)).reshape(y.shape[0], *self.shape)

    @full_precision
    def spectral_diagonal(self, f: SpectralFunction, like: Tensor) -> Tensor:
        values = f(self.eigenvalues(like)).flatten(1)
        return (values @ (self._svd.v.to(like.device) ** 2).T).reshape(-1, *self.shape).to(like.dtype)
