r"""Sparse matrices: ``A`` and its transpose as compressed rows, so that the adjoint is matched by construction.

A product with compressed rows is fast, one with compressed columns is not; both ``M`` and ``M^T`` are therefore kept,
and each is the derivative of the other.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from posteriori.operators.base import full_precision
from posteriori.operators.dense import Matrix
from posteriori.operators.krylov import KrylovOperator

__all__ = ["CompressedRows", "SparseMatrix"]


class CompressedRows:
    """A sparse matrix and its transpose, both as compressed rows; casts to other precisions and devices are kept.

    Args:
        rows, columns: positions of the entries; those given twice are added.
        values: the entries, real.
        size: ``(m, n)``.
    """

    def __init__(self, rows: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> None:
        with torch.inference_mode(False), warnings.catch_warnings():  # what is kept must serve training too
            warnings.filterwarnings("ignore", "Sparse", UserWarning)  # PyTorch calls the layout a beta
            place, of = torch.unique(rows * size[1] + columns, return_inverse=True)
            values = values.new_zeros(len(place)).index_add_(0, of, values)
            rows, columns = place // size[1], place % size[1]
            order = (columns * size[0] + rows).argsort()
            pair = (
                _compressed(rows, columns, values, size),
                _compressed(columns[order], rows[order], values[order], (size[1], size[0])),
            )
        self._pairs = {(values.dtype, values.device): pair}

    def _pair(self, like: Tensor) -> tuple[Tensor, Tensor]:
        key = (like.dtype, like.device)
        if key not in self._pairs:
            with torch.inference_mode(False):
                first, second = next(iter(self._pairs.values()))
                self._pairs[key] = (
                    first.to(device=like.device, dtype=like.dtype), second.to(device=like.device, dtype=like.dtype)
                )  # fmt: skip
        return self._pairs[key]

    def product(self, x: Tensor, transposed: bool = False) -> Tensor:
        """``M x`` (or ``M^T x``) along the last dimension: ``(..., n)`` to ``(..., m)``; differentiable in ``x``."""
        result: Tensor = _Product.apply(x, self, transposed)
        return result

    def _product(self, x: Tensor, transposed: bool) -> Tensor:
        matrix = self._pair(x)[transposed]
        columns = x.reshape(-1, x.shape[-1])
        if columns.shape[0] == 1:
            return (matrix @ columns[0]).reshape(*x.shape[:-1], matrix.shape[0])
        return (matrix @ columns.T.contiguous()).T.reshape(*x.shape[:-1], matrix.shape[0])

    def to_dense(self) -> Tensor:
        """``(m, n)``, in the precision it was made in."""
        return next(iter(self._pairs.values()))[0].to_dense()


def _compressed(rows: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """Compressed rows of sorted entries, each place once."""
    # 32-bit positions where they fit: half the memory, and what the CPU's library computes with anyway
    index = torch.int32 if max(len(values), *size) < 2**31 else torch.int64
    ends = torch.bincount(rows, minlength=size[0]).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends]).to(index)
    return torch.sparse_csr_tensor(starts, columns.to(index), values, size, check_invariants=False)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, matrix: CompressedRows, transposed: bool) -> Tensor:
        return matrix._product(x, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.matrix, ctx.transposed = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.matrix.product(gradient, not ctx.transposed), None, None


class SparseMatrix(KrylovOperator):
    """``y = M x`` with ``M`` sparse and the last dimensions of ``x`` flattened; those between batch and signal stay.
    Solved by conjugate gradients; a matrix that fits in memory densely has exact solves: :meth:`dense`.

    Args:
        matrix: ``(m, n)``, real and finite: a SciPy sparse matrix or array of any format, or a PyTorch sparse tensor of
            any layout.
        shape: shape of a signal (its product is ``n``); ``(n,)`` when left out.
        output: shape of a measurement (its product is ``m``); ``(m,)`` when left out.

    Raises:
        ValueError: when the matrix is not sparse, real, finite and two-dimensional, or does not fit ``shape`` or
            ``output``.
    """

    def __init__(self, matrix: Any, shape: Sequence[int] | None = None, output: Sequence[int] | None = None) -> None:
        if not (hasattr(matrix, "tocoo") or (isinstance(matrix, Tensor) and matrix.layout != torch.strided)):
            raise ValueError(
                f"a sparse matrix is a SciPy sparse matrix or PyTorch sparse tensor, got {type(matrix).__name__}: "
                "for dense matrices use Matrix"
            )
        if len(matrix.shape) != 2:
            raise ValueError(f"a sparse matrix is two-dimensional, got shape {tuple(matrix.shape)}")
        if isinstance(matrix, Tensor):
            coo = matrix.detach().to_sparse_coo().coalesce()
            (rows, columns), values = coo.indices(), coo.values()
        else:
            coo = matrix.tocoo()
            rows, columns = (torch.as_tensor(i, dtype=torch.int64) for i in (coo.row, coo.col))
            values = torch.as_tensor(coo.data)
        if values.is_complex() or not bool(torch.isfinite(values).all()):
            raise ValueError("a sparse matrix must be real and finite: stack real and imaginary parts of a complex one")
        m, n = (int(i) for i in matrix.shape)
        self.shape = tuple(shape) if shape is not None else (n,)
        self.output = tuple(output) if output is not None else (m,)
        if (math.prod(self.output), math.prod(self.shape)) != (m, n):
            raise ValueError(
                f"a matrix of shape {(m, n)} does not take signals of shape {self.shape} to measurements of shape "
                f"{self.output}"
            )
        values = values if values.is_floating_point() else values.double()
        self._matrix = CompressedRows(rows, columns, values, (m, n))

    def _apply(self, v: Tensor, shape: tuple[int, ...], output: tuple[int, ...], transposed: bool) -> Tensor:
        lead = v.ndim - len(shape)
        if lead < 1 or tuple(v.shape[lead:]) != shape:
            raise ValueError(
                f"this operator takes batches (B, ..., {', '.join(map(str, shape))}), got {tuple(v.shape)}"
            )
        return self._matrix.product(v.flatten(lead), transposed).reshape(*v.shape[:lead], *output)

    def core(self, ndim: int) -> int:
        return len(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        return self._apply(x, self.shape, self.output, transposed=False)

    @full_precision
    def adjoint(self, y: Tensor) -> Tensor:
        return self._apply(y, self.output, self.shape, transposed=True)

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        return (*measurement_shape[: len(measurement_shape) - len(self.output)], *self.shape)

    def measurement_ndim(self, ndim: int) -> int:
        return ndim - len(self.shape) + len(self.output)

    def dense(self) -> Matrix:
        """The same matrix with exact solves, for signals of its shape alone; measurements are flat."""
        return Matrix(self._matrix.to_dense(), self.shape)
