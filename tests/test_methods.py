"""Every restoration method, in the regime where its answer is known. Oracles are dense float64 algebra, written out.

Most tests use one step from the largest noise to 0: its result is the method's estimate of ``x_0`` at a known state.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from posteriori.denoise import Denoiser, NetworkDenoiser, Posterior
from posteriori.images import Photo
from posteriori.methods import METHODS, MethodError
from posteriori.methods.base import Problem, ddpm_grid
from posteriori.methods.ddrm import spectral_transition
from posteriori.operators import (
    Callable as CallableOperator,
)
from posteriori.operators import (
    GaussianBlur,
    Identity,
    Inpainting,
    LinearOperator,
    Matrix,
    Nothing,
)
from posteriori.operators.base import Scalar
from posteriori.pivot import sample_generator
from posteriori.posterior import ExactPosterior
from posteriori.priors import Gaussian, GaussianMixture
from posteriori.problems import InputError, TaskOptions, build_problem
from posteriori.restore import RestoreOptions, load_model, restore
from posteriori.sample import State, sample
from posteriori.schedule import VE, VP, RectifiedFlow, Schedule
from tiny_model import save_tiny_model, tiny_network

SHAPE = (1, 4, 4)
D = 16
NETWORK = [name for name, entry in METHODS.items() if entry.nfe]
# Small settings with which every method can be called often.
QUICK: dict[str, dict[str, Any]] = {"daps": {"langevin_steps": 7}, "daps-calibrated": {"langevin_steps": 7}}
QUICK |= {"mmps": {"iterations": 2}}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(schedule: Schedule | None = None, seed: int = 1) -> GaussianMixture:
    """Three components in 16 dimensions with correlated pixels: no method's approximation is exact for it."""
    roots = 0.2 * normal(3, D, D, seed=seed)
    covs = roots @ roots.mT / 4 + 0.01 * torch.eye(D, dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    return GaussianMixture(weights, 0.5 * normal(3, D, seed=seed + 1), covs, schedule, SHAPE)


def gaussian(schedule: Schedule | None = None, seed: int = 3) -> Gaussian:
    root = 0.3 * normal(D, D, seed=seed)
    return Gaussian(0.3 * normal(D, seed=seed + 1), root @ root.T / 4, schedule, SHAPE)


def isotropic(s: float, schedule: Schedule | None = None) -> Gaussian:
    return Gaussian(0.3 * normal(D, seed=5), s**2 * torch.eye(D, dtype=torch.float64), schedule, SHAPE)


def mask(seed: int = 2) -> Tensor:
    return (normal(4, 4, seed=seed) > 0).double()


def first_state(schedule: Schedule, count: int = 1) -> tuple[Tensor, float]:
    """``u`` and ``q`` at which sample 0 of the first ``count`` measurements starts, for seed 0."""
    q = float(schedule.ratio(torch.tensor(schedule.t_max, dtype=torch.float64)))
    rows = [torch.randn(SHAPE, generator=sample_generator(0, b, 0), dtype=torch.float64) for b in range(count)]
    return torch.stack(rows) * q, q


def dense(A: LinearOperator) -> Tensor:
    return A(torch.eye(D, dtype=torch.float64).reshape(D, *SHAPE)).flatten(1).T


def prior_mean(prior: GaussianMixture, u: Tensor, q: float) -> Tensor:
    """``E[x_0 | u]`` of a mixture, by Bayes' rule with inverses."""
    total = prior.covs + q**2 * torch.eye(D, dtype=torch.float64)
    rows = []
    for x in u.flatten(1):
        difference = x - prior.means
        solved = torch.linalg.solve(total, difference.unsqueeze(2)).squeeze(2)
        log = prior.weights.log() - 0.5 * (difference * solved).sum(1) - 0.5 * torch.logdet(total)
        means = prior.means + torch.einsum("kij,kj->ki", prior.covs, solved)
        rows.append(torch.softmax(log, 0) @ means)
    return torch.stack(rows).reshape(u.shape)


def problem_of(prior: Denoiser, A: LinearOperator, sigma_y: float = 0.05, count: int = 1) -> ExactPosterior:
    x = prior.sample(count, torch.Generator().manual_seed(9))  # type: ignore[operator]
    y = A(x)
    noise = sigma_y * normal(*y.shape, seed=10)
    observed = A.observed(y)
    return ExactPosterior(prior, A, y + (noise if observed is None else noise * observed), sigma_y)


def finite_differences(function: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
    """Gradient of a scalar function of one signal ``(1, *SHAPE)``."""
    gradient = torch.zeros_like(x).flatten()
    for i in range(x.numel()):
        e = torch.zeros_like(x).flatten()
        e[i] = step
        e = e.reshape(x.shape)
        gradient[i] = (function(x + e) - function(x - e)) / (2 * step)
    return gradient.reshape(x.shape)


class Counting(Denoiser):
    """Counts rows, forward and backward, without the methods' own help."""

    def __init__(self, prior: GaussianMixture) -> None:
        super().__init__()
        self.prior, self.schedule, self.rows, self.pulled = prior, prior.schedule, 0, 0

    def forward(self, x_t: Tensor, t: Scalar, A: LinearOperator, y: Tensor, sigma_y: Scalar) -> Posterior:
        self.rows += len(x_t)
        found = self.prior(x_t, t, A, y, sigma_y)
        if found.mean.requires_grad:
            found.mean.register_hook(self._pull)
        return found

    def _pull(self, gradient: Tensor) -> None:
        self.pulled += len(gradient)


@pytest.mark.parametrize("name", NETWORK)
def test_what_is_spent_is_counted(name: str) -> None:
    """A table of costs would compare methods by numbers that are not what they spent."""
    prior = Counting(mixture())
    posterior = problem_of(prior.prior, Inpainting(mask()), count=2)
    posterior = ExactPosterior(prior, posterior.A, posterior.y, posterior.sigma_y)
    told: list[int] = []
    found = METHODS[name](posterior, 3, 6, advance=told.append, **QUICK.get(name, {}))
    assert prior.rows == 2 * found.evaluations
    assert prior.pulled == 2 * found.backward
    assert sum(told) == found.evaluations == METHODS[name].evaluations(3, 6)
    passes = {"dps": 1, "pigdm": 1, "mmps": 3}
    assert found.backward == 18 * passes.get(name, 0)
    assert found.answers.shape == (3, 2, *SHAPE)


@pytest.mark.parametrize("name", METHODS)
def test_results_do_not_depend_on_the_batch(name: str) -> None:
    """A norm, step or noise shared by the batch: a photo would be restored differently beside other photos. The second
    measurement is far off on purpose, so that a norm over both would be another one, and has a noise of its own."""
    prior = mixture()
    A = Inpainting(mask())
    y = problem_of(prior, A, count=1).y
    together = ExactPosterior(prior, A, torch.cat([y, 5 * y]), torch.tensor([0.05, 0.2], dtype=torch.float64))
    alone = ExactPosterior(prior, A, y, 0.05)
    settings = QUICK.get(name, {})
    many = METHODS[name](together, 3, 8, **settings).answers
    one = METHODS[name](alone, 1, 8, **settings).answers
    tolerance = 1e-4 if name == "tv" else 1e-8  # it iterates to a tolerance, until the slowest of the batch is there
    torch.testing.assert_close(many[0, 0], one[0, 0], atol=tolerance, rtol=tolerance)
    if name in NETWORK:
        assert float((many[1, 0] - many[0, 0]).abs().max()) > 1e-3  # and samples differ


@pytest.mark.parametrize("name", NETWORK)
def test_interpolants_agree(name: str) -> None:
    """A method that forgot to change units would be right on VE alone. Schedules cut to one range of noise: the samples
    are the same."""
    vp = VP(start=1e-3)
    high, low = (float(vp.ratio(torch.tensor(t, dtype=torch.float64))) for t in (1.0, 1e-3))
    flow = RectifiedFlow(low / (1 + low), high / (1 + high))
    samples = []
    for schedule in (VE(low, high), vp, flow):
        posterior = problem_of(mixture(schedule), Inpainting(mask()))
        samples.append(METHODS[name](posterior, 1, 6, **QUICK.get(name, {})).answers)
    for other in samples[1:]:
        torch.testing.assert_close(samples[0], other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NETWORK)
def test_iterative_operators_give_what_exact_ones_give(name: str) -> None:
    """A method that reads an operator's insides would work with some operators only, or differently. Those that need
    its singular values say so."""
    prior = mixture()
    matrix = normal(6, D, seed=11) / 4
    exact = problem_of(prior, Matrix(matrix, SHAPE))
    A = CallableOperator(
        lambda x: x.flatten(1) @ matrix.T.to(x), lambda y: (y @ matrix.to(y)).reshape(-1, *SHAPE), shape=SHAPE
    )
    A.tolerance = A.spectral_tolerance = 1e-8
    iterative = ExactPosterior(prior, A, exact.y, exact.sigma_y)
    # the default sampler takes other steps where it does not know the singular values
    settings = {"solver": "dpmpp"} if name in ("eps", "palette") else QUICK.get(name, {})
    if name in ("ddrm", "ddnm"):
        with pytest.raises(MethodError, match=f"{name} needs the singular values.*pigdm"):
            METHODS[name](iterative, 1, 6, **settings)
        return
    a, b = (METHODS[name](p, 1, 6, **settings).answers for p in (exact, iterative))
    # one number for the pivot's trace is Hutchinson's estimate there
    tolerance = 0.3 if name == "zero-shot-pivot" else 1e-4
    assert float((a - b).abs().max()) < tolerance


def test_gradient_of_dps_is_the_derivative_of_the_norm_through_the_network() -> None:
    """Of the squared norm, without the Jacobian or in other units than DDPM's, ``zeta`` would mean something else."""
    prior = mixture(VE(sigma_max=0.6))
    posterior = problem_of(prior, Inpainting(mask()))
    u, q = first_state(prior.schedule)
    step = METHODS["dps"](posterior, 1, 1, zeta=0.0).answers[0] - METHODS["dps"](posterior, 1, 1, zeta=0.3).answers[0]

    def norm(u: Tensor) -> Tensor:
        return ((posterior.y - posterior.A(prior_mean(prior, u, q))) * mask()).norm()

    # x = u / sqrt(1 + q^2), and the new state (q = 0) is in units of x_0
    expected = 0.3 * math.sqrt(1 + q**2) * finite_differences(norm, u)
    torch.testing.assert_close(step, expected, atol=1e-7, rtol=1e-5)


def test_dps_without_guidance_is_ddpm() -> None:
    """Another variance than that of the ancestral step would sample another distribution than DPS's."""
    posterior = problem_of(mixture(VP()), Nothing())
    ours = METHODS["dps"](posterior, 1, 30, zeta=0.0).answers
    times = ddpm_grid(posterior.schedule, 30)
    alpha, sigma = posterior.schedule.alpha(times), posterior.schedule.sigma(times)
    generator = sample_generator(0, 0, 0)
    x = torch.randn(SHAPE, generator=generator, dtype=torch.float64)[None] * sigma[0]
    for i in range(30):
        d = prior_mean(posterior.denoiser, x / alpha[i], float(sigma[i] / alpha[i]))  # type: ignore[arg-type]
        if i == 29:
            x = d
            break
        # Ho et al. 2020, eq. 7, with beta = 1 - a_t / a_s
        a_t, a_s = alpha[i] ** 2, alpha[i + 1] ** 2
        beta = 1 - a_t / a_s
        mean = a_s.sqrt() * beta / (1 - a_t) * d + (a_t / a_s).sqrt() * (1 - a_s) / (1 - a_t) * x
        z = torch.randn(SHAPE, generator=generator, dtype=torch.float64)[None]
        x = mean + ((1 - a_s) / (1 - a_t) * beta).sqrt() * z
    torch.testing.assert_close(ours[0], x, atol=1e-7, rtol=1e-6)


def conditional_mean(prior: Gaussian, A: LinearOperator, y: Tensor, sigma_y: float, u: Tensor, q: float) -> Tensor:
    """``E[x_0 | u, y]`` of a Gaussian prior: condition on both at once, in joint covariances."""
    matrix = torch.cat([torch.eye(D, dtype=torch.float64), dense(A)])
    keep = matrix.abs().sum(1) > 0
    noise = torch.cat([torch.full((D,), q**2), torch.full((len(matrix) - D,), sigma_y**2)]).double()
    matrix, noise, data = matrix[keep], noise[keep], torch.cat([u.flatten(), y.flatten()])[keep]
    total = matrix @ prior.covs[0] @ matrix.T + torch.diag(noise)
    gain = prior.covs[0] @ matrix.T @ torch.linalg.pinv(total, hermitian=True)
    return (prior.means[0] + gain @ (data - matrix @ prior.means[0])).reshape(u.shape)


OPERATORS: dict[str, Callable[[], LinearOperator]] = {
    "mask": lambda: Inpainting(mask()),
    "blur": lambda: GaussianBlur(0.7),
    "matrix": lambda: Matrix(normal(6, D, seed=11) / 4, SHAPE),
}


@pytest.mark.parametrize(
    ("operator", "sigma_y"),
    [(name, s) for s in (0.05, 0.0) for name in OPERATORS if s > 0 or name != "blur"],  # a blur has no stable inverse
)
def test_pigdm_is_exact_for_the_prior_it_is_derived_from(operator: str, sigma_y: float) -> None:
    """A wrong weight of the guidance, or the push-through identity gone wrong, in the one model in which its covariance
    is true. Without noise it takes the pseudo-inverse."""
    prior, A = isotropic(0.4, VE(sigma_max=0.7)), OPERATORS[operator]()
    posterior = problem_of(prior, A, sigma_y)
    u, q = first_state(prior.schedule)
    found = METHODS["pigdm"](posterior, 1, 1, prior_std=0.4, guidance="tweedie").answers[0]
    expected = conditional_mean(prior, A, posterior.y, sigma_y or 1e-6, u, q)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    # with the paper's unit variance it is close, not equal
    assert float((METHODS["pigdm"](posterior, 1, 1, guidance="tweedie").answers[0] - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("operator", OPERATORS)
def test_published_guidance_of_pigdm_is_the_papers_algorithm(operator: str) -> None:
    """In DDPM's ``x`` with dense matrices and the Jacobian by finite differences: the weight
    ``r^2 sqrt(alpha_s alpha_t)`` of the gradient in ``x_t``, after a step whose predicted noise stays the prior's."""
    prior, A = mixture(VP()), OPERATORS[operator]()
    posterior = problem_of(prior, A)
    found = METHODS["pigdm"](posterior, 1, 2, guidance="published", eta=0.0).answers[0]
    matrix = dense(A)
    times = ddpm_grid(posterior.schedule, 2)
    alpha, sigma = posterior.schedule.alpha(times).tolist(), posterior.schedule.sigma(times).tolist()
    alpha[2], sigma[2] = 1.0, 0.0
    x = first_state(posterior.schedule)[0] * alpha[0]
    for i in range(2):
        a, q = alpha[i], sigma[i] / alpha[i]
        d = prior_mean(prior, x / a, q)
        r2 = q**2 / (1 + q**2)
        error = torch.linalg.solve(
            r2 * matrix @ matrix.T + 0.05**2 * torch.eye(len(matrix), dtype=torch.float64),
            posterior.y.flatten() - matrix @ d.flatten(),
        )
        towards = (matrix.T @ error).reshape(d.shape)
        gradient = finite_differences(lambda v, a=a, q=q, w=towards: (prior_mean(prior, v / a, q) * w).sum(), x)
        noise = (x - a * d) / sigma[i]
        x = alpha[i + 1] * d + sigma[i + 1] * noise + math.sqrt(alpha[i + 1] ** 2 * a**2) * r2 * gradient
    torch.testing.assert_close(found, x, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("operator", OPERATORS)
def test_mmps_is_exact_for_every_gaussian_prior(operator: str) -> None:
    """A wrong covariance (Tweedie's ``q^2 dD/du``), or conjugate gradients that do not solve."""
    prior, A = gaussian(VE(sigma_max=0.7)), OPERATORS[operator]()
    posterior = problem_of(prior, A)
    u, q = first_state(prior.schedule)
    expected = conditional_mean(prior, A, posterior.y, 0.05, u, q)
    errors = [
        float((METHODS["mmps"](posterior, 1, 1, iterations=k).answers[0] - expected).abs().max()) for k in (1, 3, 20)
    ]
    assert errors[2] < 1e-7
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("name", ["dps", "pigdm", "mmps"])
def test_pull_back_is_the_transposed_jacobian_of_a_network(name: str) -> None:
    """The gradient through network and preconditioning would be another function's; checked along a direction."""
    network = tiny_network().double()
    denoiser = NetworkDenoiser(network, VE(sigma_max=2.0))
    A = GaussianBlur(1.0)
    y = A(normal(1, 3, 8, 8))
    problem = Problem(ExactPosterior(denoiser, A, y, 0.05), 1, [torch.Generator()], lambda _: None)
    u, v, w = normal(1, 3, 8, 8, seed=1), normal(1, 3, 8, 8, seed=2), normal(1, 3, 8, 8, seed=3)
    _, pull_back = problem.linearize(u, 0.7)
    with torch.no_grad():
        difference = (problem.denoise(u + 1e-5 * w, 0.7) - problem.denoise(u - 1e-5 * w, 0.7)) / 2e-5
    torch.testing.assert_close((v * difference).sum(), (pull_back(v) * w).sum(), rtol=1e-6, atol=1e-8)
    # and the whole method runs through it, in single precision as users have it
    posterior = ExactPosterior(NetworkDenoiser(network.float(), VE(sigma_max=2.0)), A, y.float(), 0.05)
    assert bool(torch.isfinite(METHODS[name](posterior, 1, 3).answers).all())


def unmeasured_variance(s: float, eta: float, ratios: list[float]) -> float:
    """Variance that DDRM's rule for ``s_i = 0`` ends with under the prior ``N(0, s^2)``, by its linear recursion."""
    variance = ratios[0] ** 2
    for q, following in itertools.pairwise(ratios):
        shrink = s**2 / (s**2 + q**2)
        kept = math.sqrt(1 - eta**2) * following / q
        variance = (shrink + kept * (1 - shrink)) ** 2 * variance + (eta * following) ** 2
    return variance


@pytest.mark.parametrize("name", ["ddrm", "ddnm"])
@pytest.mark.parametrize("eta", [0.0, 0.85])
def test_ddrm_and_ddnm_without_noise_keep_what_is_measured_and_sample_the_rest(name: str, eta: float) -> None:
    """Independent pixels, a selection, no noise: the posterior is the measurement where there is one and the prior
    elsewhere. A leak between the two, or other noise in the null space than the papers' rule adds, would show."""
    n, steps = 800, 100
    s = torch.linspace(0.2, 1.0, D, dtype=torch.float64)
    prior = Gaussian(torch.zeros(D, dtype=torch.float64), torch.diag(s**2), VE(), SHAPE)
    posterior = problem_of(prior, Inpainting(mask()), 0.0)
    x = METHODS[name](posterior, n, steps, eta=eta).answers[:, 0].flatten(1)
    seen = mask().flatten() > 0
    torch.testing.assert_close(x[:, seen], posterior.y.flatten()[seen].expand(n, -1), atol=1e-9, rtol=0)
    ratios = [float(r) for r in posterior.schedule.ratio(ddpm_grid(posterior.schedule, steps))]
    expected = torch.tensor([unmeasured_variance(float(v), eta, ratios) for v in s], dtype=torch.float64)
    assert float((x.var(0) / expected - 1)[~seen].abs().max()) < 5 * math.sqrt(2 / n)
    assert float((x.mean(0) / expected.sqrt())[~seen].abs().max()) < 5 / math.sqrt(n)
    # docs/methods.md: the prior itself without fresh noise, and a quarter of its variance short with the papers' eta
    low, high = (0.85, 1.0) if eta == 0 else (0.6, 0.8)
    assert bool(((expected / s**2 > low) & (expected / s**2 < high)).all())


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("q", [2.0, 0.06, 0.02, 0.0])
def test_spectral_transition_is_the_papers_in_singular_vectors(operator: str, q: float) -> None:
    """DDRM's three cases and DDNM+'s ``Lambda`` and ``Phi``, each as its paper writes them, with a dense decomposition:
    a case mistaken for another, or noise that does not add up."""
    prior, A, sigma_y, eta = mixture(), OPERATORS[operator](), 0.05, 0.85
    posterior = problem_of(prior, A, sigma_y)
    problem = Problem(posterior, 1, [sample_generator(0, 0, 0)], lambda _: None)
    u, z = normal(1, *SHAPE, seed=20), normal(1, *SHAPE, seed=21)
    before = 2.5 * max(q, 0.04)
    found = spectral_transition(problem, eta, 1.0)(State(u, before), q, problem.denoise, lambda: z).u

    left, s, right = torch.linalg.svd(dense(A), full_matrices=True)
    s = torch.cat([s, s.new_zeros(D - len(s))])
    d = prior_mean(prior, u, before)
    d_i, u_i, z_i = (right @ v.flatten() for v in (d, u, z))
    uy = torch.zeros(D, dtype=torch.float64)
    projected = left.T @ posterior.y.flatten()
    uy[: min(D, len(projected))] = projected[:D]
    ddrm, ddnm = torch.empty(D, dtype=torch.float64), torch.empty(D, dtype=torch.float64)
    for i in range(D):
        unseen = float(s[i]) < 1e-8
        level = math.inf if unseen else sigma_y / float(s[i])
        y_i = 0.0 if unseen else float(uy[i] / s[i])
        # Kawar et al. 2022, eq. 8
        if unseen:
            ddrm[i] = d_i[i] + math.sqrt(1 - eta**2) * q * (u_i[i] - d_i[i]) / before + eta * q * z_i[i]
        elif q < level:
            ddrm[i] = d_i[i] + math.sqrt(1 - eta**2) * q * (y_i - d_i[i]) / level + eta * q * z_i[i]
        else:
            ddrm[i] = y_i + math.sqrt(q**2 - level**2) * z_i[i]
        # Wang et al. 2023: x_hat = D - A^+ Lambda (A D - y), then Phi
        lam = 1.0 if q >= level else math.sqrt(1 - eta**2) * float(s[i]) * q / sigma_y
        x_hat = d_i[i] if unseen else d_i[i] - lam * (d_i[i] - y_i)
        phi = math.sqrt(q**2 - level**2) if q >= level else eta * q
        along = math.sqrt(1 - eta**2) * q * (u_i[i] - d_i[i]) / before if unseen else 0.0
        ddnm[i] = x_hat + phi * z_i[i] + along
    torch.testing.assert_close(ddrm, ddnm, atol=1e-10, rtol=1e-10)
    # a blur's fresh noise is the same in every coefficient or mixed by equal singular values: compare in signal space
    torch.testing.assert_close(found.flatten(), right.T @ ddrm, atol=1e-8, rtol=1e-6)


def test_ddrm_starts_from_the_measurement() -> None:
    """From noise alone, as DDNM does, the first steps would know nothing of ``y``."""
    prior, A = isotropic(0.4, VE(sigma_max=0.3)), GaussianBlur(0.7)
    posterior = problem_of(prior, A)
    u, q = first_state(prior.schedule)
    found = METHODS["ddrm"](posterior, 1, 1).answers[0]
    _, s, right = torch.linalg.svd(dense(A))
    rotated = right @ dense(A).T @ posterior.y.flatten() / s**2
    noise = right @ u.flatten() / q
    level = 0.05 / s
    start = torch.where(level <= q, rotated + (q**2 - level**2).clamp_min(0).sqrt() * noise, q * noise)
    assert 0 < int((level > q).sum()) < D  # both cases occur
    expected = prior_mean(prior, (right.T @ start).reshape(u.shape), q)
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-6)


def test_step_of_mpgd_is_a_gradient_at_the_denoisers_answer() -> None:
    """Of the squared norm, or with the network's Jacobian, the scale would mean something else."""
    prior = mixture(VE(sigma_max=0.6))
    posterior = problem_of(prior, GaussianBlur(0.7))
    u, q = first_state(prior.schedule)
    d = prior_mean(prior, u, q)
    gradient = finite_differences(lambda x: (posterior.y - posterior.A(x)).norm(), d)
    found = METHODS["mpgd"](posterior, 1, 1, scale=50.0).answers[0]
    c = 50.0 * math.sqrt(D / (3 * 256**2))
    torch.testing.assert_close(found, d - c * gradient, atol=1e-7, rtol=1e-6)


def test_steps_of_mpgd_have_one_length_in_units_of_ddpm() -> None:
    """In ``u``, where they would be shorter than the authors' by the signal's share of ``x_t``, the guidance would come
    too late: it is their scale over the root of the next ``alpha_bar``."""
    prior = mixture(VP())
    posterior = problem_of(prior, GaussianBlur(0.7))
    found = METHODS["mpgd"](posterior, 1, 3, scale=300.0, eta=0.0).answers[0]
    times = ddpm_grid(posterior.schedule, 3)
    alpha, sigma = [*posterior.schedule.alpha(times).tolist()], [*posterior.schedule.sigma(times).tolist()]
    alpha[3], sigma[3] = 1.0, 0.0
    x = first_state(posterior.schedule)[0] * alpha[0]
    for i in range(3):
        d = prior_mean(prior, x / alpha[i], sigma[i] / alpha[i])
        noise = (x - alpha[i] * d) / sigma[i]
        gradient = finite_differences(lambda v: (posterior.y - posterior.A(v)).norm(), d)
        guided = d - 300.0 * math.sqrt(D / (3 * 256**2)) / alpha[i + 1] * gradient
        x = alpha[i + 1] * guided + sigma[i + 1] * noise
    torch.testing.assert_close(found, x, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("operator", OPERATORS)
def test_proximal_step_of_diffpir_is_the_minimum(operator: str) -> None:
    """A wrong ``rho``, or a solve of something else than ``|y - A x|^2 + rho |x - D|^2``."""
    prior, A = mixture(VE(sigma_max=0.6)), OPERATORS[operator]()
    posterior = problem_of(prior, A)
    u, q = first_state(prior.schedule)
    found = METHODS["diffpir"](posterior, 1, 1, weight=5.0).answers[0]
    matrix, d, rho = dense(A), prior_mean(prior, u, q).flatten(), 5.0 * 0.05**2 / q**2
    expected = torch.linalg.solve(
        matrix.T @ matrix + rho * torch.eye(D, dtype=torch.float64), matrix.T @ posterior.y.flatten() + rho * d
    )
    torch.testing.assert_close(found.flatten(), expected, atol=1e-7, rtol=1e-6)


def test_diffpir_renews_its_share_of_the_noise() -> None:
    """Nothing measured, a Gaussian: the states' variance follows a recursion. Another share of fresh noise, or a grid
    that is not quadratic in DDPM's time, ends with another variance."""
    n, steps, zeta, s = 1000, 12, 0.4, 0.5
    prior = isotropic(s, VP(start=1e-3))
    x = METHODS["diffpir"](problem_of(prior, Nothing()), n, steps, zeta=zeta).answers[:, 0].flatten(1)
    t = 1 + (1e-3 - 1) * torch.linspace(0, 1, steps, dtype=torch.float64) ** 0.5
    ratios = [*VP().ratio(t).tolist(), 0.0]
    variance = ratios[0] ** 2
    for q, following in itertools.pairwise(ratios):
        shrink = s**2 / (s**2 + q**2)
        gain = shrink + math.sqrt(1 - zeta) * following / q * (1 - shrink)
        variance = gain**2 * variance + zeta * following**2
    assert float((x - prior.mean).square().mean() / variance) == pytest.approx(1, abs=5 * math.sqrt(2 / (n * D)))


@pytest.mark.parametrize("tau", [0.2, "calibrated"])
def test_langevin_of_daps_has_the_law_it_is_to_have(tau: Any) -> None:
    """Half the drift, another temperature or noise of another size: the chain's law is known exactly, a linear
    recursion in the eigenvectors of ``A^T A``, here stopped early, where the step counts too. Two levels: at the second
    the step is halfway down to a hundredth. Calibrated, the chain is on its way to the posterior under
    ``N(x_hat, q^2 I)``."""
    sigma_y, steps, n = 0.1, 12, 2000
    levels = [0.3, ((0.3 ** (1 / 7) + 0.1 ** (1 / 7)) / 2) ** 7]
    centre = 0.3 * normal(D, seed=5)
    prior = Gaussian(centre, 1e-20 * torch.eye(D, dtype=torch.float64), VE(sigma_max=0.3), SHAPE)  # D = centre
    A = Matrix(normal(6, D, seed=11) / 8, SHAPE)
    posterior = problem_of(prior, A, sigma_y)
    given = 1e-3 / 200 if tau == "calibrated" else 1e-3  # calibrated, it is multiplied by (tau / 0.01)^2 = 200
    found = METHODS["daps"](posterior, n, 4, tau=tau, rate=given, langevin_steps=steps).answers[:, 0].flatten(1)
    matrix, temperature = dense(A), math.sqrt(2) * sigma_y if tau == "calibrated" else tau
    square, basis = torch.linalg.eigh(matrix.T @ matrix)
    pull = 2 * basis.T @ matrix.T @ (posterior.y.flatten() - matrix @ centre) / temperature**2
    mean, variance = -basis.T @ centre, torch.full((D,), 0.3**2, dtype=torch.float64)  # of u - centre, to begin with
    for level, rate, following in zip(levels, (1e-3, 1e-3 * (1 - 0.99 / 2)), (levels[1], 0.0), strict=True):
        mean, variance = 0.01 / level * mean, (0.01 / level) ** 2 * variance  # x_hat: the flow ends at 0.01
        lam = 2 * square / temperature**2 + 1 / level**2
        rho = 1 - rate * lam
        gain = rho**steps + (1 - rho**steps) / (lam * level**2)
        mean = gain * mean + (1 - rho**steps) * pull / lam
        variance = gain**2 * variance + 2 * rate * (1 - rho ** (2 * steps)) / (1 - rho**2) + following**2
    coordinates = (found - centre) @ basis - mean
    assert float((coordinates.mean(0) / variance.sqrt()).abs().max()) < 4.5 / math.sqrt(n)
    assert float((coordinates.var(0) / variance - 1).abs().max()) < 5 * math.sqrt(2 / n)
    if tau == "calibrated":
        q = levels[1]
        prior_of_chain = Gaussian(centre, q**2 * torch.eye(D, dtype=torch.float64), shape=SHAPE)
        exact = prior_of_chain.posterior(A, posterior.y, sigma_y)
        torch.testing.assert_close(centre + basis @ (pull / lam), exact.mean, atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(basis @ torch.diag(1 / lam) @ basis.T, exact.covariance, atol=1e-8, rtol=1e-8)


def test_daps_follows_the_flow_and_anneals() -> None:
    """Langevin switched off, what is left is Euler's probability flow from every level, then fresh noise of the next:
    linear for a Gaussian. Other levels, or noise of another size, would leave another covariance."""
    n, levels, flow_steps = 1000, 10, 3
    prior = gaussian()
    posterior = problem_of(prior, Nothing())
    x = METHODS["daps"](posterior, n, levels * flow_steps, langevin_steps=0, flow_steps=flow_steps).answers[:, 0]

    def karras(high: float, low: float, count: int) -> list[float]:
        return [(high ** (1 / 7) + k / (count - 1) * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for k in range(count)]

    c, basis = torch.linalg.eigh(prior.covariance)
    variance = torch.full_like(c, 80.0**2)
    annealing = karras(80.0, 0.1, levels + 1)[:-1]
    for q, following in itertools.pairwise([*annealing, 0.0]):
        gain = torch.ones_like(c)
        for a, b in itertools.pairwise(karras(q, 0.01, flow_steps + 1)):
            shrink = c / (c + a**2)
            gain = gain * (shrink + b / a * (1 - shrink))
        variance = gain**2 * variance + following**2
    coordinates = (x.flatten(1) - prior.mean) @ basis
    assert float((coordinates.mean(0) / variance.sqrt()).abs().max()) < 4.5 / math.sqrt(n)
    assert float((coordinates.var(0) / variance - 1).abs().max()) < 5 * math.sqrt(2 / n)


def test_daps_is_stable_where_its_operator_amplifies() -> None:
    """The authors' step is at the edge of stability for singular values of 1: with larger ones the chain left for
    infinity. Units of the measurement, scaled with its noise and ``tau``, change nothing but the step's share."""
    prior = gaussian()
    strong = problem_of(prior, 3.0 * Inpainting(mask()), 0.15)
    found = METHODS["daps"](strong, 50, 20, langevin_steps=100).answers
    assert bool(torch.isfinite(found).all())
    plain = ExactPosterior(prior, Inpainting(mask()), strong.y / 3, 0.05)
    same = METHODS["daps"](plain, 50, 20, langevin_steps=100, tau=0.01 / 3, rate=1e-4 / 9).answers
    torch.testing.assert_close(found, same, atol=1e-6, rtol=1e-6)


def test_red_diff_finds_the_minimum_of_its_objective() -> None:
    """At one noise level and a Gaussian prior the objective is a ridge regression: a wrong sign, a weight off by a
    factor of 2 or a mean over the wrong count would move the minimum by 0.09 or more."""
    s, q, weight = 0.5, 1.0, 4.0
    prior = Gaussian(torch.zeros(D, dtype=torch.float64), s**2 * torch.eye(D, dtype=torch.float64), VE(0.999, q), SHAPE)
    A = Matrix(normal(6, D, seed=11) / 2, SHAPE)
    posterior = problem_of(prior, A)
    found = METHODS["red-diff"](posterior, 24, 300, weight=weight, rate=0.02).answers[:, 0].flatten(1)
    matrix = dense(A)
    ridge = weight * q**2 / (q**2 + s**2) / D
    expected = torch.linalg.solve(
        matrix.T @ matrix / 6 + ridge * torch.eye(D, dtype=torch.float64), matrix.T @ posterior.y.flatten() / 6
    )
    assert float((found.mean(0) - expected).abs().max()) < 0.045  # 4.5 standard errors: the optimiser hovers about it


def test_zero_shot_pivot_is_exact_for_denoising() -> None:
    """The noise that matches the trace would be wrong even where the pivot's noise is isotropic."""
    posterior = problem_of(mixture(), Identity(), 0.2)
    ours = METHODS["zero-shot-pivot"](posterior, 2, 10).answers
    theirs = sample(posterior, 2, 10, solver="dpmpp", grid=posterior.schedule.grid(10))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_zero_shot_pivot_matches_the_trace() -> None:
    """Where pixels are missing: the level asked for is the root of the mean variance, and nothing else."""
    prior = mixture(VE(sigma_max=0.6))
    A = Inpainting(mask())
    posterior = problem_of(prior, A)
    u, q = first_state(prior.schedule)
    covariance = torch.linalg.inv(torch.eye(D, dtype=torch.float64) / q**2 + dense(A).T @ dense(A) / 0.05**2)
    mu = covariance @ (u.flatten() / q**2 + dense(A).T @ posterior.y.flatten() / 0.05**2)
    expected = prior_mean(prior, mu.reshape(u.shape), float(covariance.diagonal().mean().sqrt()))
    torch.testing.assert_close(METHODS["zero-shot-pivot"](posterior, 1, 1).answers[0], expected, atol=1e-7, rtol=1e-6)


def test_palette_with_an_exact_prior_is_eps_and_wants_its_own_network() -> None:
    """With no network error the two are one; with another's network its name would be on EPS's results."""
    posterior = problem_of(mixture(), Inpainting(mask()))
    torch.testing.assert_close(METHODS["palette"](posterior, 2, 5).answers, METHODS["eps"](posterior, 2, 5).answers)
    networks = {p: NetworkDenoiser(tiny_network(), VE(), preconditioning=p) for p in ("palette", "spectral")}
    y = torch.zeros(1, 3, 8, 8)
    with pytest.raises(MethodError, match="trained with preconditioning 'palette'"):
        METHODS["palette"](ExactPosterior(networks["spectral"], Identity(), y, 0.05), 1, 2)
    own = ExactPosterior(networks["palette"], Identity(), y, 0.05)
    torch.testing.assert_close(METHODS["palette"](own, 1, 3).samples, sample(own, 1, 3))


def test_linear_estimate_is_the_posterior_mean_of_its_prior() -> None:
    """Another prior variance or a forgotten noise."""
    prior = Gaussian(torch.zeros(D, dtype=torch.float64), 0.25 * torch.eye(D, dtype=torch.float64), shape=SHAPE)
    posterior = problem_of(prior, GaussianBlur(0.7))
    exact = prior.posterior(posterior.A, posterior.y, 0.05).mean
    torch.testing.assert_close(METHODS["linear"](posterior).mean.flatten(), exact, atol=1e-9, rtol=1e-9)


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    """A traceback from inside a method, where the user's choice was at fault."""
    vector = Gaussian(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    posterior = ExactPosterior(vector, Identity(), torch.zeros(1, 3, dtype=torch.float64), 0.1)
    with pytest.raises(MethodError, match="tv restores images"):
        METHODS["tv"](posterior)
    with pytest.raises(MethodError, match="at least that"):
        METHODS["daps"](posterior, nfe=1)
    noiseless = ExactPosterior(vector, Identity(), torch.zeros(1, 3, dtype=torch.float64), 0.0)
    with pytest.raises(MethodError, match="positive sigma_y"):
        METHODS["daps-calibrated"](noiseless)
    with pytest.raises(ValueError, match="at least 1"):
        METHODS["dps"](posterior, n=0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> NetworkDenoiser:
    return load_model(str(save_tiny_model(tmp_path_factory.mktemp("model"))))


@pytest.mark.parametrize("name", [n for n in METHODS if n != "palette"])
def test_restore_takes_every_method(tiny: NetworkDenoiser, name: str) -> None:
    """A method that works on toys and not on a photo, or whose costs and settings do not reach the report."""
    x, y = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 20), indexing="ij")
    photo = Photo(torch.stack([torch.sin(2 * x + k) * torch.cos(y - k) * 0.8 for k in range(3)]))
    task = TaskOptions(task="box", sigma_y=0.05, degrade=True)
    r = restore(build_problem(photo, task), tiny, task, RestoreOptions(samples=2, nfe=4, method=name))
    assert bool(torch.isfinite(r.mean).all())
    assert r.report["evaluations"] == METHODS[name].evaluations(2, 4)
    assert (r.report["backward_passes"] > 0) == (name in ("dps", "pigdm", "mmps"))
    assert set(METHODS[name].settings("box")) <= set(r.report["settings"])


def test_restore_refuses_a_method_that_does_not_fit(tiny: NetworkDenoiser) -> None:
    """Exit code 1 and a traceback, for a choice that the user can change."""
    photo = Photo(torch.zeros(3, 20, 20))
    task = TaskOptions(task="motion", sigma_y=0.05, degrade=True, boundary="reflect")
    problem = build_problem(photo, task)
    with pytest.raises(InputError, match="--method ddrm needs the singular values"):
        restore(problem, tiny, task, RestoreOptions(samples=1, nfe=2, method="ddrm"))
    with pytest.raises(InputError, match="--method palette needs a network"):
        restore(problem, tiny, task, RestoreOptions(samples=1, nfe=2, method="palette"))


def test_recommended_settings_are_settings(tmp_path: Path) -> None:
    """A table with a task or a name that nothing reads."""
    tasks = {"random", "box", "sr", "gaussian", "motion"}
    posterior = problem_of(mixture(), Inpainting(mask()))
    for name, entry in METHODS.items():
        assert entry.settings("inpaint") == entry.settings("random")
        for task in tasks:
            own = entry.settings(task)
            used = entry(posterior, 1, 2, **{**own, **QUICK.get(name, {})}).settings
            assert {k: used[k] for k in own} == own


def test_the_grid_of_the_methods_is_ddpms() -> None:
    """A grid in other units, or one that does not reach down to DDPM's last step, would be another method's."""
    for schedule, top in ((VE(), 80.0), (VP(), 152.16), (RectifiedFlow(), 152.16)):
        q = schedule.ratio(ddpm_grid(schedule, 1000)[:-1])
        assert float(q[0]) == pytest.approx(top, rel=1e-4)  # sqrt(e^10.05 - 1), or where the schedule ends
        t = VP().time(q)
        assert float(t[-1]) == pytest.approx(1e-3, rel=1e-6)
        torch.testing.assert_close(t.diff(), t.diff().mean().expand(999), rtol=1e-5, atol=0)
