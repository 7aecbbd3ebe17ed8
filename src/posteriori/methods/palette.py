r"""Palette (Saharia et al. 2022, arXiv 2111.05826): a network trained to restore, told ``x_t`` and the measurement.

The conditional mean ``E[x_0 | x_t, y]`` is the same as that of EPS and so is everything a perfect network would do:
an exact prior gives equal samples. What differs is what the network is given, ``x_t`` and the linear estimate from
``y`` as channels (``preconditioning="palette"``, same network, budget and loss), and how well it learns from it.

Deviations: the paper concatenates the degraded picture; the linear estimate is defined for every operator, tends to
``A^+ y`` as the noise vanishes and does not amplify the noise of a blur. Sampled like EPS, not by 1000 steps of DDPM.
"""

from __future__ import annotations

from typing import Any

from posteriori.denoise import NetworkDenoiser
from posteriori.methods.base import Advance, Estimate, MethodError, Seed
from posteriori.methods.eps import exact_posterior_score
from posteriori.posterior import ExactPosterior


def palette(posterior: ExactPosterior, n: int, nfe: int, seed: Seed, advance: Advance, **options: Any) -> Estimate:
    """The same sampler as EPS on a network trained as Palette.

    Args:
        posterior, n, nfe, seed, advance, **options: as for :func:`exact_posterior_score`.

    Raises:
        MethodError: when the network was trained otherwise.
    """
    denoiser = posterior.denoiser
    if isinstance(denoiser, NetworkDenoiser) and denoiser.preconditioning != "palette":
        raise MethodError(
            f"palette needs a network trained with preconditioning 'palette', this one has "
            f"{denoiser.preconditioning!r}: give such a model, or use eps"
        )
    return exact_posterior_score(posterior, n, nfe, seed, advance, **options)
