"""The sampler against exact posteriors: score, distribution, order of convergence, streams of randomness.

Oracles are written out here, densely and in float64; of the library's priors only the denoiser is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

import posteriori as po
from posteriori.denoise import Denoiser, Posterior
from posteriori.operators import Inpainting, LinearOperator, Matrix, Nothing
from posteriori.operators.base import Scalar
from posteriori.posterior import ExactPosterior
from posteriori.priors import Gaussian, GaussianMixture
from posteriori.sample import Solver, State, ddim, evaluations_for, steps_for
from posteriori.schedule import VE, VP, CosineVP, RectifiedFlow, Schedule

F64 = torch.float64
SOLVERS: list[Solver] = ["exponential", "euler", "heun", "dpmpp", "ddim", "stochastic"]
each_solver = pytest.mark.parametrize("solver", SOLVERS)
D = 4


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64)


@dataclass(frozen=True)
class Mixture:
    """``sum_k w_k N(m_k, C_k)``: parameters, and the closed forms that samples are held against."""

    weights: Tensor
    means: Tensor
    covs: Tensor

    def log_joint(self, x: Tensor) -> Tensor:
        """``log w_k N(x; m_k, C_k)``, shape ``(n, K)``."""
        parts = [
            torch.distributions.MultivariateNormal(m, c).log_prob(x) for m, c in zip(self.means, self.covs, strict=True)
        ]
        return torch.stack(parts, 1) + self.weights.log()

    def moments(self) -> tuple[Tensor, Tensor]:
        mean = self.weights @ self.means
        centred = self.means - mean
        return mean, (self.weights[:, None, None] * (self.covs + centred[:, :, None] * centred[:, None, :])).sum(0)

    def given(self, M: Tensor, y: Tensor, sigma_y: float) -> Mixture:
        """The posterior given ``y = M x + sigma_y noise``, by Gaussian conditioning of every component."""
        noise = sigma_y**2 * torch.eye(M.shape[0], dtype=F64)
        weights, means, covs = [], [], []
        for w, m, c in zip(self.weights, self.means, self.covs, strict=True):
            total = M @ c @ M.T + noise
            gain = c @ M.T @ torch.linalg.inv(total)
            means.append(m + gain @ (y - M @ m))
            covs.append(c - gain @ M @ c)
            weights.append(w.log() + torch.distributions.MultivariateNormal(M @ m, total).log_prob(y))
        covs = [(c + c.T) / 2 for c in covs]
        return Mixture(torch.softmax(torch.stack(weights), 0), torch.stack(means), torch.stack(covs))


def prior(k: int = 3, d: int = D) -> Mixture:
    roots = randn(k, d, d, seed=1) * 0.25 + 0.15 * torch.eye(d, dtype=F64)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=F64)[:k]
    return Mixture(weights / weights.sum(), randn(k, d, seed=2), roots @ roots.mT + 0.02 * torch.eye(d, dtype=F64))


def problem(schedule: Schedule | None = None, batch: int = 1) -> tuple[ExactPosterior, list[Mixture]]:
    """Two noisy numbers measured of four: ambiguous between the modes. The exact posterior of every measurement."""
    p = prior()
    M, y, sigma_y = randn(2, D, seed=3) / 2, randn(batch, 2, seed=4) / 2, 0.4
    denoiser = GaussianMixture(p.weights, p.means, p.covs, schedule)
    return ExactPosterior(denoiser, Matrix(M), y, sigma_y), [p.given(M, row, sigma_y) for row in y]


class Counting(Denoiser):
    """Counts evaluations of another denoiser."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__()
        self.inner, self.schedule, self.calls, self.times = inner, inner.schedule, 0, []

    def forward(self, x_t: Tensor, t: Scalar, A: LinearOperator, y: Tensor, sigma_y: Scalar) -> Posterior:
        self.calls += 1
        self.times.append(float(t))
        return self.inner(x_t, t, A, y, sigma_y)


