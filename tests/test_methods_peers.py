"""Methods against deepinv's implementations of them, on problems small enough for exact denoisers.

Each test needs deepinv and is skipped where it, or the torchvision it imports, does not fit the installed torch. Where
deepinv does not follow the paper, the test says so and undoes the difference.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from posteriori.methods import METHODS
from posteriori.methods.base import Problem
from posteriori.methods.ddrm import spectral_transition
from posteriori.operators import Inpainting, Nothing
from posteriori.posterior import ExactPosterior
from posteriori.priors import Gaussian, GaussianMixture
from posteriori.sample import State

SHAPE, D = (1, 4, 4), 16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = (normal(4, 4, seed=2) > 0).double()


def unconditional(prior: GaussianMixture, x: Tensor, sigma: Any) -> Tensor:
    """``E[x_0 | x_0 + sigma noise]`` in float64, returned in the precision of ``x``."""
    level = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1)
    return prior(x.double(), level, Nothing(), torch.zeros_like(x.double()), 1.0).mean.to(x)


def assert_same_law(a: Tensor, b: Tensor, slack: float = 0.0) -> None:
    """Means and deviations of two sets ``(n, d)`` agree within 5 standard errors and ``slack`` of a deviation."""
    n = len(a)
    scale = b.std(0)
    assert float(((a.mean(0) - b.mean(0)) / scale).abs().max()) < 5 * math.sqrt(2 / n) + slack
    assert float((a.std(0) / scale - 1).abs().max()) < 5 / math.sqrt(n) + slack


def test_ddrm_is_deepinvs_up_to_its_noise(deepinv: Any) -> None:
    """A slip that the formulas in test_methods.py share. deepinv divides every noise by sqrt(2), which is right for
    complex coefficients and leaves real ones half their variance: not the paper's. Ours is given the same noise."""
    roots = 0.2 * normal(2, D, D, seed=1)
    prior = GaussianMixture(
        torch.tensor([0.6, 0.4], dtype=torch.float64), 0.5 * normal(2, D, seed=3), roots @ roots.mT / 4, shape=SHAPE
    )
    n, sigma_y, sigmas = 3000, 0.15, [5.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.05]
    y = MASK * (prior.sample(1, torch.Generator().manual_seed(5)) + sigma_y * normal(1, *SHAPE, seed=6))
    physics = deepinv.physics.Inpainting(
        img_size=SHAPE, mask=MASK[None], noise_model=deepinv.physics.GaussianNoise(sigma_y)
    )
    many = y.expand(n, *SHAPE)
    theirs = deepinv.sampling.DDRM(lambda x, s: unconditional(prior, x, s), sigmas=sigmas)(
        many.clone(), physics, seed=7
    )

    posterior = ExactPosterior(prior, Inpainting(MASK), many, sigma_y)
    problem = Problem(posterior, n, [torch.Generator().manual_seed(k) for k in range(n)], lambda _: None)
    step = spectral_transition(problem, 0.85, 1.0)
    spread = (sigmas[0] ** 2 - sigma_y**2 * MASK) ** 0.5
    state = State(many + spread * problem.noise() / 2**0.5, sigmas[0])
    for q in [*sigmas[1:], 0.0]:
        state = step(state, q, problem.denoise, lambda: problem.noise() / 2**0.5)
    assert_same_law(state.u.flatten(1), theirs.flatten(1))


def test_diffpir_is_deepinvs(deepinv: Any) -> None:
    """The whole algorithm: grid, proximal step, share of fresh noise. deepinv works in [0, 1] and keeps the diffusion
    in [-1, 1], so that its ``lambda_`` is twice the weight; it stops at the last noise level instead of 0."""
    prior = Gaussian(0.3 * normal(D, seed=5), 0.15**2 * torch.eye(D, dtype=torch.float64), shape=SHAPE)
    n, sigma_y, steps = 3000, 0.2, 20
    y = MASK * (prior.sample(1, torch.Generator().manual_seed(5)) + sigma_y * normal(1, *SHAPE, seed=6))
    model = deepinv.sampling.DiffPIR(
        lambda z, s: (unconditional(prior, 2 * z - 1, 2 * s) + 1) / 2,
        data_fidelity=deepinv.optim.data_fidelity.L2(),
        max_iter=steps, zeta=0.4, lambda_=8.0,
    )  # fmt: skip
    physics = deepinv.physics.Inpainting(
        img_size=SHAPE, mask=MASK[None], noise_model=deepinv.physics.GaussianNoise(sigma_y / 2)
    )
    theirs = 2 * model((MASK * (y + 1) / 2).expand(n, *SHAPE), physics, seed=7) - 1
    posterior = ExactPosterior(prior, Inpainting(MASK), y, sigma_y)
    ours = METHODS["diffpir"](posterior, n, steps, weight=4.0, zeta=0.4).answers[:, 0]
    assert_same_law(ours.flatten(1), theirs.flatten(1), slack=0.05)


def test_gradient_of_dps_is_deepinvs(deepinv: Any) -> None:
    """The guidance itself, of two signals at once. The rest of deepinv's DPS is not the paper's: it adds the gradient
    to the score, so that the step of ``zeta`` is multiplied by the rate of the SDE."""
    prior = GaussianMixture(
        torch.tensor([0.6, 0.4], dtype=torch.float64), 0.5 * normal(2, D, seed=3),
        torch.stack([0.2 * torch.eye(D, dtype=torch.float64)] * 2), shape=SHAPE,
    )  # fmt: skip
    y = MASK * normal(2, *SHAPE, seed=6) * torch.tensor([1.0, 10.0]).reshape(2, 1, 1, 1)
    problem = Problem(ExactPosterior(prior, Inpainting(MASK), y, 0.1), 2, [], lambda _: None)
    u = normal(2, *SHAPE, seed=8)
    d, pull_back = problem.linearize(u, 0.7)
    ours = pull_back(problem.misfit_gradient(d))
    fidelity = deepinv.sampling.DPSDataFidelity(denoiser=lambda x, s: unconditional(prior, x, s))
    physics = deepinv.physics.Inpainting(img_size=SHAPE, mask=MASK[None].float())
    theirs = fidelity.grad(u.clone(), y.float(), physics, 0.7)
    torch.testing.assert_close(ours, theirs.double(), atol=2e-5, rtol=1e-4)
