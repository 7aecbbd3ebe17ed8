r"""DDNM+, the denoising diffusion null-space model with noise (Wang et al. 2023, arXiv 2212.00490, section 3.3).

    x_hat = D - A^+ Lambda (A D - y),      u' = x_hat + noise of variance q'^2 less what A^+ Lambda y brings

with, for singular value ``s_i`` (eqs. 17-19 in DDIM's form, as in the authors' code with its eta = 0.85),

    q' >= sigma_y/s_i       lambda_i = 1                                   fresh variance q'^2 - sigma_y^2/s_i^2
    q' <  sigma_y/s_i       lambda_i = sqrt(1 - eta^2) s_i q'/sigma_y      fresh variance eta^2 q'^2
    s_i = 0                 fresh variance eta^2 q'^2, the rest in the direction of the predicted noise

These are the transitions of DDRM with ``eta_b = 1`` (:mod:`posteriori.methods.ddrm`), derived differently. What
differs is the start, from noise alone here, and the number of steps. The last step is the denoiser's answer, which
without noise is projected onto ``A x = y``. An operator without singular values at hand is refused, as there.

Settings: the authors' code (github.com/wyhuai/DDNM, ``evaluation.sh``, ``configs/imagenet_256.yml``,
``functions/svd_ddnm.py``): 100 steps, eta 0.85, no time travel (``travel_length`` and ``travel_repeat`` 1), the same
for all tasks. Its ``--sigma_y`` is in [0, 1], half of ours. No deviations.
"""

from __future__ import annotations

from posteriori.methods.base import Advance, Estimate, Seed, ddpm_grid, draw, needs_spectrum
from posteriori.methods.ddrm import spectral_transition
from posteriori.posterior import ExactPosterior


def ddnm(posterior: ExactPosterior, n: int, nfe: int, seed: Seed, advance: Advance, eta: float = 0.85) -> Estimate:
    """DDNM+ with ``nfe`` steps of one evaluation, uniform in DDPM's time.

    Args:
        posterior, n, nfe, seed, advance: as for every method. The paper takes 100 steps.
        eta: fresh noise.

    Raises:
        MethodError: when the singular values of ``A`` are not at hand.
    """
    needs_spectrum(posterior.A, "ddnm")
    grid = ddpm_grid(posterior.schedule, nfe)
    return draw(posterior, n, seed, advance, grid, lambda p: spectral_transition(p, eta, eta_b=1.0), eta=eta)