# -- the score -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [VE(), VP(), CosineVP(), RectifiedFlow()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("measured", ["matrix", "mask", "nothing"])
def test_score_is_the_gradient_of_log_density(schedule: Schedule, measured: str) -> None:
    """The theorem: the exact posterior score is not the gradient of log p(x_t | y), here built as the joint density
    of (x_t, y) and differentiated automatically (float64, relative error 1e-7)."""
    p, n = prior(), 5
    A: LinearOperator
    if measured == "matrix":
        M = randn(2, D, seed=3)
        A = Matrix(M)
    elif measured == "mask":
        mask = torch.tensor([1.0, 0, 0, 1], dtype=F64)
        M, A = torch.diag(mask), Inpainting(mask)
    else:
        M, A = torch.zeros(D, D, dtype=F64), Nothing()
    denoiser = GaussianMixture(p.weights, p.means, p.covs, schedule)
    for sigma_y in (0.05, 0.7):
        y = po.measure(A, randn(n, D, seed=5), sigma_y, seed=0)
        q = schedule.ratio(torch.tensor([schedule.t_min, schedule.t_max], dtype=F64)).log()
        for t in schedule.time(torch.linspace(max(float(q[0]), -3), float(q[1]), 6, dtype=F64).exp()):
            alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
            x_t = (alpha * randn(n, D, seed=6) + sigma * randn(n, D, seed=7)).requires_grad_()
            H = torch.cat([alpha * torch.eye(D, dtype=F64), M])
            R = torch.diag(torch.tensor([sigma**2] * D + [sigma_y**2] * len(M), dtype=F64))
            joint = Mixture(p.weights, p.means @ H.T, H @ p.covs @ H.T + R)
            log_density = torch.logsumexp(joint.log_joint(torch.cat([x_t, y], 1)), 1)
            (expected,) = torch.autograd.grad(log_density.sum(), x_t)
            score = ExactPosterior(denoiser, A, y, sigma_y).score(x_t.detach(), float(t))
            torch.testing.assert_close(score, expected, rtol=1e-7, atol=1e-7 * float(expected.abs().max()))


def test_one_evaluation_is_the_posterior_mean() -> None:
    """The "1 NFE" estimate is not E[x_0 | y]: what is left of x_t at noise 80 moves it by C x_t / 80^2."""
    posterior, exact = problem(batch=3)
    expected = torch.stack([e.moments()[0] for e in exact])
    variance = max(float(torch.linalg.eigvalsh(e.moments()[1]).max()) for e in exact)
    for mean in (posterior.mean(), posterior.mean(seed=1), po.sample(posterior, nfe=1)[0]):
        torch.testing.assert_close(mean, expected, rtol=0, atol=4 * variance / 80)


# -- the distribution ------------------------------------------------------------------------------------------------

N_SAMPLES = 4000


def assert_distributed(samples: Tensor, exact: Mixture, bias: float = 0.0) -> None:
    """Mean, covariance and mode weights within 4.5 standard errors of independent draws, and ``bias`` times the
    scale of each for the finite number of steps."""
    n = samples.shape[0]
    mean, covariance = exact.moments()
    deviation = covariance.diagonal().sqrt()
    error = (samples.mean(0) - mean).abs()
    assert bool((error <= 4.5 * deviation / math.sqrt(n) + bias * deviation).all()), error / deviation
    # fourth moments of the mixture, from draws of its own
    generator = torch.Generator().manual_seed(9)
    pick = torch.multinomial(exact.weights, 100_000, replacement=True, generator=generator)
    z = torch.randn(100_000, D, generator=generator, dtype=F64)
    roots = torch.linalg.cholesky(exact.covs)
    draws = exact.means[pick] + (roots[pick] @ z.unsqueeze(2)).squeeze(2) - mean
    products = draws[:, :, None] * draws[:, None, :]
    scale = deviation[:, None] * deviation
    error = (samples.T.cov() - covariance).abs()
    assert bool((error <= 4.5 * products.std(0) / math.sqrt(n) + bias * scale).all()), error / scale
    shares = torch.softmax(exact.log_joint(samples), 1).mean(0)
    error = (shares - exact.weights).abs()
    allowed = 4.5 * (exact.weights * (1 - exact.weights) / n).sqrt() + bias
    assert bool((error <= allowed).all()), (shares, exact.weights)


