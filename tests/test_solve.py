"""Conjugate gradients: the bound they return holds, and they say when it was not reached."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from posteriori.operators import Callable
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
        return Callable(lambda v: v @ A_dense.to(v).T, shape=(60,), max_iterations=max_iterations)

    with pytest.warns(RuntimeWarning, match=r"whitened error .* only bounded by .* after 5 iterations"):
        operator(5).gram_solve(1e-6, 1.0, x, unit=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator(3000).gram_solve(1e-2, 1.0, x, unit=1e-2)
    solution = operator(5).solve(1e-6, 1.0, x, unit=1e-6)
    assert solution.iterations == 5
    assert not bool(solution.converged.any())
    assert bool((solution.bound > 2e-3).all())
