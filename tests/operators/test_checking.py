"""The checks that users run on operators of their own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from posteriori import operators
from posteriori.operators import Callable, OperatorCheckError, check
from posteriori.operators.profiling import peak_memory, profile

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


# -- figures ----------------------------------------------------------------------------------------------------------

PROFILED = {
    "diagonal": (operators.Inpainting((torch.arange(60) % 3 > 0).reshape(1, 6, 10)), (2, 6, 10)),
    "fft": (operators.Blur(torch.rand(3, 3), "circular"), (2, 6, 10)),
    "kronecker": (operators.Downsampling(2), (2, 6, 10)),
    "matrix": (operators.Matrix(torch.randn(4, 9, generator=torch.Generator().manual_seed(0))), (9,)),
    "functions": (Callable(lambda x: x[..., 1:] - x[..., :-1], shape=(2, 12)), (2, 12)),
    "per sample": (operators.Inpainting((torch.arange(3 * 24) % 5 > 0).reshape(3, 1, 4, 6)), (1, 4, 6)),
}


@pytest.mark.parametrize("name", PROFILED)
def test_the_spectrum_is_numpys(name: str) -> None:
    """A user would be told of a rank or condition that is not his operator's (dense SVD of the first sample, 1e-4)."""
    A, shape = PROFILED[name]
    n = math.prod(shape)
    samples = A.samples(1 + len(shape)) or 1
    columns = [A(e.reshape(1, *shape).expand(samples, *shape))[0].flatten() for e in torch.eye(n).double()]
    s = np.linalg.svd(torch.stack(columns, 1).numpy(), compute_uv=False)
    kept = s[s > 1e-5 * s.max()]
    found = profile(A, shape).spectrum
    np.testing.assert_allclose([found.largest, found.smallest], [kept.max(), kept.min()], rtol=1e-4)
    assert found.rank == len(kept)


def test_lanczos_bounds_the_spectrum() -> None:
    """For large iterative operators: a largest singular value above the true one, or a smallest one below."""
    weights = torch.linspace(0.5, 3.0, 1000).double()
    weights[::2] = 0
    A = Callable(lambda x: weights.to(x) * x, shape=(1000,))
    found = profile(A, (1000,)).spectrum
    assert found.rank is None
    assert 2.99 < found.largest <= 3.0 + 1e-9
    assert 0.5 - 1e-3 <= found.smallest < 0.52


class SummedFirst(operators.Matrix):
    """Both terms summed in signal space and solved in float32: what the protocol warns of."""

    def gram_solve(self, a, b, x=None, y=None, *, unit=1.0):  # type: ignore[no-untyped-def]
        rhs = x + self.adjoint(y)
        m = self.matrix.to(rhs)
        system = b * m.T @ m + a * torch.eye(m.shape[1], dtype=m.dtype)
        return torch.linalg.solve(system, rhs.flatten(1).T).T.reshape(rhs.shape)


def test_a_solve_that_loses_the_measurement_is_seen() -> None:
    """The whole point of the figure: a solve that is right in float64 and useless in float32 would pass."""
    matrix = torch.randn(40, 80, generator=torch.Generator().manual_seed(0)) / 9
    good = max(e.error for e in profile(operators.Matrix(matrix), (80,)).errors)
    bad = max(e.error for e in profile(SummedFirst(matrix), (80,)).errors)
    assert good < 1e-2 < 0.1 < bad


def test_errors_of_iterative_solves_stay_within_their_bounds() -> None:
    """Small signals, so that the errors are measured against a dense SVD; 1e-3 is for rounding to float32."""
    A = Callable(lambda x: x.cumsum(-1) / 9, shape=(3, 20))
    errors = profile(A, (3, 20)).errors
    assert len(errors) == 20
    for e in errors:
        assert e.measured
        assert e.bound is not None
        assert e.error <= e.bound + 1e-3


def test_peak_memory_is_what_is_alive() -> None:
    """Tensors that are gone, or were there before, would be counted (8 MiB of float32 each)."""
    x = torch.ones(2 << 20)

    def chain() -> torch.Tensor:
        y = x + 1
        y = y * 2  # two alive here
        return y[: 1 << 20]  # a view

    assert peak_memory(chain) == pytest.approx(16)
    assert peak_memory(lambda: x[::2]) == 0


def test_operators_kept_as_sparse_matrices_are_measured() -> None:
    """A sparse matrix has no storage to count, and `posteriori check` broke on every projector."""
    for A, shape in (
        (operators.Radon([0.0, 40.0, 90.0], 32), (1, 32, 32)),
        (operators.SparseMatrix(torch.eye(900).to_sparse()), (900,)),
    ):
        found = profile(A, shape, seconds=0.2)
        n = math.prod(shape)
        assert 4 * n / 2**20 <= found.memory <= 200 * 8 * n / 2**20  # at least its answer, at most some hundred vectors
