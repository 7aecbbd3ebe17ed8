r"""MPGD, manifold-preserving guided diffusion, without projection (He et al. 2024, arXiv 2311.16424).

    D <- D - c grad_D |y - A D|,      then a step of DDIM (eta = 0.5) whose predicted noise stays that of the prior

The gradient is taken at the denoiser's answer: no backward pass through the network. It is that of the **unsquared**
norm, so a step has one length whatever the residual, ``c`` times a singular value of ``A``.

Deviations: the norm is taken for every sample by itself. A pixel's share of a step falls with the size of the image, so
``c = scale sqrt(n / n_256)``, ``n_256`` the entries of the paper's 256x256 colour images: one ``scale`` for all sizes.
The paper's scales (17.5, 7.5 and 4 at 20, 50 and 100 steps) are for 4x downsampling; for the other tasks nothing is
published. ``SETTINGS`` at 100 steps were chosen on photos that are in no test set (docs/methods.md).
"""

from __future__ import annotations

import math
from typing import Any

from posteriori.denoise import ExactPosterior
from posteriori.methods.base import Advance, Estimate, Problem, ddpm_grid, draw
from posteriori.sample import Mean, Noise, State, Transition, ddim

SETTINGS: dict[str, dict[str, Any]] = {"sr": {"scale": 16.0}}
ENTRIES = 3 * 256**2


def mpgd(
    posterior: ExactPosterior, n: int, nfe: int, seed: int, advance: Advance, scale: float = 32.0, eta: float = 0.5
) -> Estimate:
    """MPGD with ``nfe`` steps of one evaluation.

    Args:
        posterior, n, nfe, seed, advance: as for every method.
        scale: see the module's head; for images in [-1, 1].
        eta: fresh noise of DDIM.
    """
    transition, c = ddim(eta), scale * (math.prod(posterior.shape[1:]) / ENTRIES) ** 0.5

    def method(problem: Problem) -> Transition:
        def step(state: State, q: float, mean: Mean, noise: Noise) -> State:
            d = mean(state.u, state.q)
            u = transition(state, q, lambda u, q: d, noise).u
            return State(u - c * problem.misfit_gradient(d), q)

        return step

    return draw(posterior, n, seed, advance, ddpm_grid(posterior.schedule, nfe), method, scale=scale, eta=eta)
