r"""Operators on numpy vectors: scipy and pylops.

    (B, *shape) tensor  ->  (n, B) array  ->  A X, (m, B) array  ->  (B, *measurement) tensor

The derivative of ``A x`` is ``A^T``, and that of ``A^T y`` is ``A``: gradients of any order pass, though the product
itself leaves PyTorch. Complex operators act on real signals; real and imaginary part of a measurement are then its last
dimension, and ``A^T`` is the real part of ``A^H``.
"""

from __future__ import annotations

import math
from collections.abc import Callable as Function
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posteriori.operators import Callable, LinearOperator, Matrix

__all__ = ["from_pylops", "from_scipy", "to_pylops", "to_scipy"]

#: Matrices up to this size (rows and columns) are made dense, which makes their solves exact.
DENSE = 1024

_Product = Function[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]


class _Numpy(torch.autograd.Function):
    """``apply`` on ``(B, n)`` numpy rows; its derivative is ``transpose``, likewise on rows."""

    @staticmethod
    def forward(x: Tensor, apply: _Product, transpose: _Product) -> Tensor:
        result = apply(x.detach().cpu().numpy())
        return torch.from_numpy(np.ascontiguousarray(result)).to(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.products = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        apply, transpose = ctx.products
        return _Numpy.apply(gradient, transpose, apply), None, None


def _operator(
    op: Any, shape: Sequence[int] | None, dims: Sequence[int], measurement: Sequence[int], **options: Any
) -> LinearOperator:
    """An iterative operator around ``op @ X`` and ``op.H @ Y`` on ``(n, B)`` arrays."""
    m, n = op.shape
    signal = tuple(shape) if shape is not None else tuple(int(d) for d in dims)
    if math.prod(signal) != n:
        raise ValueError(f"an operator with {n} columns does not act on signals of shape {signal}")
    adjoint, is_complex = op.conj().T if _is_matrix(op) else op.H, np.issubdtype(op.dtype, np.complexfloating)

    def forward_rows(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        y = np.asarray(op @ x.T).T
        return np.stack([y.real, y.imag], -1).reshape(len(x), -1) if is_complex else y

    def adjoint_rows(y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if is_complex:
            pairs = y.reshape(len(y), m, 2)
            return np.asarray(adjoint @ (pairs[..., 0] + 1j * pairs[..., 1]).T).T.real
        return np.asarray(adjoint @ y.T).T

    output = (*measurement, 2) if is_complex else tuple(measurement)

    def forward(x: Tensor) -> Tensor:
        if x.shape[1:].numel() != n:
            raise ValueError(f"the operator acts on signals of shape {signal}, got {tuple(x.shape[1:])}")
        return _Numpy.apply(x.flatten(1), forward_rows, adjoint_rows).reshape(x.shape[0], *output)

    def transpose(y: Tensor) -> Tensor:
        return _Numpy.apply(y.flatten(1), adjoint_rows, forward_rows).reshape(y.shape[0], *signal)

    return Callable(forward, transpose, shape=signal, **options)


def _is_matrix(op: Any) -> bool:
    return isinstance(op, np.ndarray) or hasattr(op, "toarray")


def from_scipy(op: Any, shape: Sequence[int] | None = None, **options: Any) -> LinearOperator:
    """An operator from a scipy ``LinearOperator``, a sparse matrix or a numpy array.

    Args:
        op: ``(m, n)``, real or complex; a ``LinearOperator`` needs ``rmatvec``.
        shape: shape of a signal without the batch, its product ``n``; ``(n,)`` when left out.
        **options: of :class:`posteriori.operators.Callable` (tolerance, max_iterations, ...), for those that are not
            solved exactly.

    Returns:
        A :class:`~posteriori.operators.Matrix`, solved exactly, for real matrices of up to 1024 rows and columns, else
        an operator solved by conjugate gradients. Measurements have shape ``(m,)``, complex ones ``(m, 2)``.

    Raises:
        ValueError: when ``shape`` does not fit.
    """
    m, n = op.shape
    if _is_matrix(op) and max(m, n) <= DENSE and not np.iscomplexobj(op):
        array = op if isinstance(op, np.ndarray) else op.toarray()
        return Matrix(torch.from_numpy(np.array(array, dtype=np.float64)), shape)
    return _operator(op, shape, (n,), (m,), **options)


def from_pylops(op: Any, shape: Sequence[int] | None = None, **options: Any) -> LinearOperator:
    """An operator from a pylops ``LinearOperator``.

    Args:
        op: the operator, real or complex.
        shape: shape of a signal without the batch, its product the operator's columns; ``op.dims`` when left out.
        **options: of :class:`posteriori.operators.Callable`.

    Returns:
        An operator solved by conjugate gradients; measurements have shape ``op.dimsd``, complex ones with real and
        imaginary part as one more dimension.

    Raises:
        ValueError: when ``shape`` does not fit.
    """
    return _operator(op, shape, op.dims, tuple(int(d) for d in op.dimsd), **options)


def _sizes(A: LinearOperator, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the measurement of one signal."""
    if A.samples(1 + len(shape)) is not None:
        raise ValueError(f"{A!r} has parameters for every sample of a batch; a matrix has one set: give one operator")
    return tuple(A(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:])


def to_scipy(A: LinearOperator, shape: Sequence[int]) -> Any:
    """A float64 ``scipy.sparse.linalg.LinearOperator`` of ``A`` on flattened signals.

    Args:
        A: an operator without parameters per sample.
        shape: shape of a signal without the batch.

    Raises:
        ValueError: when ``A`` has parameters per sample, or ``shape`` does not fit it.
    """
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

    sizes = _sizes(A, shape)

    def product(function: Function[[Tensor], Tensor], taken: Sequence[int]) -> _Product:
        """``function`` of the columns of an ``(n, B)`` array, or of an ``(n,)`` vector."""

        def apply(v: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            rows = torch.from_numpy(np.array(np.atleast_2d(v.T), dtype=np.float64)).reshape(-1, *taken)
            with torch.no_grad():
                result = function(rows).flatten(1).numpy().T
            return result if v.ndim == 2 else result[:, 0]

        return apply

    forward, adjoint = product(A, shape), product(A.adjoint, sizes)
    return ScipyOperator(
        shape=(math.prod(sizes), math.prod(shape)), dtype=np.float64,
        matvec=forward, rmatvec=adjoint, matmat=forward, rmatmat=adjoint,
    )  # fmt: skip


def to_pylops(A: LinearOperator, shape: Sequence[int]) -> Any:
    """A float64 ``pylops.LinearOperator`` of ``A``, with ``dims`` and ``dimsd``; arguments as in :func:`to_scipy`."""
    import pylops

    return pylops.LinearOperator(Op=to_scipy(A, shape), dims=tuple(shape), dimsd=_sizes(A, shape))