@pytest.mark.parametrize(
    ("solver", "nfe"),
    [("exponential", 16), ("euler", 150), ("heun", 79), ("dpmpp", 60), ("ddim", 150), ("stochastic", 199)],
)
def test_samples_follow_the_posterior(solver: Solver, nfe: int) -> None:
    """A solver that draws from another distribution than p(x_0 | y): 4,000 samples of a mixture."""
    posterior, exact = problem()
    samples = po.sample(posterior, n=N_SAMPLES, nfe=nfe, solver=solver, batch_size=N_SAMPLES)
    assert samples.shape == (N_SAMPLES, 1, D)
    assert samples.dtype == F64
    assert_distributed(samples[:, 0], exact[0], bias=0.03)


@pytest.mark.parametrize("schedule", [VP(), CosineVP(), RectifiedFlow()], ids=lambda s: type(s).__name__)
def test_samples_do_not_depend_on_the_interpolant(schedule: Schedule) -> None:
    """A flow or VP model would draw from another posterior than EDM's."""
    posterior, exact = problem(schedule)
    samples = po.sample(posterior, n=N_SAMPLES, nfe=60, batch_size=N_SAMPLES)
    assert_distributed(samples[:, 0], exact[0], bias=0.03)


def test_nothing_measured_samples_the_prior() -> None:
    """Unconditional sampling, which the training-free baselines build on."""
    p = prior()
    denoiser = GaussianMixture(p.weights, p.means, p.covs)
    posterior = ExactPosterior(denoiser, Nothing(), torch.zeros(1, D, dtype=F64), 0.1)
    samples = po.sample(posterior, n=N_SAMPLES, nfe=60, batch_size=N_SAMPLES)
    assert_distributed(samples[:, 0], p, bias=0.03)


def test_measurements_of_a_batch_have_their_own_posteriors() -> None:
    """Samples of one measurement would be mixed with those of another."""
    posterior, exact = problem(batch=3)
    samples = po.sample(posterior, n=1500, nfe=40, batch_size=5000)
    for b in range(3):
        assert_distributed(samples[:, b], exact[b], bias=0.04)


# -- order of convergence --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "eta", "order", "slack"),
    [
        ("exponential", 0.0, 3, 0.3),
        ("euler", 0.0, 1, 0.2),
        ("ddim", 0.0, 1, 0.2),
        ("heun", 0.0, 2, 0.3),
        ("dpmpp", 0.0, 2, 0.3),
    ],
)
def test_order_of_convergence(solver: Solver, eta: float, order: int, slack: float) -> None:
    """A solver that lost its order by a slip in one coefficient still converges, but needs many more evaluations.

    For a Gaussian the flow is known: ``u(q) - m`` scales with ``(lam + q^2)^(1/2)`` along every eigenvector of the
    posterior covariance. Regression of the error at the last noisy time against the steps.
    """
    schedule = VE(0.1, 20.0)
    root, mean = randn(D, D, seed=1), randn(D, seed=2)
    one = Mixture(torch.ones(1, dtype=F64), mean[None], (root @ root.T / D + 0.05 * torch.eye(D, dtype=F64))[None])
    M, y, sigma_y = randn(2, D, seed=3), randn(1, 2, seed=4), 0.5
    exact = one.given(M, y[0], sigma_y)
    lam, v = torch.linalg.eigh(exact.covs[0])
    posterior = ExactPosterior(Gaussian(mean, one.covs[0], schedule), Matrix(M), y, sigma_y)
    steps, errors = np.array([24, 48, 96, 192]), []
    for k in steps:
        nfe = 2 * int(k) - 1 if solver == "heun" else int(k)
        track = po.sample(posterior, n=8, nfe=nfe, solver=solver, grid="karras", eta=eta, return_trajectory=True)
        assert len(track.t) == k + 1
        start, end = float(track.t[0]), float(track.t[-2])
        growth = ((lam + end**2) / (lam + start**2)).sqrt()
        truth = exact.means[0] + (track.x_t[0, :, 0] - exact.means[0]) @ (v * growth) @ v.T
        errors.append(float((track.x_t[-2, :, 0] - truth).norm(dim=1).mean()))
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope - order) < slack, f"order {slope:.2f}, errors {errors}"


