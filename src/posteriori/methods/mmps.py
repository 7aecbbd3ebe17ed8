r"""MMPS, moment-matching posterior sampling (Rozet et al. 2024, arXiv 2405.13712).

    p(x_0 | u) is taken for N(D, V),     V = Cov[x_0 | u] = q^2 dD/du                          (Tweedie's formula)
    E[x_0 | u, y] = D + V A^T (sigma_y^2 I + A V A^T)^-1 (y - A D)

The system is solved by a few conjugate gradients, every product with ``V`` being a backward pass. Exact for every
Gaussian prior once they have converged.

Settings: the authors' code: DDIM with eta = 1 (github.com/francois-rozet/mmps-benchmark,
``configs/diffusion_config.yaml``, ``guided_diffusion/condition_methods.py``), 10 to 1000 steps of 1 or 5 iterations
(``scripts/make_metrics.sh``); 1 in github.com/francois-rozet/diffusion-priors. No setting is tuned.

Deviations: 3 iterations, between the authors' 1 and 5, by conjugate gradients (the paper's; their benchmark takes
GMRES). Products with ``(dD/du)^T`` stand for those with ``dD/du``, which are equal for an exact denoiser and not for a
network (the authors do the same). A direction in which a network's ``V`` is not positive ends the sample's solve where
it stands.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from posteriori.methods.base import Advance, Estimate, Problem, Seed, ddpm_grid, draw
from posteriori.operators.base import per_sample
from posteriori.posterior import ExactPosterior
from posteriori.sample import Mean, Noise, State, Transition, ddim


def mmps(
    posterior: ExactPosterior, n: int, nfe: int, seed: Seed, advance: Advance, iterations: int = 3, eta: float = 1.0
) -> Estimate:
    """MMPS with ``nfe`` steps, one evaluation and ``iterations + 1`` backward passes each.

    Args:
        posterior, n, nfe, seed, advance: as for every method.
        iterations: conjugate gradients per step; the paper takes 1 to 5.
        eta: fresh noise of DDIM.
    """
    transition = ddim(eta)

    def method(problem: Problem) -> Transition:
        s_y = per_sample(problem.sigma_y, problem.y)

        def step(state: State, q: float, mean: Mean, noise: Noise) -> State:
            d, pull_back = problem.linearize(state.u, state.q)

            def covariance(v: Tensor) -> Tensor:
                """``V A^T v``."""
                return state.q**2 * pull_back(problem.A.adjoint(v))

            v = _conjugate_gradients(lambda v: s_y**2 * v + problem.A(covariance(v)), problem.residual(d), iterations)
            guided = d + covariance(v)
            return transition(state, q, lambda u, q: guided, noise)

        return step

    grid = ddpm_grid(posterior.schedule, nfe)
    return draw(posterior, n, seed, advance, grid, method, iterations=iterations, eta=eta)


def _conjugate_gradients(matrix: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """``matrix^-1 b`` from 0, a fixed number of iterations, every sample by itself."""

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return per_sample((u * v).flatten(1).sum(1), b)

    x, r, p = torch.zeros_like(b), b, b
    square, start = dot(r, r), dot(r, r)
    for _ in range(iterations):
        product = matrix(p)
        curvature = dot(p, product)
        going = (curvature > 0) & (square > 1e-20 * start)
        step = torch.where(going, square / torch.where(going, curvature, torch.ones_like(curvature)), 0.0)
        x, r = x + step * p, r - step * product
        new = dot(r, r)
        p = torch.where(going, r + new / square.clamp_min(torch.finfo(b.dtype).tiny) * p, p)
        square = torch.where(going, new, torch.zeros_like(new))
    return x
