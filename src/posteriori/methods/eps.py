"""EPS: the backbone's own sampler on the exact posterior score (arXiv 2606.17048)."""

from __future__ import annotations

import math

from posteriori.methods.base import PIXELS_AT_ONCE, Advance, Estimate, Seed
from posteriori.posterior import ExactPosterior
from posteriori.rescheduled import Rescheduled
from posteriori.sample import sample
from posteriori.schedule import schedule_from_config


def exact_posterior_score(
    posterior: ExactPosterior,
    n: int,
    nfe: int,
    seed: Seed,
    advance: Advance,
    schedule: dict[str, object] | None = None,
    **options: object,
) -> Estimate:
    """The posterior mean by one evaluation at the largest noise, and ``n`` samples by the default sampler.

    Args:
        posterior, n, nfe, seed, advance: as for every method.
        schedule: another interpolant than the network's to sample on, as ``{"kind": "RectifiedFlow"}``; see
            :func:`posteriori.schedule.schedule_from_config`.
        **options: of :func:`posteriori.sample`, such as ``solver``.

    A network that looks twice spends one evaluation more on a measurement, which is counted. With ``nfe=1`` the samples
    of a network that knows the mean without ``x_t`` are that mean.
    """
    told = dict(options) if schedule is None else {**options, "schedule": schedule}
    if schedule is not None:
        denoiser = Rescheduled(posterior.denoiser, schedule_from_config(schedule))
        posterior = ExactPosterior(denoiser, posterior.A, posterior.y, posterior.sigma_y)
    mmse = posterior.mean(seed)
    advance(1)
    looks = 1 + posterior.denoiser.refines
    if nfe == 1 and posterior.denoiser.blind_mean:
        advance(n)
        return Estimate(mmse=mmse, samples=mmse.expand(n, *mmse.shape), evaluations=looks, settings=told)
    at_once = max(1, PIXELS_AT_ONCE // math.prod(posterior.shape[-2:]))
    samples = sample(posterior, n, nfe, seed, batch_size=at_once, progress=advance, **options)  # type: ignore[call-overload]
    return Estimate(mmse=mmse, samples=samples, evaluations=looks + n * nfe, settings=told)
