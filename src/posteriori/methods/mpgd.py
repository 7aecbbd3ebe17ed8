r"""MPGD, manifold-preserving guided diffusion, without projection (He et al. 2024, arXiv 2311.16424).

    D <- D - c sqrt(1 + q'^2) grad_D |y - A D|,      then a step of DDIM (eta = 0.5) whose noise stays the prior's

The gradient is taken at the denoiser's answer: no backward pass through the network. It is that of the **unsquared**
norm, so a step has one length whatever the residual: ``c`` in DDPM's ``x = u / sqrt(1 + q^2)``, times a singular value
of ``A``. (The authors divide ``scale`` by the square root of the next level's ``alpha_bar``.)

Settings: the authors' code (github.com/KellyYutongHe/mpgd_pytorch, in ``linear_inv``
``scripts/wo_proj_ffhq_super_resolution.sh`` and ``configs/mgpd_diffusion_config.yaml``): ``scale`` 17.5, 7.5 and 4 at
20, 50 and 100 steps for 4x downsampling at ``sigma_y = 0.05``. For the other tasks nothing is published.

Deviations: the norm is taken for every sample by itself. A pixel's share of a step falls with the size of the image, so
``c = scale sqrt(n / n_256)``, ``n_256`` the entries of the paper's 256x256 colour images: one ``scale`` for all sizes.
The denoiser's answer is not clipped to [-1, 1].
"""

from __future__ import annotations

import math

from posteriori.methods.base import Advance, Estimate, Problem, Seed, ddpm_grid, draw
from posteriori.posterior import ExactPosterior
from posteriori.sample import Mean, Noise, State, Transition, ddim

ENTRIES = 3 * 256**2


def mpgd(
    posterior: ExactPosterior, n: int, nfe: int, seed: Seed, advance: Advance, scale: float = 4.0, eta: float = 0.5
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
            return State(u - c * (1 + q**2) ** 0.5 * problem.misfit_gradient(d), q)

        return step

    return draw(posterior, n, seed, advance, ddpm_grid(posterior.schedule, nfe), method, scale=scale, eta=eta)
