"""The exponential integrator: exact where the posterior is that of N(0, s^2 I), and weights that are the integrals."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import Tensor

import posteriori as po
from posteriori.denoise import Denoiser, Posterior
from posteriori.exponential import _integrals, exponential
from posteriori.operators import (
    Blur,
    CircularConvolution,
    Downsampling,
    GaussianBlur,
    Inpainting,
    KrylovOperator,
    LinearOperator,
    Matrix,
    Nothing,
)
from posteriori.operators.base import Scalar
from posteriori.pivot import linear_estimate
from posteriori.posterior import ExactPosterior
from posteriori.priors import GaussianMixture
from posteriori.schedule import VE, VP, CosineVP, RectifiedFlow, Schedule
from posteriori.solvers import State, Transition, euler

F64 = torch.float64


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64)


class White(Denoiser):
    """``N(0, s^2 I)`` of any shape, for any noise of the measurement, 0 too: the linear estimate."""

    def __init__(self, s: float, schedule: Schedule) -> None:
        super().__init__()
        self.data_std, self.schedule = s, schedule

    def forward(self, x_t: Tensor, t: Scalar, A: LinearOperator, y: Tensor, sigma_y: Scalar) -> Posterior:
        alpha, sigma = self.scales(x_t, t)
        mean = linear_estimate(
            x_t, y, A, alpha_t=alpha.reshape(-1), sigma_t=sigma.reshape(-1), sigma_y=sigma_y, prior_std=self.data_std
        )
        return Posterior(mean, x_t, alpha, sigma)


class Iterative(KrylovOperator):
    """A matrix that is known through its products alone."""

    tolerance, spectral_tolerance = 1e-9, 1e-9

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.to(x).T

    def adjoint(self, y: Tensor) -> Tensor:
        return y @ self.matrix.to(y)

    def signal_shape(self, measurement_shape: object) -> tuple[int, ...]:
        return (self.matrix.shape[1],)


def carry(posterior: ExactPosterior, step: Transition, u: Tensor, levels: list[float], start: float) -> Tensor:
    """``u`` at noise ``start`` brought to the last of ``levels``, ``alpha_t = 1``."""

    def mean(u: Tensor, q: float) -> Tensor:
        return posterior.denoise(u, q).mean

    state = State(u, start)
    for q in levels:
        state = step(state, q, mean, lambda: u)
    return state.u


OPERATORS: dict[str, tuple[Callable[[], LinearOperator], tuple[int, ...]]] = {
    "nothing": (Nothing, (6,)),
    "matrix": (lambda: Matrix(randn(3, 6, seed=1)), (6,)),
    "mask": (lambda: Inpainting((randn(6, 6, seed=2) > 0).double()), (1, 6, 6)),
    "mask per sample": (lambda: Inpainting((randn(2, 1, 6, 6, seed=2) > 0).double()), (1, 6, 6)),
    "wrapped blur": (lambda: CircularConvolution(randn(3, 3, seed=3).abs()), (1, 6, 6)),
    "reflected blur": (lambda: GaussianBlur(1.0, 5), (1, 6, 6)),
    "motion": (lambda: Blur(randn(3, 3, seed=3).abs(), "circular"), (2, 6, 6)),
    "downsampling": (lambda: Downsampling(2), (1, 6, 6)),
}


def posterior_of(
    A: LinearOperator, shape: tuple[int, ...], sigma_y: Scalar, schedule: Schedule, s: float = 0.7
) -> ExactPosterior:
    y = po.measure(A, randn(2, *shape, seed=4), sigma_y, seed=0)
    return ExactPosterior(White(s, schedule), A, y, sigma_y)


def exact_flow(posterior: ExactPosterior, b: int, u: Tensor, q: float) -> Tensor:
    """Where the flow of measurement ``b`` carries ``u`` at noise ``q``, dense and in float64: conditioning of
    ``N(0, s^2 I)``, then ``u - mu`` scaled by ``(v / (v + q^2))^(1/2)`` along eigenvectors."""
    shape, s = posterior.shape[1:], posterior.denoiser.data_std
    d = math.prod(shape)
    columns = torch.eye(d, dtype=F64).reshape(d, 1, *shape).expand(d, 2, *shape)
    M = torch.stack([posterior.A(e)[b].flatten() for e in columns], 1)
    sigma_y = torch.as_tensor(posterior.sigma_y, dtype=F64).expand(2)[b]
    y = posterior.y[b].flatten()
    gain = s**2 * M.T @ torch.linalg.pinv(s**2 * M @ M.T + sigma_y**2 * torch.eye(len(M), dtype=F64), hermitian=True)
    v, axes = torch.linalg.eigh(s**2 * torch.eye(d, dtype=F64) - gain @ M * s**2)
    mu, v = gain @ y, v.clamp_min(0)
    return (mu + axes @ ((v / (v + q**2)).sqrt() * (axes.T @ (u.flatten() - mu)))).reshape(shape)


@pytest.mark.parametrize("schedule", [VE(), VP(), CosineVP(), RectifiedFlow()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", OPERATORS)
def test_white_gaussian_in_one_step(name: str, schedule: Schedule) -> None:
    """The linear part is not integrated exactly: one step from the largest noise to 0 by way of one other level
    must give the exact flow's answer, whatever the operator and its noise (1e-7; float64)."""
    make, shape = OPERATORS[name]
    A = make()
    levels: list[Scalar] = [0.05, torch.tensor([0.02, 0.8], dtype=F64)]
    if name in ("mask", "mask per sample", "matrix", "downsampling"):
        levels.append(0.0)
    for sigma_y in levels:
        posterior = posterior_of(A, shape, sigma_y, schedule)
        track = po.sample(posterior, nfe=2, seed=3, return_trajectory=True)
        q = float(schedule.ratio(track.t[:1]))
        u = track.x_t[0, 0] / float(schedule.alpha(track.t[:1]))
        for b in range(2):
            expected = exact_flow(posterior, b, u[b], q)
            torch.testing.assert_close(track.samples[0, b], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("v", [1e-6, 1e-3, 0.3, 20.0])
@pytest.mark.parametrize("levels", [[2.0], [0.5, 1.5], [0.02, 0.06, 0.2]])
@pytest.mark.parametrize("ratio", [2.0, 4.0])
def test_integrals_by_adaptive_quadrature(levels: list[float], v: float, ratio: float) -> None:
    """A slip in the quadrature or in Lagrange's polynomials costs the order, or more: SciPy's adaptive quadrature
    (relative error 1e-5 of the largest)."""
    q = levels[0] / ratio
    found = [float(i) for i in _integrals(torch.tensor(v, dtype=F64), levels, q)]

    def integrand(x: float, j: int) -> float:
        others = [p for k, p in enumerate(levels) if k != j]
        return math.prod(math.log(x / p) / math.log(levels[j] / p) for p in others) / (v + x**2)

    expected = [integrate.quad(integrand, q, levels[0], args=(j,), epsrel=1e-11)[0] for j in range(len(levels))]
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-5 * max(map(abs, expected))


def test_without_a_prior_variance_it_is_ddim() -> None:
    """The limit v -> 0 must be the solvers everyone knows: at first order Euler's step, deterministic DDIM (1e-7)."""
    prior = GaussianMixture(torch.ones(2, dtype=F64), randn(2, 3), torch.tensor([0.1, 0.2], dtype=F64))
    prior.data_std = 1e-9
    posterior = ExactPosterior(prior, Matrix(randn(1, 3, seed=1)), torch.ones(1, 1, dtype=F64), 0.3)
    u = randn(1, 3, seed=2)
    one, other = (carry(posterior, step, u, [0.6], 1.5) for step in (euler, exponential(posterior, order=1)))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


def test_iterative_operators_follow_the_same_flow() -> None:
    """Without a spectral basis the prior alone is integrated exactly; the samples must still be those of the flow:
    conjugate gradients beside an SVD, root mean square over the posterior's deviation (2 % at 12 evaluations)."""
    M = randn(3, 6, seed=1)
    prior = GaussianMixture(torch.ones(3, dtype=F64), randn(3, 6, seed=5), torch.tensor([0.05, 0.1, 0.2], dtype=F64))
    y = torch.ones(1, 3, dtype=F64)
    deviation = float(prior.posterior(Matrix(M), y, 0.1).covariance.trace()) ** 0.5
    one, other = (po.sample(ExactPosterior(prior, A, y, 0.1), n=64, nfe=12, seed=1) for A in (Matrix(M), Iterative(M)))
    difference = float((one - other).flatten(1).square().sum(1).mean()) ** 0.5
    assert 0 < difference < 0.02 * deviation, difference / deviation


@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_convergence(order: int) -> None:
    """A polynomial through ``order`` values that does not give that order: a mixture's flow against one four times
    finer, regression of the error over 16 to 64 steps from noise 20 to 0.2."""
    prior = GaussianMixture(torch.ones(2, dtype=F64), randn(2, 3) / 2, torch.tensor([0.3, 0.5], dtype=F64))
    posterior = ExactPosterior(prior, Matrix(randn(1, 3, seed=1)), torch.ones(1, 1, dtype=F64), 0.3).expand(16)
    start = 20 * randn(16, 3, seed=2)

    def end(steps: int, order: int) -> Tensor:
        levels = torch.logspace(math.log10(20), math.log10(0.2), steps + 1, dtype=F64)[1:].tolist()
        return carry(posterior, exponential(posterior, order), start, levels, 20.0)

    truth, steps = end(256, 3), [16, 32, 64]
    errors = [float((end(k, order) - truth).norm()) for k in steps]
    slope = -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])
    assert order - 0.35 < slope < order + 0.35, (slope, errors)


@pytest.mark.parametrize("sigma_y", [0.3, 1e-3])
def test_float32_follows_float64(sigma_y: float) -> None:
    """Rounding at noise 80 must not reach the measured directions: whitened error of float32 samples (1e-2)."""
    shape = (1, 16, 16)
    for A in (GaussianBlur(1.0, 5), Inpainting((randn(16, 16, seed=2) > 0).double()), Downsampling(4)):
        y = po.measure(A, randn(1, *shape, seed=4), sigma_y, seed=0)
        fine, coarse = (ExactPosterior(White(0.5, VE()), A, z, sigma_y) for z in (y, y.float()))
        start = 80 * randn(1, *shape)
        ends = []
        for posterior, u in ((fine, start), (coarse, start.float())):
            ends.append(carry(posterior, exponential(posterior), u, [2.0, 0.3, 0.02, 0.0], 80.0).double())
        error = A(ends[1] - ends[0]) / sigma_y
        assert float(error.square().mean().sqrt()) < 1e-2
