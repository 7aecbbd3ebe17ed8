r"""DiffPIR, diffusion for plug-and-play restoration (Zhu et al. 2023, arXiv 2305.08995, algorithm 1).

    x_hat = argmin |y - A x|^2 + rho |x - D|^2,      rho = weight sigma_y^2 / q^2
    u'    = x_hat + q' (sqrt(1 - zeta) (u - x_hat)/q + sqrt(zeta) z)

The proximal step is one ``gram_solve``: the linear estimate under the prior ``N(D, q^2/weight I)``. With ``zeta = 0``
the second line is a deterministic step of DDIM with ``x_hat`` for the mean.

``weight`` is the paper's lambda when image, ``sigma_y`` and ``q`` have one unit. The authors' code keeps ``sigma_y`` in
[0, 1] and ``q`` in [-1, 1], so that its ``lambda_`` is four times ours.

Settings: the authors' code (github.com/yuanzhi-zhu/DiffPIR, ``main_ddpir_deblur.py``, ``main_ddpir_sisr.py``,
``main_ddpir_inpainting.py``): 100 steps, ``lambda_`` 7 and ``zeta`` 0.3 for both blurs at a noise of 12.75/255 in
[0, 1], that is 0.1 here; ``zeta`` 0.25 and ``lambda_`` from 2 to 12 for downsampling; 1 and 1 for inpainting, which is
published without noise only.

Deviations: the data step is taken at the last noise level too, which theirs leaves out. The noise of the measurement
counts as at least 1e-3, as there (in the units of either).
"""

from __future__ import annotations

from typing import Any

import torch

from posteriori.methods.base import Advance, Estimate, Problem, Seed, ddpm_grid, draw
from posteriori.posterior import ExactPosterior
from posteriori.sample import Mean, Noise, State, Transition, euler

INPAINTING = {"weight": 0.25, "zeta": 1.0}
SETTINGS: dict[str, dict[str, Any]] = {"random": INPAINTING, "box": INPAINTING, "sr": {"zeta": 0.25}}


def diffpir(
    posterior: ExactPosterior, n: int, nfe: int, seed: Seed, advance: Advance, weight: float = 1.75, zeta: float = 0.3
) -> Estimate:
    """DiffPIR with ``nfe`` steps of one evaluation, spaced quadratically in DDPM's time.

    Args:
        posterior, n, nfe, seed, advance: as for every method. The paper takes 20 or 100 steps.
        weight: of the prior in the proximal step, a quarter of the authors' ``lambda_``.
        zeta: share of fresh noise, 0 to 1: near 1 for inpainting, 0.1 to 0.4 for the rest.
    """

    def method(problem: Problem) -> Transition:
        s_y = torch.as_tensor(problem.sigma_y).clamp_min(1e-3).to(problem.y)
        a = weight * s_y**2  # rho q^2

        def step(state: State, q: float, mean: Mean, noise: Noise) -> State:
            d = mean(state.u, state.q)
            b = state.q**2
            x = problem.A.gram_solve(a, b, problem.scalar(a) * d, b * problem.y, unit=b * s_y**2)
            kept = euler(state, (1 - zeta) ** 0.5 * q, lambda u, q: x, noise).u
            return State(kept + zeta**0.5 * q * noise() if q > 0 else kept, q)

        return step

    grid = ddpm_grid(posterior.schedule, nfe, power=2.0)
    return draw(posterior, n, seed, advance, grid, method, weight=weight, zeta=zeta)
