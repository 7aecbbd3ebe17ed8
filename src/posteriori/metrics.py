r"""Measures of a reconstruction, of a set of samples, and of how far two distributions are apart.

Images are in [-1, 1], peak to peak 2. Samples of a batch are ``(n, B, *signal)``, as :func:`posteriori.sample` returns
them. Two checks tell whether posterior samples ``x`` can be trusted; the truth ``x_0`` and a true posterior sample are
exchangeable given ``y``, hence

    E |y - A x|^2 / (m sigma_y^2) = 1                               (needs no truth)
    E |x - x_0|^2 = 2 E |mean - x_0|^2,  and for the average of n samples (1 + 1/n) times the error of the mean.

Both are pooled: squares are summed over images first, so that no image with a tiny error dominates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posteriori.operators.base import LinearOperator, Scalar, per_sample

__all__ = [
    "MseRatios", "coverage", "crps", "energy_distance", "mse", "mse_ratios", "psnr", "residual", "residual_squares",
    "sliced_wasserstein", "ssim",
]  # fmt: skip


def mse(x: Tensor, x_0: Tensor) -> Tensor:
    """Mean squared error of every image, shape ``(B,)``, in float64."""
    return (x.double() - x_0.double()).square().flatten(1).mean(1)


def psnr(x: Tensor, x_0: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of every image ``(B,)``: ``x`` clamped to [-1, 1], peak to peak 2."""
    return 10 * torch.log10(4 / mse(x.clamp(-1, 1), x_0))


def ssim(x: Tensor, x_0: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of every image ``(B,)``, clamped; a Gaussian window of 1.5 pixels,
    reflected at the borders."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    value = structural_similarity_index_measure(x.clamp(-1, 1), x_0, reduction="none", data_range=2.0)
    assert isinstance(value, Tensor)
    return value.reshape(-1)


def residual_squares(A: LinearOperator, x: Tensor, y: Tensor, sigma_y: Scalar) -> Tensor:
    """``|y - A x|^2 / sigma_y^2`` of every image, shape ``(B,)``, over the entries that were measured; divide by
    ``A.measurement_count(y)`` for a mean.

    Raises:
        ValueError: when a ``sigma_y`` is not positive: there is no noise to compare with.
    """
    if bool((torch.as_tensor(sigma_y) <= 0).any()):
        raise ValueError("the whitened residual needs a positive sigma_y")
    r = (y - A(x)).double() / per_sample(sigma_y, y.double())
    observed = A.observed(y)
    return (r if observed is None else r * observed).square().flatten(1).sum(1)


def residual(A: LinearOperator, samples: Tensor, y: Tensor, sigma_y: Scalar) -> float:
    """Pooled whitened residual, root mean square: 1 for posterior samples; below 1 the measurement's noise is copied,
    above 1 the measurement is ignored. (Means lie below 1 by right.)

    Args:
        A, y, sigma_y: the measurement of ``B`` signals.
        samples: ``(n, B, *signal)``.
    """
    squares = sum(float(residual_squares(A, x, y, sigma_y).sum()) for x in samples)
    return float(squares / (len(samples) * float(A.measurement_count(y).sum()))) ** 0.5


@dataclass(frozen=True)
class MseRatios:
    """Pooled mean squared errors over that of the posterior mean.

    Attributes:
        one: of a single sample; 2 when samples and mean are right, less when there is too little variety.
        mean: of the average of ``n`` samples; ``1 + 1/n`` when both are right.
        n: number of samples.
    """

    one: float
    mean: float
    n: int


def mse_ratios(samples: Tensor, mean: Tensor, x_0: Tensor) -> MseRatios:
    """Compare ``samples`` ``(n, B, *signal)`` and the posterior ``mean`` ``(B, *signal)`` with the truth."""
    reference = float(mse(mean, x_0).sum())
    one = sum(float(mse(x, x_0).sum()) for x in samples) / len(samples)
    return MseRatios(one / reference, float(mse(samples.double().mean(0), x_0).sum()) / reference, len(samples))


def crps(samples: Tensor, x_0: Tensor) -> Tensor:
    """Continuous ranked probability score of every image, averaged over its entries, shape ``(B,)``.

    The fair form ``E|X - x_0| - E|X - X'|/2`` over distinct pairs (Ferro 2014): its expectation does not depend on the
    number of samples. Lower is better; 0 for certainty that is right.

    Args:
        samples: ``(n, B, *signal)``, ``n >= 2``.
        x_0: ``(B, *signal)``.
    """
    n = len(samples)
    if n < 2:
        raise ValueError("the fair CRPS compares samples with each other: give at least 2")
    ordered = samples.double().sort(dim=0).values
    # Sum over pairs of |x_i - x_j|: the k-th smallest is the larger one k times and the smaller one n - 1 - k times.
    rank = torch.arange(n, dtype=torch.float64, device=samples.device).reshape(-1, *[1] * x_0.ndim)
    spread = ((2 * rank - (n - 1)) * ordered).sum(0) / (n * (n - 1))
    error = (ordered - x_0.double()).abs().mean(0)
    return (error - spread).flatten(1).mean(1)


def coverage(samples: Tensor, x_0: Tensor, level: float = 0.9) -> tuple[float, float]:
    """How often the truth lies in the samples' central interval, entry by entry.

    The interval runs from the k-th smallest to the k-th largest of ``n`` samples. The truth is exchangeable with them,
    so the right answer is ``(n + 1 - 2k) / (n + 1)`` exactly, for any ``n``; ``k`` brings it nearest to ``level``.

    Args:
        samples: ``(n, B, *signal)``.
        x_0: ``(B, *signal)``.
        level: wanted probability of the interval.

    Returns:
        The share of entries inside, and the probability it is to be compared with.
    """
    n = len(samples)
    k = min(max(1, round((1 - level) / 2 * (n + 1))), (n + 1) // 2)
    ordered = samples.sort(dim=0).values
    inside = (ordered[k - 1] <= x_0) & (x_0 <= ordered[n - k])
    return float(inside.double().mean()), max(n + 1 - 2 * k, 0) / (n + 1)


def _points(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    u, v = a.flatten(1).double(), b.flatten(1).double()
    if u.shape[1] != v.shape[1] or min(len(u), len(v)) < 2:
        raise ValueError(f"two sets of at least 2 points of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    return u, v


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 512, seed: int = 0) -> float:
    """Sliced Wasserstein-2 distance between two sets of equally many points ``(N, ...)`` (Bonneel et al. 2015).

    The root of the mean over random directions of the squared distance in one dimension, where sorting is optimal.
    """
    u, v = _points(a, b)
    if len(u) != len(v):
        raise ValueError(f"sliced Wasserstein needs sets of one size, got {len(u)} and {len(v)}: drop some points")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(u.shape[1], projections, generator=generator, dtype=torch.float64).to(u.device)
    directions /= directions.norm(dim=0)
    difference = (u @ directions).sort(dim=0).values - (v @ directions).sort(dim=0).values
    return float(difference.square().mean()) ** 0.5


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Squared energy distance ``2 E|X-Y| - E|X-X'| - E|Y-Y'|`` of two sets of points ``(N, ...)`` and ``(M, ...)``.

    Unbiased (pairs are distinct), hence around 0, also below it, when both come from one distribution
    (Szekely & Rizzo 2013).
    """
    u, v = _points(a, b)

    def within(w: Tensor) -> float:
        return float(torch.pdist(w).mean())

    return 2 * float(torch.cdist(u, v).mean()) - within(u) - within(v)