def test_euler_is_deterministic_ddim() -> None:
    """The two names must not part: DDIM with eta = 0 is Euler's step (1e-12)."""
    posterior, _ = problem()
    euler = po.sample(posterior, n=3, nfe=10, solver="euler")
    torch.testing.assert_close(po.sample(posterior, n=3, nfe=10, solver="ddim", eta=0.0), euler, rtol=0, atol=1e-12)
    assert not torch.allclose(po.sample(posterior, n=3, nfe=10, solver="ddim", eta=1.0), euler, atol=1e-3)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_is_the_published_one(eta: float) -> None:
    """Any split of the noise samples the right distribution in the limit, but only one is DDIM's: Song et al. 2021,
    eq. 12 and 16, in the (alpha-bar, x_t) of a variance preserving process (1e-12)."""
    alpha_bar, next_alpha_bar = 0.3, 0.7
    x_t, x_0, z = randn(2, D), randn(2, D, seed=1), randn(2, D, seed=2)
    predicted = (x_t - alpha_bar**0.5 * x_0) / (1 - alpha_bar) ** 0.5
    sigma = eta * ((1 - next_alpha_bar) / (1 - alpha_bar)) ** 0.5 * (1 - alpha_bar / next_alpha_bar) ** 0.5
    expected = next_alpha_bar**0.5 * x_0 + (1 - next_alpha_bar - sigma**2) ** 0.5 * predicted + sigma * z
    q, next_q = (((1 - a) / a) ** 0.5 for a in (alpha_bar, next_alpha_bar))
    state = ddim(eta)(State(x_t / alpha_bar**0.5, q), next_q, lambda u, q: x_0, lambda: z)
    torch.testing.assert_close(state.u * next_alpha_bar**0.5, expected, rtol=0, atol=1e-12)


# -- randomness ------------------------------------------------------------------------------------------------------


@each_solver
def test_a_sample_depends_on_its_place_alone(solver: Solver) -> None:
    """A figure could not be reproduced with more samples, fewer photos or less memory (to rounding, 1e-9)."""
    posterior, _ = problem(batch=3)
    reference = po.sample(posterior, n=4, nfe=8, solver=solver, seed=5)
    for batch_size in (1, 3, 6, 7, 100):
        again = po.sample(posterior, n=4, nfe=8, solver=solver, seed=5, batch_size=batch_size)
        torch.testing.assert_close(again, reference, rtol=0, atol=1e-9)
    fewer = po.sample(posterior, n=2, nfe=8, solver=solver, seed=5)
    torch.testing.assert_close(fewer, reference[:2], rtol=0, atol=1e-9)
    for count in (1, 2):
        part = ExactPosterior(posterior.denoiser, posterior.A, posterior.y[:count], posterior.sigma_y)
        alone = po.sample(part, n=4, nfe=8, solver=solver, seed=5)
        torch.testing.assert_close(alone, reference[:, :count], rtol=0, atol=1e-9)


