"""Conjugate gradients: the bound they return holds, and they say when it was not reached."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from posteriori.operators import Callable, Matrix, PaddedConvolution, Radon, Weighting, motion_kernel
from posteriori.pivot import measure, pivot
from posteriori.posterior import ExactPosterior
from posteriori.priors import Gaussian, dense_matrix
from posteriori.sample import sample
from posteriori.solve import conjugate_gradients

F64 = torch.float64


def spectrum(n: int, condition: float, seed: int = 0) -> Tensor:
    """A random matrix with singular values spread evenly (in their logarithm) over ``condition``."""
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64))
    v, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64))
    return u @ torch.diag(torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n, dtype=F64)) @ v.T


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64).reshape(-1, 1)


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-6])
def test_bound_holds(condition: float, tolerance: float) -> None:
    """A solve would claim an accuracy that it does not have: against dense solves, over noise and conditioning."""
    n = 40
    A = spectrum(n, condition)
    rhs_seed = torch.Generator().manual_seed(1)
    for sigma_t, sigma_y in [(0.1, 0.5), (1.0, 0.05), (20.0, 0.05), (80.0, 0.05)]:
        a, b, unit = column(sigma_y**2), column(sigma_t**2), column(sigma_t**2 * sigma_y**2)
        rhs = torch.randn(3, n, generator=rhs_seed, dtype=F64) * column(1, 10, 100)
        solution = conjugate_gradients(
            lambda v: v @ (A.T @ A), rhs, a, b, unit=unit, tolerance=tolerance, max_iterations=4000
        )
        system = a * torch.eye(n, dtype=F64) + b * A.T @ A
        e = solution.x - torch.linalg.solve(system, rhs.T).T
        whitened = ((e @ system * e).sum(1) / unit.flatten() / n).sqrt()
        assert solution.bound.shape == (3,)
        assert bool((whitened <= solution.bound * (1 + 1e-9) + 1e-9).all())
        assert bool((solution.converged == (solution.bound <= 2 * tolerance)).all())
        assert bool(solution.converged.all())


def test_bound_is_not_idle() -> None:
    """A bound far above the error spends iterations for nothing: in a system dominated by ``a`` it is tight."""
    A = spectrum(30, 10.0)
    rhs = torch.randn(1, 30, generator=torch.Generator().manual_seed(0), dtype=F64)
    a, b = column(1.0), column(1e-3)
    solution = conjugate_gradients(lambda v: v @ (A.T @ A), rhs, a, b, unit=column(1.0), tolerance=1e-2)
    solution = conjugate_gradients(
        lambda v: v @ (A.T @ A), rhs, a, b, unit=column(1.0), tolerance=0.0, max_iterations=solution.iterations
    )
    system = a * torch.eye(30, dtype=F64) + b * A.T @ A
    e = solution.x - torch.linalg.solve(system, rhs.T).T
    whitened = float((e @ system * e).sum().sqrt() / 30**0.5)
    assert whitened <= float(solution.bound) <= 1.01 * whitened


def test_every_sample_has_its_own_stop() -> None:
    """An easy sample solved beside a hard one would change with its neighbour, or stop the batch too early."""
    A = spectrum(30, 1e3)
    rhs = torch.randn(3, 30, generator=torch.Generator().manual_seed(2), dtype=F64)
    a, b, unit = column(1.0, 1e-4, 1e-2), column(1.0, 1.0, 1.0), column(1.0, 1e-4, 1e-2)
    together = conjugate_gradients(lambda v: v @ (A.T @ A), rhs, a, b, unit=unit, tolerance=1e-4)
    spent = []
    for i in range(3):
        s = slice(i, i + 1)
        alone = conjugate_gradients(lambda v: v @ (A.T @ A), rhs[s], a[s], b[s], unit=unit[s], tolerance=1e-4)
        torch.testing.assert_close(together.x[s], alone.x, rtol=1e-9, atol=1e-9)
        spent.append(alone.iterations)
    assert together.iterations == max(spent)
    assert min(spent) < max(spent)
    assert bool(together.converged.all())


def test_right_hand_side_of_zero() -> None:
    """NaN, from dividing no energy by no energy, alone or beside a sample that needs work."""
    A = spectrum(10, 1e2)
    rhs = torch.zeros(2, 10, dtype=F64)
    solution = conjugate_gradients(lambda v: v @ (A.T @ A), rhs, column(0.1), column(1.0), unit=column(1.0))
    assert solution.iterations == 0
    assert solution.x.tolist() == rhs.tolist()
    assert solution.bound.tolist() == [0, 0]
    rhs[1] = 1
    solution = conjugate_gradients(lambda v: v @ (A.T @ A), rhs, column(0.1), column(1.0), unit=column(1.0))
    assert solution.x[0].tolist() == [0] * 10
    assert bool(torch.isfinite(solution.x).all())
    assert bool(solution.converged.all())


def test_exact_after_as_many_steps_as_eigenvalues() -> None:
    """The recurrence is not that of conjugate gradients: it ends after one step for each distinct eigenvalue."""
    diagonal = torch.tensor([1.0, 1, 1, 4, 4, 9, 9, 9], dtype=F64)
    rhs = torch.randn(1, 8, generator=torch.Generator().manual_seed(3), dtype=F64)
    solution = conjugate_gradients(
        lambda v: diagonal * v, rhs, column(0.5), column(1.0), unit=column(1.0), tolerance=1e-12
    )
    assert solution.iterations == 3
    torch.testing.assert_close(solution.x, rhs / (0.5 + diagonal), rtol=1e-12, atol=1e-12)


def test_warning_when_the_bound_is_not_reached() -> None:
    """A wrong pivot would pass in silence, or a right one raise an alarm."""
    A_dense = spectrum(60, 1e5)
    x = torch.randn(2, 60, generator=torch.Generator().manual_seed(4), dtype=F64)

    def operator(max_iterations: int) -> Callable:
        return Callable(lambda v: v @ A_dense.to(v).T, shape=(60,), max_iterations=max_iterations, dense_entries=0)

    with pytest.warns(RuntimeWarning, match=r"whitened error .* only bounded by .* after 5 iterations"):
        operator(5).gram_solve(1e-6, 1.0, x, unit=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator(3000).gram_solve(1e-2, 1.0, x, unit=1e-2)
    solution = operator(5).solve(1e-6, 1.0, x, unit=1e-6)
    assert solution.iterations == 5
    assert not bool(solution.converged.any())
    assert bool((solution.bound > 2e-3).all())


GRID = [(t, y) for t in (0.002, 0.1, 1.0, 10.0, 80.0) for y in (1e-3, 1e-2, 0.05, 0.5)]


def motion_blur(taps: int = 7, **options: object) -> PaddedConvolution:
    A = PaddedConvolution(motion_kernel(taps, 0.5, 0).double())
    for name, value in options.items():
        setattr(A, name, value)
    return A


@pytest.mark.parametrize("preconditioned", [True, False])
@pytest.mark.parametrize("start", ["nothing", "linear estimate"])
def test_bound_holds_for_blurs(preconditioned: bool, start: str) -> None:
    """The bound that stops the iteration would lie below the error, at some pair of noise levels: against a dense
    eigendecomposition, with three samples of different smoothness."""
    A = motion_blur(max_iterations=1200)
    if not preconditioned:
        A.surrogate = lambda like: None  # type: ignore[method-assign]
    shape = (1, 10, 11)
    n = 10 * 11
    generator = torch.Generator().manual_seed(0)
    lam, v = torch.linalg.eigh(A.gram(torch.eye(n, dtype=F64).reshape(n, *shape)).reshape(n, n))
    x_0 = torch.rand(3, *shape, generator=generator, dtype=F64) * 2 - 1
    x_0[1] = 0.3
    x_0[2] = x_0[2].cumsum(-1) / 4
    for sigma_t, sigma_y in GRID:
        a, b = sigma_y**2, sigma_t**2
        x_t = x_0 + sigma_t * torch.randn(x_0.shape, generator=generator, dtype=F64)
        y = A(x_0) + sigma_y * torch.randn(x_0.shape, generator=generator, dtype=F64)
        guess = None if start == "nothing" else A.solve(a + 4 * a * b, b, a * x_t, b * y, unit=a * b).x
        solution = A.solve(a, b, a * x_t, b * y, unit=a * b, guess=guess)
        rhs = (a * x_t + b * A.adjoint(y)).reshape(3, n)
        c = solution.x.reshape(3, n) @ v - (rhs @ v) / (a + b * lam)
        whitened = ((a + b * lam) * c.square()).sum(1).div(a * b * n).sqrt()
        assert bool((whitened <= 1.01 * solution.bound).all()), (sigma_t, sigma_y)


def test_quadrature_saves_iterations() -> None:
    """The residual alone bounds the error of an ill-conditioned system by several times its size: a tenth is saved."""
    A = motion_blur(11)
    x = torch.randn(1, 1, 24, 24, generator=torch.Generator().manual_seed(0), dtype=F64)
    a, b = (column(v).reshape(1, 1, 1, 1) for v in (0.5**2, 40.0**2))
    rhs = a * 40 * x + b * A.adjoint(x)
    spent = [conjugate_gradients(A.gram, rhs, a, b, unit=a * b, quadrature=q).iterations for q in (True, False)]
    assert spent[0] < 0.9 * spent[1], spent


def test_preconditioner_saves_iterations() -> None:
    """A surrogate that costs two Fourier transforms an iteration has to save more than it costs: a quarter here."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 24, 24, generator=generator, dtype=F64)
    y = torch.randn(1, 1, 24, 24, generator=generator, dtype=F64)
    A, plain = (motion_blur(11, dense_entries=0) for _ in range(2))
    plain.surrogate = lambda like: None  # type: ignore[method-assign]
    a, b = 0.05**2, 20.0**2
    found, slow = (B.solve(a, b, a * 20 * x, b * y, unit=a * b) for B in (A, plain))
    assert bool(found.converged.all())
    assert found.iterations < 0.75 * slow.iterations, (found.iterations, slow.iterations)
    CT, bare = (Radon(torch.arange(20) * 9.0, 24) for _ in range(2))
    CT.dense_entries = bare.dense_entries = 0
    bare.surrogate = lambda like: None  # type: ignore[assignment, method-assign, return-value]
    found, slow = (B.solve(a, 0.25, a * x, 0.25 * B(x), unit=a * 0.25) for B in (CT, bare))
    assert bool(found.converged.all())
    assert found.iterations < 0.85 * slow.iterations, (found.iterations, slow.iterations)


