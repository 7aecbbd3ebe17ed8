"""Operators of other libraries as ours, and ours as theirs. Each library is imported by the function that needs it."""

from posteriori.adapters.any import as_operator
from posteriori.adapters.arrays import from_pylops, from_scipy, to_pylops, to_scipy
from posteriori.adapters.deepinv import from_deepinv, to_deepinv

__all__ = ["as_operator", "from_deepinv", "from_pylops", "from_scipy", "to_deepinv", "to_pylops", "to_scipy"]
