"""Operators taken apart: where iterations are many, dense linear algebra gives the same answers, and as certified."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable as Function

import pytest
import torch
from operator_suite import F64, apply, dense, dense_function, randn
from torch import Tensor

from posteriori.operators import (
    BoundaryConvolution,
    Callable,
    GaussianBlur,
    Inpainting,
    KrylovOperator,
    MultiCoilMRI,
    PaddedConvolution,
    Radon,
    Weighting,
    birdcage_maps,
    cartesian_mask,
    motion_kernel,
    per_sample,
    stack,
)

MASK = (randn(9, 8, seed=5) > 0).double()
FEW = randn(7, 30, seed=6)

#: Maker and shape of a signal: all entries mixed, channels treated alike, fewer measurements than entries, one kernel
#: per sample, real images of complex coils.
OPERATORS: dict[str, tuple[Function[[], KrylovOperator], tuple[int, ...]]] = {
    "motion blur of colours": (lambda: PaddedConvolution(motion_kernel(5, 0.5, 0).double()), (3, 9, 8)),
    "few projections": (lambda: Radon(torch.tensor([0.0, 50.0]), (9, 8)), (2, 9, 8)),
    "many projections": (lambda: Radon(torch.arange(9) * 20.0, (9, 8)), (1, 9, 8)),
    "coils": (lambda: MultiCoilMRI(cartesian_mask((8, 9), 2), birdcage_maps(3, (8, 9)), real=True), (1, 8, 9)),
    "function": (lambda: Callable(lambda x: x @ FEW.to(x).T, shape=(30,)), (30,)),
    "kernel per sample": (lambda: BoundaryConvolution(randn(2, 3, seed=7), per_sample=True), (3, 20)),
    "composition": (lambda: Inpainting(MASK) @ GaussianBlur(1.0, 5), (3, 9, 8)),
    "stack": (lambda: stack([Inpainting(MASK), GaussianBlur(1.0, 5)], [0.1, 0.3], shape=(3, 9, 8)), (3, 9, 8)),
}


@pytest.fixture(params=OPERATORS)
def case(request: pytest.FixtureRequest) -> tuple[Function[[], KrylovOperator], tuple[int, ...]]:
    return OPERATORS[request.param]


def test_hard_solves_are_exact(case: tuple[Function[[], KrylovOperator], tuple[int, ...]]) -> None:
    """The pivot of a precise measurement at high noise would be what 2,000 iterations leave, or its bound would lie
    below its error; or an easy sample beside hard ones would be solved by their method."""
    make, shape = case
    A = make()
    a, b = torch.tensor([1e-6, 0.5], dtype=F64), torch.tensor([6400.0, 0.25], dtype=F64)
    x, y = randn(2, *shape), A(randn(2, *shape, seed=1))
    found = A.solve(a, b, a.reshape(-1, *[1] * len(shape)) * 80 * x, per_sample(b, y) * y, unit=a * b)
    assert bool(found.converged.all())
    assert found.iterations <= 40, found.iterations
    matrix = dense(A, shape, 2)
    n = matrix.shape[2]
    system = a[:, None, None] * torch.eye(n, dtype=F64) + b[:, None, None] * matrix.mT @ matrix
    rhs = a[:, None] * 80 * x.flatten(1) + b[:, None] * apply(matrix.mT, y)
    e = found.x.flatten(1) - torch.linalg.solve(system, rhs.unsqueeze(2)).squeeze(2)
    whitened = (apply(system, e) * e).sum(1).clamp_min(0).div(a * b * n).sqrt()
    assert bool((whitened <= found.bound + 1e-5).all()), (whitened, found.bound)  # rounding of the dense solve
    alone = make_alone(make, 1).solve(0.5, 0.25, 0.5 * 80 * x[1:], 0.25 * y[1:], unit=0.125)
    torch.testing.assert_close(found.x[1:], alone.x, rtol=1e-9, atol=1e-9)


def make_alone(make: Function[[], KrylovOperator], sample: int) -> KrylovOperator:
    A = make()
    if isinstance(A, BoundaryConvolution) and A.samples(3):
        return BoundaryConvolution(A.kernel[sample : sample + 1], per_sample=True)
    return A


def test_hard_functions_are_exact(case: tuple[Function[[], KrylovOperator], tuple[int, ...]]) -> None:
    """Square roots of covariances at high noise would stay as far off as a small Krylov space leaves them, or the
    uncertainty channel would be that of other pixels."""
    make, shape = case
    A, matrix = make(), dense(make(), shape, 2)
    A.krylov_dimension = 4
    v = randn(2, *shape)
    scale = torch.tensor([1e-5, 1e-3], dtype=F64)

    def f(lam: Tensor) -> Tensor:
        return torch.rsqrt(per_sample(scale, lam.new_empty(2, *lam.shape[1:])) + lam)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, diagonal = A.spectral(f, v), A.spectral_diagonal(f, v)
    exact = dense_function(matrix, lambda lam: torch.rsqrt(scale[:, None] + lam))
    expected = apply(exact, v)
    assert float((found.flatten(1) - expected).norm() / expected.norm()) < 1e-6
    assert float(A.evaluate(f, v).error.max()) < 1e-9
    expected = exact.diagonal(dim1=1, dim2=2)
    assert float((diagonal.expand(v.shape).flatten(1) - expected).norm() / expected.norm()) < 1e-6


def test_gradients_through_dense_solves() -> None:
    """Methods that differentiate through a hard solve would descend along something else: against finite
    differences."""
    A = PaddedConvolution(motion_kernel(5, 0.5, 0).double())
    x, y = (randn(2, 1, 6, 5, seed=s).requires_grad_() for s in (0, 1))
    torch.autograd.gradcheck(lambda x, y: A.gram_solve(1e-4, 4.0e2, x, y), (x, y), fast_mode=True, atol=1e-3)
    A.krylov_dimension = 4
    torch.autograd.gradcheck(lambda x: A.spectral(lambda lam: torch.rsqrt(lam + 1e-3), x), (x,), fast_mode=True)


def test_only_hard_solves_of_small_operators_are_dense() -> None:
    """Every user of one easy solve would wait for an eigendecomposition, or a large signal would fill the memory."""
    A = PaddedConvolution(motion_kernel(5, 0.5, 0).double())
    x = randn(1, 1, 12, 12)
    A.solve(0.05**2, 1.0, x, unit=0.05**2)
    assert not [k for k in A._known if k[0] == "decomposition"]
    A.solve(1e-6, 6400.0, 1e-2 * x, unit=6400e-6)
    assert [k for k in A._known if k[0] == "decomposition"]
    large = PaddedConvolution(motion_kernel(5, 0.5, 0).double())
    large.dense_entries, large.max_iterations = 143, 10
    assert not bool(large.solve(1e-6, 6400.0, 1e-2 * x, unit=6400e-6).converged.all())
    large.dense_entries = 144
    assert bool(large.solve(1e-6, 6400.0, 1e-2 * x, unit=6400e-6).converged.all())


def test_kernels_being_fitted_are_not_remembered() -> None:
    """After a step of training the operator would go on with the kernel it had before."""
    kernel = motion_kernel(5, 0.5, 0).double().requires_grad_()
    A = PaddedConvolution(kernel)
    v, f = randn(1, 1, 8, 8), lambda lam: torch.rsqrt(lam + 0.5)
    A.krylov_dimension, A.spectral_tolerance = 60, 1e-20
    assert A._dimension(v) < 60
    assert A.evaluate(f, v).dimension == 60  # not given up early for nothing
    A.spectral_tolerance = 1e-3
    A.spectral(f, v)
    A.solve(1e-4, 4.0, v, unit=4e-4)
    with torch.no_grad():
        kernel.mul_(2.0)
    expected = apply(dense_function(dense(A, (1, 8, 8), 1).detach(), f), v)
    assert float((A.spectral(f, v).detach().flatten(1) - expected).norm() / expected.norm()) < 1e-3


def test_measurements_decide_where_they_are_fewer() -> None:
    """An image of a million entries with a few hundred measurements would count as too large."""
    matrix = randn(20, 3 * 40 * 50) / 50
    A = Callable(lambda x: x.flatten(1) @ matrix.to(x).T, shape=(3, 40, 50), dense_entries=20)
    x, y = randn(1, 3, 40, 50, seed=1), randn(1, 20, seed=2)
    found = A.solve(1e-6, 6400.0, 8e-5 * x, 6400.0 * y, unit=6400e-6)
    # z = 80 x + M^T w
    system = 1e-6 * torch.eye(20, dtype=F64) + 6400 * matrix @ matrix.T
    w = torch.linalg.solve(system, 6400 * (y - 80 * x.flatten(1) @ matrix.T).T).T
    expected = 80 * x.flatten(1) + w @ matrix
    assert bool(found.converged.all())
    assert found.iterations <= 10
    assert float((found.x.flatten(1) - expected).norm() / expected.norm()) < 1e-7


def test_surrogate_of_a_function() -> None:
    """A surrogate that saves nothing, or changes the answer; and one without an exact solve would recurse."""
    weights = torch.linspace(0.2, 1, 64, dtype=F64)
    blur = GaussianBlur(0.4, 3, dims=1)
    options = {"shape": (64,), "dense_entries": 0}
    plain = Callable(lambda x: weights.to(x) * blur(x), **options)  # type: ignore[arg-type]
    helped = Callable(lambda x: weights.to(x) * blur(x), surrogate=Weighting(weights), **options)  # type: ignore[arg-type]
    x = randn(2, 64)
    slow, fast = (A.solve(1e-3, 1.0, x, unit=1e-3) for A in (plain, helped))
    assert fast.iterations < 0.7 * slow.iterations, (fast.iterations, slow.iterations)
    assert float((fast.x - slow.x).norm() / slow.x.norm()) < 1e-2
    with pytest.raises(ValueError, match="surrogate has an exact solve"):
        Callable(lambda x: x, shape=(64,), surrogate=plain)


def test_size_of_a_measurement_alone() -> None:
    """Channels would be counted, and colour images be too large where grey ones are not."""
    A = PaddedConvolution(motion_kernel(5, 0.5, 0).double())
    for channels in (1, 3):
        assert A._dense_size(torch.zeros(1, channels, 60, 60)) == 3600
    assert Radon(torch.arange(2) * 90.0, 60)._dense_size(torch.zeros(1, 3, 60, 60)) == 2 * math.ceil(60 * 2**0.5 + 1)