WEIGHTS = torch.linspace(0.01, 1, 50, dtype=F64)


def test_surrogate_that_is_exact() -> None:
    """With the right answer as preconditioner there is next to nothing left to iterate."""
    A = Callable(lambda x: x * WEIGHTS.to(x), shape=(50,), surrogate=Weighting(WEIGHTS), dense_entries=0)
    A.surrogate_error = 0.0
    x = torch.randn(2, 50, generator=torch.Generator().manual_seed(1), dtype=F64)
    solution = A.solve(1e-6, 4.0, x, unit=1e-6)
    assert solution.iterations <= 2
    torch.testing.assert_close(solution.x, x / (1e-6 + 4 * WEIGHTS**2), rtol=1e-9, atol=1e-9)


def test_exact_solves_ignore_the_guess() -> None:
    """A guess far off would leak into an answer that needs none."""
    A = Weighting(WEIGHTS)
    x = torch.randn(2, 50, generator=torch.Generator().manual_seed(1), dtype=F64)
    assert torch.equal(A.gram_solve(0.1, 2.0, x, guess=1e9 * x), A.gram_solve(0.1, 2.0, x))
    same = pivot(x, x, A, alpha_t=1.0, sigma_t=2.0, sigma_y=0.1, guess=1e9 * x)
    assert torch.equal(same, pivot(x, x, A, alpha_t=1.0, sigma_t=2.0, sigma_y=0.1))


