"""The checks that users run on operators of their own."""

from __future__ import annotations

import pytest
import torch

from posteriori import operators
from posteriori.operators import Callable, OperatorCheckError, check

GOOD = [
    operators.Inpainting(torch.ones(20, 24)),
    operators.Inpainting((torch.arange(4 * 20 * 24) % 3 > 0).reshape(4, 1, 20, 24)),
    operators.GaussianBlur(3.0, 61),
    operators.Blur(operators.motion_kernel(31), "circular"),
    operators.Blur(torch.rand(3, 5, 5), "circular", per_sample=True),
    operators.Downsampling(4),
    operators.Downsampling(3, "bicubic"),
    operators.Matrix(torch.randn(3, 9)),
    Callable(lambda x: x.cumsum(1), shape=(12,)),
]


@pytest.mark.parametrize("A", GOOD, ids=repr)
def test_the_librarys_own_operators_pass_without_a_shape(A: operators.LinearOperator):
    """``po.operators.check(A)`` would complain of an operator that is right, or ask for what it can find out."""
    check(A)


def no_adjoint(y: torch.Tensor) -> torch.Tensor:
    return y.flip(1)


class Counter:
    """Adds something else every time."""

    calls = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * (1 + 1e-3 * self.calls)


BAD = {
    "linearity": Callable(lambda x: x + 1, lambda y: y, shape=(8,)),
    "dot test": Callable(lambda x: x.cumsum(1), no_adjoint, shape=(8,)),
    "batch": Callable(lambda x: x - x.mean(0, keepdim=True), lambda y: y - y.mean(0, keepdim=True), shape=(8,)),
    "linearity|same answer": Callable(Counter(), lambda y: y, shape=(8,)),
}


@pytest.mark.parametrize("name", BAD)
def test_a_broken_operator_is_named(name: str):
    """A wrong forward model would pass, and every restoration with it would be wrong without a word."""
    with pytest.raises(OperatorCheckError, match=f"'[^']*({name})"):
        check(BAD[name])


def test_a_batch_must_stay_a_batch():
    """A forward that sums over samples would be used as if it did not."""
    with pytest.raises(OperatorCheckError, match="batch"):
        check(Callable(lambda x: x.sum(0, keepdim=True), lambda y: y.expand(2, -1), shape=(8,)))