def test_seeds() -> None:
    """Equal seeds that differ, different seeds that agree, 0 taken for no seed, or samples that repeat each other."""
    posterior, _ = problem(batch=2)
    first = po.sample(posterior, n=3, nfe=5, seed=0)
    torch.rand(10)  # the global generator has no part in it
    assert torch.equal(first, po.sample(posterior, n=3, nfe=5, seed=0))
    assert torch.equal(first, po.sample(posterior, n=3, nfe=5))
    assert torch.equal(first, po.sample(posterior, n=3, nfe=5, seed=np.int64(0)))  # type: ignore[call-overload]
    assert not torch.allclose(first, po.sample(posterior, n=3, nfe=5, seed=1), atol=1e-3)
    # every sample of every measurement starts from noise of its own
    start = po.sample(posterior, n=3, nfe=2, return_trajectory=True).x_t[0].reshape(6, D)
    distances = (start[:, None] - start).norm(dim=2) + 80 * torch.eye(6, dtype=F64)
    assert float(distances.min()) > 8


def test_a_seed_for_every_measurement() -> None:
    """A photo with a seed of its own would still depend on its place in the batch (1e-9)."""
    posterior, _ = problem(batch=3)
    samples = po.sample(posterior, n=2, nfe=6, seed=[7, 8, 7])
    for b, seed in enumerate([7, 8, 7]):
        part = ExactPosterior(posterior.denoiser, posterior.A, posterior.y[b : b + 1], posterior.sigma_y)
        alone = po.sample(part, n=2, nfe=6, seed=[seed])
        torch.testing.assert_close(samples[:, b : b + 1], alone, rtol=0, atol=1e-9)


def test_operators_with_parameters_per_sample() -> None:
    """One mask for each measurement cannot be repeated for copies: samples must equal those drawn alone (1e-9)."""
    p = prior()
    denoiser = GaussianMixture(p.weights, p.means, p.covs)
    masks = torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]], dtype=F64)
    y, sigma_y = masks * randn(3, D, seed=4), torch.tensor([0.1, 0.3, 0.2], dtype=F64)
    samples = po.sample(ExactPosterior(denoiser, Inpainting(masks), y, sigma_y), n=2, nfe=6, seed=[1, 2, 3])
    assert samples.shape == (2, 3, D)
    for b in range(3):
        part = ExactPosterior(denoiser, Inpainting(masks[b]), y[b : b + 1], float(sigma_y[b]))
        alone = po.sample(part, n=2, nfe=6, seed=[b + 1])
        torch.testing.assert_close(samples[:, b : b + 1], alone, rtol=0, atol=1e-9)


# -- accounts --------------------------------------------------------------------------------------------------------


@each_solver
@pytest.mark.parametrize("nfe", [1, 2, 3, 9, 10])
def test_evaluations_are_those_asked_for(solver: Solver, nfe: int) -> None:
    """Methods would be compared at unequal cost: at most ``nfe``, and all of them but for Heun's last."""
    posterior, _ = problem()
    counting = Counting(posterior.denoiser)
    counted = ExactPosterior(counting, posterior.A, posterior.y, posterior.sigma_y)
    track = po.sample(counted, n=1, nfe=nfe, solver=solver, return_trajectory=True)
    paired = solver in ("heun", "stochastic")
    assert counting.calls == (nfe - (nfe + 1) % 2 if paired else nfe)
    assert counting.calls == track.evaluations == evaluations_for(solver, nfe)
    assert len(track.t) == steps_for(solver, nfe) + 1
    if solver != "stochastic":
        grid = [float(t) for t in track.t[:-1]]
        expected = [grid[0], *(t for t in grid[1:] for _ in range(2))] if solver == "heun" else grid
        assert counting.times == expected


@each_solver
def test_progress(solver: Solver) -> None:
    """A bar that ends early or overshoots."""
    posterior, _ = problem(batch=2)
    for batch_size in (2, 6, 100):
        spent: list[int] = []
        po.sample(posterior, n=5, nfe=7, solver=solver, batch_size=batch_size, progress=spent.append)
        assert sum(spent) == 5 * evaluations_for(solver, 7)
        assert all(k > 0 for k in spent)


def test_progress_bar_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """A bar that disturbs the samples, or crashes where there is no terminal."""
    posterior, _ = problem()
    assert torch.equal(po.sample(posterior, nfe=4, progress=True), po.sample(posterior, nfe=4))
    capsys.readouterr()