def test_gradient_does_not_pass_through_the_guess() -> None:
    """A guess that depends on the signal would add its own derivative to that of the solve."""
    A = motion_blur(5, tolerance=1e-10)
    x = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=F64, requires_grad=True)
    (warm,) = torch.autograd.grad(A.gram_solve(0.3, 1.2, x, guess=2 * x).square().sum(), x)
    solved = A.gram_solve(0.3, 1.2, x)
    (again,) = torch.autograd.grad(A.gram_solve(0.3, 1.2, x, guess=solved).square().sum(), x)
    (cold,) = torch.autograd.grad(solved.square().sum(), x)
    torch.testing.assert_close(warm, cold, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again, cold, rtol=1e-5, atol=1e-6)


def test_warning_when_spectral_is_not_accurate() -> None:
    """A root of a covariance that is wrong by a tenth would pass in silence."""
    A = motion_blur(9, krylov_dimension=12, dense_entries=0)
    v = torch.randn(1, 1, 20, 20, generator=torch.Generator().manual_seed(1), dtype=F64)
    with pytest.warns(RuntimeWarning, match=r"estimated relative error of .* after 12 Lanczos steps"):
        A.spectral(lambda lam: torch.rsqrt(lam + 1e-6), v)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        A.spectral(lambda lam: torch.rsqrt(lam + 1.0), v)


