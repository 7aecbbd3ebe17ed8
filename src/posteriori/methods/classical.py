"""Estimates without a network: the best linear one, and total variation."""

from __future__ import annotations

from collections.abc import Callable

import torch

from posteriori.denoise import ExactPosterior, NetworkDenoiser
from posteriori.methods.base import Estimate
from posteriori.methods.tv import total_variation
from posteriori.pivot import linear_estimate

# Edge lengths per unit of noise variance: the MAP weight under Laplacian differences of photos in [-1, 1].
TV_PER_VARIANCE = 6.0


def linear(posterior: ExactPosterior, n: int, nfe: int, seed: int, advance: Callable[[int], None]) -> Estimate:
    """Linear MMSE estimate from ``y`` alone under the prior ``N(0, s^2 I)``, ``s`` the denoiser's data deviation."""
    denoiser = posterior.denoiser
    s = denoiser.scaling.data_std if isinstance(denoiser, NetworkDenoiser) else 0.5
    nothing = torch.zeros(posterior.shape, dtype=posterior.y.dtype, device=posterior.y.device)
    # alpha_t = 0: nothing is known but y and the prior
    x = linear_estimate(
        nothing, posterior.y, posterior.A, alpha_t=0.0, sigma_t=1.0, sigma_y=posterior.sigma_y, prior_std=s
    )
    return Estimate(point=x)


def tv(posterior: ExactPosterior, n: int, nfe: int, seed: int, advance: Callable[[int], None]) -> Estimate:
    """Total variation with a weight from the noise alone; :func:`total_variation` takes any other."""
    variance = torch.as_tensor(posterior.sigma_y, dtype=torch.float64) ** 2
    weight = (TV_PER_VARIANCE * variance).clamp_min(1e-5)  # without noise: the least variation that fits y
    found = total_variation(posterior.A, posterior.y, weight if weight.numel() > 1 else float(weight))
    return Estimate(point=found.x)