@each_solver
def test_trajectory(solver: Solver) -> None:
    """Pictures of the way would not be of the way that the samples came (1e-12; means 1e-8)."""
    posterior, _ = problem(VP(), batch=2)
    plain = po.sample(posterior, n=3, nfe=7, solver=solver, seed=2)
    track = po.sample(posterior, n=3, nfe=7, solver=solver, seed=2, return_trajectory=True, batch_size=4)
    steps = steps_for(solver, 7)
    assert track.x_t.shape == (steps + 1, 3, 2, D)
    assert track.means.shape == (steps, 3, 2, D)
    torch.testing.assert_close(track.samples, plain, rtol=0, atol=1e-9)
    assert torch.equal(track.x_t[-1], track.samples)
    if solver != "exponential":
        assert torch.equal(track.t, posterior.schedule.grid(steps))
    if solver != "stochastic":  # which evaluates at a state with noise added
        for i in range(steps):
            state = track.x_t[i].reshape(6, D)
            mean = posterior.expand(3).denoise(state, float(track.t[i])).mean
            torch.testing.assert_close(track.means[i].reshape(6, D), mean, rtol=1e-8, atol=1e-8)


def test_grid_options_reach_the_grid() -> None:
    """Spacing and rho would be accepted and ignored."""
    posterior, _ = problem()
    for spacing, rho in (("karras", 7.0), ("karras", 3.0), ("log", 7.0), ("uniform", 7.0)):
        expected = posterior.schedule.grid(6, spacing, rho)
        for options in ({"grid": spacing, "rho": rho}, {"grid": expected}):
            assert torch.equal(po.sample(posterior, nfe=6, return_trajectory=True, **options).t, expected)
    track = po.sample(posterior, nfe=6, start=3.0, stop=0.1, rho=2.0, return_trajectory=True)
    expected = torch.linspace(3.0**0.5, 0.1**0.5, 5, dtype=F64) ** 2
    torch.testing.assert_close(track.t, torch.tensor([80.0, *expected, 0.0], dtype=F64), rtol=1e-12, atol=0)


def test_float32_problems_stay_float32() -> None:
    """Memory would double, and networks meet a precision they do not run in; noise is drawn for each precision."""
    p = prior()
    denoiser = GaussianMixture(p.weights, p.means, p.covs)
    y = torch.zeros(1, D)
    samples = po.sample(ExactPosterior(denoiser, Nothing(), y, 0.1), nfe=5)
    assert samples.dtype == torch.float32
    assert not samples.requires_grad


def test_errors() -> None:
    """Each would end in an empty tensor or a message from inside the loop."""
    posterior, _ = problem(batch=2)
    for options in ({"n": 0}, {"nfe": 0}, {"n": -1}):
        with pytest.raises(ValueError, match="at least 1"):
            po.sample(posterior, **options)
    with pytest.raises(ValueError, match="unknown solver 'rk4'"):
        po.sample(posterior, solver="rk4")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="3 seeds do not fit a batch of 2"):
        po.sample(posterior, seed=[1, 2, 3])
    with pytest.raises(ValueError, match="unknown grid 'linear'"):
        po.sample(posterior, grid="linear")  # type: ignore[call-overload]
    for grid in (
        torch.tensor([80.0, 1.0, 2.0, 0.0]),
        torch.tensor([80.0, 1.0, 0.0]),
        torch.tensor([3.0, 2.0, 1.0, 0.5]),
    ):
        with pytest.raises(ValueError, match="4 decreasing times that end with 0"):
            po.sample(posterior, nfe=3, grid=grid)
    with pytest.raises(ValueError, match="the schedule ends at 80"):
        po.sample(posterior, nfe=2, grid=torch.tensor([90.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match="need 0 < stop < start < 80"):
        po.sample(posterior, start=100.0)
    with pytest.raises(ValueError, match="belong to the grid 'posterior'"):
        po.sample(posterior, solver="euler", start=3.0)