class Counting(PaddedConvolution):
    """Counts how often ``A^T A`` is applied."""

    count = 0

    def gram(self, v: Tensor) -> Tensor:
        Counting.count += 1
        return super().gram(v)


def test_sampling_with_an_iterative_operator() -> None:
    """Samples through an iterative solve would not be those of the posterior: the same noise through an exact operator
    gives the same samples, and their distribution is the exact one within Monte Carlo error."""
    shape, n = (1, 3, 4), 4000
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator, dtype=F64) / 4
    prior = Gaussian(torch.zeros(12, dtype=F64), root @ root.T + 0.05 * torch.eye(12, dtype=F64), shape=shape)
    A = PaddedConvolution(motion_kernel(3, 0.5, 0).double())
    matrix = dense_matrix(A, shape, 1, torch.zeros(1, dtype=F64))[0]
    y = measure(A, torch.randn(1, *shape, generator=generator, dtype=F64) / 2, 0.1, seed=1)
    found = sample(ExactPosterior(prior, A, y, 0.1), n, 40, solver="dpmpp", batch_size=n)[:, 0]
    exact = sample(
        ExactPosterior(prior, Matrix(matrix, shape), y.flatten(1), 0.1), n, 40, solver="dpmpp", batch_size=n
    )[:, 0]
    assert float((found - exact).square().mean().sqrt()) < 1e-3
    truth = prior.posterior(A, y, 0.1)
    std = truth.covs[0].diagonal().sqrt()
    assert bool(((found.flatten(1).mean(0) - truth.means[0]).abs() <= 5 * std / n**0.5 + 0.01 * std).all())
    covariance = torch.cov(found.flatten(1).T)
    assert float((covariance - truth.covs[0]).norm() / truth.covs[0].norm()) < 0.08


def test_sampler_starts_where_it_was() -> None:
    """What a step has solved for would be forgotten in the next: a warm start saves a tenth of the work at least, and
    changes a sample by no more than the solves' own error."""
    shape = (1, 8, 8)
    prior = Gaussian(torch.zeros(64, dtype=F64), 0.25 * torch.eye(64, dtype=F64), shape=shape)
    A = Counting(motion_kernel(5, 0.5, 0).double())
    A.dense_entries = 0
    y = measure(A, torch.randn(2, *shape, generator=torch.Generator().manual_seed(2), dtype=F64) / 2, 0.05, seed=1)
    results, spent = [], []
    for warm in (True, False):
        prior.warm = warm
        Counting.count = 0
        results.append(sample(ExactPosterior(prior, A, y, 0.05), 2, 20, solver="euler"))
        spent.append(Counting.count)
    assert spent[0] < 0.9 * spent[1], spent
    assert float((results[0] - results[1]).abs().max()) < 2e-3
