r"""The pivot: what a noisy signal and a measurement together say about the signal, for any prior.

    x_t = alpha_t x_0 + sigma_t noise,      y = A x_0 + sigma_y noise'

Both are Gaussian given ``x_0``, so their product is (EPS paper, theorem 1)

    Lambda = alpha_t^2/sigma_t^2 I + A^T A/sigma_y^2,     Sigma* = Lambda^-1,
    mu*    = Sigma* (alpha_t/sigma_t^2 x_t + A^T y/sigma_y^2) = x_0 + N(0, Sigma*),

and the pivot ``mu*`` is sufficient for ``x_0``: ``E[x_0 | x_t, y] = E[x_0 | mu*]``. Multiplied by
``sigma_t^2 sigma_y^2`` nothing is divided by a small number, and the pivot is one :meth:`gram_solve`:

    mu* = (alpha_t^2 sigma_y^2 I + sigma_t^2 A^T A)^-1 (alpha_t sigma_y^2 x_t + sigma_t^2 A^T y).

A Gaussian prior ``N(m, s^2 I)`` adds its precision, which gives the linear MMSE estimate

    x_lin = (Lambda + I/s^2)^-1 (Lambda mu* + m/s^2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import cast

import torch
from torch import Tensor

from posteriori.operators.base import LinearOperator, Scalar, SpectralFunction, per_sample

__all__ = ["estimate_from_measurement", "linear_estimate", "measure", "noise_variance", "pivot", "sample_pivot"]


def _validate(sigma_y: Scalar) -> None:
    if _positive(sigma_y):
        return
    s = torch.as_tensor(sigma_y)
    if not bool(torch.isfinite(s).all()) or bool((s < 0).any()):
        raise ValueError(f"sigma_y must be finite and not negative, got {s.flatten().tolist()[:4]}")


def _positive(sigma_y: Scalar) -> bool:
    """Whether it is a positive number, known without a look at any tensor: the usual case, and 0 has its own limits."""
    return isinstance(sigma_y, float) and 0 < sigma_y < math.inf


def measure(A: LinearOperator, x_0: Tensor, sigma_y: Scalar, seed: int | None = None) -> Tensor:
    """Simulate a measurement ``y = A x_0 + sigma_y noise``.

    Args:
        A: the operator.
        x_0: signals ``(B, *signal)``; images in [-1, 1].
        sigma_y: noise standard deviation in the units of ``x_0``; one number or one per sample ``(B,)``.
        seed: of the noise; sample ``i`` gets the same noise whatever the batch size. ``None`` draws from PyTorch's
            global generator.

    Returns:
        ``(B, *measurement)``; entries that are not measured are 0.
    """
    _validate(sigma_y)
    y: Tensor = A(x_0)
    noise = torch.randn_like(y) if seed is None else seeded_noise(y.shape, seed, y)
    y = y + per_sample(sigma_y, y) * noise
    observed = A.observed(y)
    return y if observed is None else y * observed


def seeded_noise(shape: torch.Size, seed: int, like: Tensor) -> Tensor:
    """Standard normal noise, one generator per sample of the batch: results do not depend on the batch size."""
    rows = [torch.randn(shape[1:], generator=sample_generator(seed, i), dtype=like.dtype) for i in range(shape[0])]
    return torch.stack(rows).to(like.device)


def sample_generator(seed: int, *index: int) -> torch.Generator:
    """A CPU generator for one sample. Streams of different indices are independent (splitmix64 of the path)."""
    state = seed & 0xFFFFFFFFFFFFFFFF
    for i in index:
        state = (state ^ (i + 0x9E3779B97F4A7C15)) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return torch.Generator().manual_seed(state & 0x7FFFFFFFFFFFFFFF)


def sample_generators(seed: int | Sequence[int], batch: int, copies: Iterable[int] = (0,)) -> list[torch.Generator]:
    """A generator for every sample of a batch of measurements, sample-major: entry ``j * batch + b`` is ``copies[j]``
    of measurement ``b``.

    Args:
        seed: one for all, when measurement ``b`` has the stream ``(seed, b, k)``; or one for each, when it has
            ``(seed_b, 0, k)`` whatever it is batched with.
        batch: number of measurements.
        copies: numbers ``k`` of the samples.

    Raises:
        ValueError: when there are as many seeds as do not fit the batch.
    """
    if isinstance(seed, Integral):  # NumPy's integers too
        return [sample_generator(int(seed), b, k) for k in copies for b in range(batch)]
    seeds = [int(s) for s in cast("Sequence[int]", seed)]
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds do not fit a batch of {batch}: give one number, or one for each")
    return [sample_generator(s, 0, k) for k in copies for s in seeds]


def pivot(
    x_t: Tensor,
    y: Tensor,
    A: LinearOperator,
    *,
    alpha_t: Scalar,
    sigma_t: Scalar,
    sigma_y: Scalar,
    guess: Tensor | None = None,
) -> Tensor:
    """The pivot ``mu*`` (EPS paper, theorem 1).

    Args:
        x_t: noisy signals ``(B, *signal)``.
        y: measurements ``(B, *measurement)``.
        A: the operator.
        alpha_t, sigma_t: signal and noise scale of ``x_t``; numbers or one per sample ``(B,)``; ``alpha_t > 0``.
        sigma_y: measurement noise; 0 gives the limit ``A^+ y + (I - A^+ A) x_t / alpha_t``.
        guess: something close to the pivot, shape of ``x_t``: saves iterations where ``A`` solves iteratively and
            changes nothing else.

    Returns:
        ``mu*``, shape of ``x_t``.

    Raises:
        ValueError: when ``alpha_t`` is 0 (the pivot does not exist; the linear estimate does), ``sigma_y`` is negative
            or not finite, or is 0 for an operator without a stable pseudo-inverse.
    """
    if bool((torch.as_tensor(alpha_t) <= 0).any()):
        raise ValueError(
            "the pivot does not exist at alpha_t = 0: start the time grid below it, or use linear_estimate"
        )
    return linear_estimate(
        x_t, y, A, alpha_t=alpha_t, sigma_t=sigma_t, sigma_y=sigma_y, prior_std=math.inf, guess=guess
    )


def estimate_from_measurement(
    y: Tensor, A: LinearOperator, shape: Sequence[int], *, sigma_y: Scalar, prior_std: Scalar
) -> Tensor:
    """Linear MMSE estimate of ``x_0``, of shape ``shape`` with the batch first, from ``y`` alone.

    It tends to ``A^+ y`` as ``sigma_y -> 0``; ``A^+ y`` itself would amplify the noise of a blur without bound.
    """
    # alpha_t = 0: x_t says nothing
    return linear_estimate(y.new_zeros(shape), y, A, alpha_t=0.0, sigma_t=1.0, sigma_y=sigma_y, prior_std=prior_std)


def linear_estimate(
    x_t: Tensor,
    y: Tensor,
    A: LinearOperator,
    *,
    alpha_t: Scalar,
    sigma_t: Scalar,
    sigma_y: Scalar,
    prior_std: Scalar,
    prior_mean: Scalar = 0.0,
    guess: Tensor | None = None,
) -> Tensor:
    """Linear MMSE estimate of ``x_0`` from ``(x_t, y)`` under the prior ``N(prior_mean, prior_std^2 I)``.

    Well conditioned at every noise, also at ``alpha_t = 0``. Arguments as in :func:`pivot`; ``prior_std`` and
    ``prior_mean`` are numbers or one per sample. ``prior_std = inf`` is the pivot.
    """
    _validate(sigma_y)
    alpha, sigma = per_sample(alpha_t, x_t), per_sample(sigma_t, x_t)
    s_y, variance = per_sample(sigma_y, x_t), sigma**2
    prior_precision = variance * per_sample(prior_std, x_t) ** -2
    # Posterior under the prior and x_t alone, as a noisy signal of precision `precision` (times sigma_t^2).
    precision = alpha**2 + prior_precision
    term = alpha * x_t
    if isinstance(prior_mean, Tensor) or prior_mean != 0:
        term = term + prior_precision * per_sample(prior_mean, x_t)

    noiseless = None if _positive(sigma_y) else s_y == 0
    if noiseless is not None and bool(noiseless.any()):
        limit = A.pinv(y) + A.null_projection(term / precision)
        if bool(noiseless.all()):
            return limit
        rest = linear_estimate(
            x_t, y, A, alpha_t=alpha_t, sigma_t=sigma_t, prior_std=prior_std, prior_mean=prior_mean,
            sigma_y=torch.where(noiseless, torch.ones_like(s_y), s_y).reshape(-1), guess=guess,
        )  # fmt: skip
        return torch.where(noiseless, limit, rest)
    return A.gram_solve(
        _flat(precision * s_y**2),
        _flat(variance),
        s_y**2 * term,
        per_sample(sigma_t, y) ** 2 * y,
        unit=_flat(variance * s_y**2),
        **({} if guess is None or A.exact else {"guess": guess}),
    )


def _flat(value: Tensor) -> Tensor:
    return value.reshape(-1)


def noise_variance(
    A: LinearOperator, like: Tensor, *, alpha_t: Scalar, sigma_t: Scalar, sigma_y: Scalar
) -> SpectralFunction:
    """``lam -> Q^2``: the eigenvalue of ``Sigma*`` that belongs to the eigenvalue ``lam`` of ``A^T A``.

    ``Q^2 = sigma_t^2 sigma_y^2 / (alpha_t^2 sigma_y^2 + sigma_t^2 lam)``; where ``lam = 0`` it is
    ``q_t^2 = (sigma_t / alpha_t)^2``, also at ``sigma_y = 0``.
    """

    def function(lam: Tensor) -> Tensor:
        reference = lam.new_empty(1).expand(like.shape[0], *[1] * (lam.ndim - 1))
        alpha, sigma = per_sample(alpha_t, reference), per_sample(sigma_t, reference)
        s_y = per_sample(sigma_y, reference)
        numerator, denominator = sigma**2 * s_y**2, alpha**2 * s_y**2 + sigma**2 * lam
        if _positive(sigma_y):
            return numerator / denominator
        unseen = (s_y == 0) & A.unseen(lam)
        regular = numerator / torch.where(unseen, torch.ones_like(denominator), denominator)
        return torch.where(unseen, (sigma / alpha) ** 2, regular)

    return function


def sample_pivot(
    x_0: Tensor, A: LinearOperator, *, alpha_t: Scalar, sigma_t: Scalar, sigma_y: Scalar, seed: int | None = None
) -> Tensor:
    """Draw ``mu* = x_0 + N(0, Sigma*)`` directly, without ``x_t`` and ``y``.

    Needs ``Sigma*^(1/2)``, one :meth:`LinearOperator.spectral`. Arguments as in :func:`pivot` and :func:`measure`.
    """
    _validate(sigma_y)
    noise = torch.randn_like(x_0) if seed is None else seeded_noise(x_0.shape, seed, x_0)
    variance = noise_variance(A, x_0, alpha_t=alpha_t, sigma_t=sigma_t, sigma_y=sigma_y)
    return x_0 + A.spectral(lambda lam: variance(lam).sqrt(), noise)
