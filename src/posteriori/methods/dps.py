r"""DPS, diffusion posterior sampling (Chung et al. 2023, arXiv 2209.14687, algorithm 1).

    x' = ancestral step of DDPM from x_i with D(x_i),      x_{i-1} = x' - zeta grad_{x_i} |y - A D(x_i)|

The gradient of the **unsquared** norm, through the network: the step has a length that does not depend on how far the
residual still is. With ``x = u / sqrt(1 + q^2)`` the factor in ``u`` is ``zeta sqrt((1 + q'^2)(1 + q^2))``.

Settings: the authors' code (github.com/DPS2022/diffusion-posterior-sampling, ``configs/*_config.yaml``): 1000 steps,
``scale`` 0.3 for downsampling and both blurs, 0.5 for inpainting (random; a box is a comment in the same file). The
paper's appendix states larger ones. A step has one length whatever the size of the image.

Deviations: the variance of the ancestral step is DDPM's posterior variance, where the paper's networks learn theirs;
the norm is taken for every sample by itself, where the authors' code takes it over the batch; the denoiser's answer is
not clipped to [-1, 1] (their ``clip_denoised``), since signals have no range here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from posteriori.methods.base import Advance, Estimate, Problem, Seed, ddpm_grid, draw
from posteriori.posterior import ExactPosterior
from posteriori.sample import Mean, Noise, State, Transition, ddim

SETTINGS: dict[str, dict[str, Any]] = {"random": {"zeta": 0.5}, "box": {"zeta": 0.5}}


def dps(posterior: ExactPosterior, n: int, nfe: int, seed: Seed, advance: Advance, zeta: float = 0.3) -> Estimate:
    """DPS with ``nfe`` steps, one evaluation and one backward pass each.

    Args:
        posterior, n, nfe, seed, advance: as for every method. The paper takes 1000 steps.
        zeta: step on the gradient, for images in [-1, 1]: 0.3 (downsampling, blur) or 0.5 (inpainting).
    """
    ancestral = ddim(eta=1.0)

    def method(problem: Problem) -> Transition:
        def step(state: State, q: float, mean: Mean, noise: Noise) -> State:
            d, pull_back = problem.linearize(state.u, state.q)
            gradient: Tensor = pull_back(problem.misfit_gradient(d))
            u = ancestral(state, q, lambda u, q: d, noise).u
            return State(u - zeta * ((1 + q**2) * (1 + state.q**2)) ** 0.5 * gradient, q)

        return step

    return draw(posterior, n, seed, advance, ddpm_grid(posterior.schedule, nfe), method, zeta=zeta)
