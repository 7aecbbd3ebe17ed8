"""Estimates without a network: the best linear one, and total variation."""

from __future__ import annotations

import torch
from torch import Tensor

from posteriori.denoise import NetworkDenoiser
from posteriori.methods.base import Advance, Estimate, MethodError, Seed
from posteriori.methods.tv import total_variation
from posteriori.pivot import estimate_from_measurement
from posteriori.posterior import ExactPosterior

# Edge lengths per unit of noise variance: the MAP weight under Laplacian differences of photos in [-1, 1].
TV_PER_VARIANCE = 6.0


def linear(posterior: ExactPosterior, n: int, nfe: int, seed: Seed, advance: Advance) -> Estimate:
    """Linear MMSE estimate from ``y`` alone under the prior ``N(0, s^2 I)``, ``s`` the denoiser's data deviation.

    Exact for that prior. No network; ``n``, ``nfe`` and ``seed`` change nothing.
    """
    return Estimate(point=linear_answer(posterior))


def linear_answer(posterior: ExactPosterior) -> Tensor:
    """The linear estimate ``(B, *signal)``."""
    denoiser = posterior.denoiser
    s = denoiser.scaling.data_std if isinstance(denoiser, NetworkDenoiser) else 0.5
    return estimate_from_measurement(posterior.y, posterior.A, posterior.shape, sigma_y=posterior.sigma_y, prior_std=s)


def tv(
    posterior: ExactPosterior, n: int, nfe: int, seed: Seed, advance: Advance, weight: float | None = None
) -> Estimate:
    """Total variation (:mod:`posteriori.methods.tv`), by default with a weight from the noise alone.

    Raises:
        MethodError: when the signals are not images.
    """
    if len(posterior.shape) != 4:
        raise MethodError(f"tv restores images (B, C, H, W), not signals of shape {posterior.shape[1:]}: try linear")
    # without noise: the least variation that fits y
    own = (TV_PER_VARIANCE * torch.as_tensor(posterior.sigma_y, dtype=torch.float64) ** 2).clamp_min(1e-5)
    chosen = weight if weight is not None else own if own.numel() > 1 else float(own)
    return Estimate(point=total_variation(posterior.A, posterior.y, chosen).x, settings={"weight": chosen})
