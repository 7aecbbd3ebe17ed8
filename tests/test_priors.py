"""Exact priors against dense float64 algebra done another way."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from posteriori import priors
from posteriori.operators import Inpainting, LinearOperator, Matrix, Nothing
from posteriori.pivot import measure
from posteriori.priors import GaussianMixture


def mixture(d: int, components: int, rank: int, shape: tuple[int, ...] | None = None) -> GaussianMixture:
    generator = torch.Generator().manual_seed(d)
    root = torch.randn(components, d, rank, generator=generator, dtype=torch.float64) / d**0.5
    means = torch.randn(components, d, generator=generator, dtype=torch.float64)
    return GaussianMixture(torch.rand(components, generator=generator) + 0.1, means, root @ root.mT, shape=shape)


def from_the_posterior(
    prior: GaussianMixture, A: LinearOperator, y: Tensor, sigma_y: float, u: Tensor, q: float
) -> Tensor:
    """``E[x_0 | u, y]``: the posterior of one ``y``, denoised at isotropic noise with Cholesky factors of its own."""
    exact = prior.posterior(A, y, sigma_y)
    total = exact.covs + q**2 * torch.eye(u.shape[1], dtype=u.dtype)
    normal = torch.distributions.MultivariateNormal(exact.means, total, validate_args=False)
    r = torch.softmax(exact.weights.log() + normal.log_prob(u[:, None]), 1)
    gain = exact.covs @ torch.linalg.inv(total)
    return torch.einsum("nk,nkd->nd", r, exact.means + torch.einsum("kij,nkj->nki", gain, u[:, None] - exact.means))


@pytest.mark.parametrize("q", [80.0, 2.0, 0.1, 0.002])
@pytest.mark.parametrize("sigma_y", [0.3, 0.001])
@pytest.mark.parametrize("rank", [9, 3], ids=["regular", "singular"])
def test_conditional_mean_is_that_of_the_posterior(q: float, sigma_y: float, rank: int) -> None:
    """Every figure of the exact benchmark rests on this mean; singular covariances, a precise measurement and both
    ends of the noise are where cancellation would show."""
    prior = mixture(9, 4, rank)
    A = Matrix(torch.randn(4, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    y = measure(A, prior.sample(1, torch.Generator().manual_seed(2)), sigma_y, seed=3)
    u = prior.posterior(A, y, sigma_y).sample(50, torch.Generator().manual_seed(4))
    u = u + q * torch.randn(u.shape, generator=torch.Generator().manual_seed(5), dtype=u.dtype)
    answer = prior(u, q, A, y.expand(50, -1), sigma_y).mean
    expected = from_the_posterior(prior, A, y, sigma_y, u, q)
    assert float((answer - expected).abs().max()) < 1e-8  # measured: below 1e-11


def test_one_batch_may_mix_levels_measurements_and_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of a batch would get each other's noise, measurement or mask, in one part of it or across parts."""
    monkeypatch.setattr(priors, "ENTRIES", 3 * 4 * 12)  # three samples at once
    prior = mixture(12, 4, 12, (1, 3, 4))
    masks = (torch.rand(8, 1, 3, 4, generator=torch.Generator().manual_seed(0)) > 0.5).double()
    x = prior.sample(8, torch.Generator().manual_seed(1))
    levels, q = torch.linspace(0.01, 0.5, 8).double(), torch.logspace(-2, 1, 8).double()
    A = Inpainting(masks)
    y = measure(A, x, levels, seed=2)
    u = x + q.reshape(-1, 1, 1, 1) * torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    together = prior(u, q, A, y, levels).mean
    for i in range(8):
        one, level = Inpainting(masks[i]), float(levels[i])
        alone = from_the_posterior(prior, one, y[i : i + 1], level, u[i].flatten()[None], float(q[i]))
        torch.testing.assert_close(together[i].flatten(), alone[0], rtol=1e-9, atol=1e-9)
    # one operator and level, a measurement each
    y = measure(one, x, 0.1, seed=4)
    together = prior(u, q, one, y, 0.1).mean
    for i in range(8):
        alone = from_the_posterior(prior, one, y[i : i + 1], 0.1, u[i].flatten()[None], float(q[i]))
        torch.testing.assert_close(together[i].flatten(), alone[0], rtol=1e-9, atol=1e-9)


def test_what_is_kept_is_that_of_the_operator_asked_for() -> None:
    """A stale decomposition would answer for another operator or noise, silently."""
    prior = mixture(5, 2, 5)
    u, y = prior.sample(3, torch.Generator().manual_seed(0)), torch.zeros(3, 1, dtype=torch.float64)
    rows = torch.eye(5, dtype=torch.float64)
    for _ in range(3):
        for row in rows:  # more operators than are kept, each gone before the next is made
            for sigma_y in (0.1, 0.2):
                A = Matrix(row[None])
                expected = from_the_posterior(prior, A, y[:1], sigma_y, u, 0.5)
                torch.testing.assert_close(prior(u, 0.5, A, y, sigma_y).mean, expected, rtol=1e-9, atol=1e-9)
    assert len(prior._memory) <= priors.MEMORY


def test_derivative_is_the_covariance() -> None:
    """``q^2 dE[x_0|u]/du = Cov[x_0|u]`` (Tweedie): methods that differentiate the denoiser would be given another."""
    prior, q = mixture(4, 3, 4), 0.7
    u = prior.sample(1, torch.Generator().manual_seed(0))
    nothing = torch.zeros(1, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: prior(v[None], q, Nothing(), nothing, 1.0).mean[0], u[0])
    joint = prior.posterior(Matrix(torch.eye(4, dtype=torch.float64)), u, q)
    torch.testing.assert_close(q**2 * jacobian, joint.covariance, rtol=1e-8, atol=1e-10)


def test_samples_that_diverged_stay_apart() -> None:
    """A method that diverges in one sample would end with an error about shapes, or spoil the others."""
    prior = mixture(5, 3, 5)
    u = prior.sample(4, torch.Generator().manual_seed(0))
    zeros = torch.zeros(4, 5, dtype=torch.float64)
    expected = prior(u, 0.3, Nothing(), zeros, 1.0).mean
    broken = u.clone()
    broken[1] = float("nan")
    answer = prior(broken, 0.3, Nothing(), zeros, 1.0).mean
    torch.testing.assert_close(answer[[0, 2, 3]], expected[[0, 2, 3]])
    assert bool(answer[1].isnan().all())
    assert bool(prior(broken[1:2], 0.3, Nothing(), zeros[:1], 1.0).mean.isnan().all())


def test_log_density_integrates_to_one() -> None:
    """The log score would be off by a constant."""
    prior = mixture(2, 3, 2)
    axis = torch.linspace(-8, 8, 400, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    total = float(prior.log_prob(grid).exp().sum()) * float(axis[1] - axis[0]) ** 2
    assert math.isclose(total, 1, rel_tol=1e-3)
