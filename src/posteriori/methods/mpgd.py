r"""MPGD, manifold-preserving guided diffusion, without projection (He et al. 2024, arXiv 2311.16424, algorithm 1).

    D <- D - c grad_D |y - A D|,      then a step of DDIM (eta = 0.5) whose predicted noise stays that of the prior

The gradient is taken at the denoiser's answer: no backward pass through the network. It is that of the **unsquared**
norm, so a step has one length whatever the residual: ``c`` has to suit the image's size, ``A`` and the number of steps.

Deviations: the norm is taken for every sample by itself. The paper's scales (17.5, 7.5 and 4 at 20, 50 and 100 steps)
are for 4x downsampling of 256x256 faces; for other tasks nothing is published. ``SETTINGS`` are our own choice at 100
steps on 128x128 photos that are in no test set (docs/methods.md).
"""

from __future__ import annotations

from typing import Any

from posteriori.denoise import ExactPosterior
from posteriori.methods.base import Advance, Estimate, Problem, ddpm_grid, draw
from posteriori.sample import Mean, Noise, State, Transition, ddim

SETTINGS: dict[str, dict[str, Any]] = {}


def mpgd(
    posterior: ExactPosterior, n: int, nfe: int, seed: int, advance: Advance, scale: float = 4.0, eta: float = 0.5
) -> Estimate:
    """MPGD with ``nfe`` steps of one evaluation.

    Args:
        posterior, n, nfe, seed, advance: as for every method.
        scale: ``c``, for images in [-1, 1].
        eta: fresh noise of DDIM.
    """
    transition = ddim(eta)

    def method(problem: Problem) -> Transition:
        def step(state: State, q: float, mean: Mean, noise: Noise) -> State:
            d = mean(state.u, state.q)
            u = transition(state, q, lambda u, q: d, noise).u
            return State(u - scale * problem.misfit_gradient(d), q)

        return step

    return draw(posterior, n, seed, advance, ddpm_grid(posterior.schedule, nfe), method, scale=scale, eta=eta)
