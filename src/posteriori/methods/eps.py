"""EPS: the backbone's own sampler on the exact posterior score (arXiv 2606.17048)."""

from __future__ import annotations

import math
from collections.abc import Callable

from posteriori.denoise import ExactPosterior
from posteriori.methods.base import Estimate
from posteriori.sample import sample

# Samples evaluated at once: as many as fill this many pixels. Larger batches cost memory and gain nothing on a CPU.
PIXELS_AT_ONCE = 2 * 256**2


def exact_posterior_score(
    posterior: ExactPosterior, n: int, nfe: int, seed: int, advance: Callable[[int], None]
) -> Estimate:
    """The posterior mean by one evaluation at the largest noise, and ``n`` samples by DPM-Solver++(2M)."""
    mmse = posterior.mean(seed)
    advance(1)
    at_once = max(1, PIXELS_AT_ONCE // math.prod(posterior.shape[-2:]))
    samples = sample(posterior, n, nfe, seed, batch_size=at_once, progress=advance)
    return Estimate(mmse=mmse, samples=samples, evaluations=1 + n * nfe)
