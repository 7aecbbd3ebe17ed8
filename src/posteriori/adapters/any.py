"""Whatever describes a linear map, recognised without importing the library it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from posteriori.adapters.arrays import from_pylops, from_scipy
from posteriori.adapters.deepinv import from_deepinv
from posteriori.operators import LinearOperator, Matrix

__all__ = ["as_operator"]


def as_operator(thing: Any, shape: Sequence[int] | None = None) -> LinearOperator | None:
    """An operator of ours from one of ours, a matrix (torch, numpy, scipy.sparse), or an operator of scipy, pylops or
    deepinv; ``None`` when it is none of them.

    Args:
        thing: what to convert.
        shape: shape of a signal without the batch, where ``thing`` does not know it.

    Raises:
        ValueError: when it is one of them but does not fit ``shape``.
    """
    if isinstance(thing, LinearOperator):
        return thing
    if isinstance(thing, Tensor):
        return Matrix(thing, shape)
    libraries = [c.__module__.partition(".")[0] for c in type(thing).__mro__]
    for library, convert in (("pylops", from_pylops), ("scipy", from_scipy), ("numpy", from_scipy)):
        if library in libraries:
            return convert(thing, shape)
    if "deepinv" in libraries:
        if shape is None:
            raise ValueError("a deepinv physics does not tell the shape of its images: give it, such as (3, 64, 64)")
        return from_deepinv(thing, shape)
    return None
