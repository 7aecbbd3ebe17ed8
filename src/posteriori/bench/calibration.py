r"""Calibration over many draws: the rank of the truth among posterior samples is uniform.

    x_0 ~ p(x_0),   y ~ p(y | x_0),   x_1..x_n ~ p(x_0 | y)    =>    #{f(x_i, y) < f(x_0, y)} is uniform on 0..n

for every function ``f`` (simulation-based calibration, Talts et al. 2018). A method that draws from the posterior
passes for all ``f``; a failure for one is a proof. The functions here:

    seen       a random combination of what the operator measures
    hidden     a random combination of the directions it sees least
    density    log p(x) + log p(y|x): too concentrated or too wide (Modrak et al. 2023)
    distance   to a point drawn from the prior: TARP's coverage of credible regions (Lemos et al. 2023)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from posteriori.metrics import residual_squares
from posteriori.operators import LinearOperator
from posteriori.priors import GaussianMixture, dense_matrix

__all__ = ["FUNCTIONS", "deviation", "deviation_limit", "rank_rows"]

FUNCTIONS = ("seen", "hidden", "density", "distance")


def rank_rows(
    prior: GaussianMixture, A: LinearOperator, y: Tensor, sigma_y: float, truth: Tensor, samples: Tensor, seed: int = 0
) -> dict[str, list[int]]:
    """Rank of the truth among its samples for each of :data:`FUNCTIONS`, ``(B,)`` whole numbers from 0 to ``n``.

    Args:
        prior, A, y, sigma_y: the problem, with ``B`` measurements.
        truth: ``(B, *signal)``.
        samples: ``(n, B, *signal)``; samples that are not finite count as smaller than anything.
        seed: of the random combinations and points.
    """
    batch = samples.shape[1]
    generator = torch.Generator().manual_seed(seed)
    matrix = dense_matrix(A, truth.shape[1:], 1, truth)[0]
    _, vectors = torch.linalg.eigh(matrix.T @ matrix)
    half = max(1, vectors.shape[1] // 2)
    seen = vectors[:, half:] @ torch.randn(vectors.shape[1] - half, generator=generator, dtype=truth.dtype)
    hidden = vectors[:, :half] @ torch.randn(half, generator=generator, dtype=truth.dtype)
    points = prior.sample(batch, generator).flatten(1)

    def functions(x: Tensor) -> dict[str, Tensor]:
        flat = x.flatten(1)
        return {
            "seen": flat @ seen,
            "hidden": flat @ hidden,
            "density": prior.log_prob(x) - 0.5 * residual_squares(A, x, y, sigma_y),
            "distance": (flat - points).norm(dim=1),
        }

    of_truth = functions(truth)
    ranks = {name: torch.zeros(batch, dtype=torch.long) for name in FUNCTIONS}
    for x in samples:
        usable = torch.isfinite(x).flatten(1).all(1)
        values = functions(torch.where(usable.reshape(-1, *[1] * (x.ndim - 1)), x, torch.zeros_like(x)))
        for name in FUNCTIONS:
            ranks[name] += ((values[name] < of_truth[name]) | ~usable).long()
    return {name: r.tolist() for name, r in ranks.items()}


def deviation(ranks: Sequence[int] | np.ndarray, n: int) -> float:
    """Largest distance between the distribution of ranks and the uniform one on ``0..n``."""
    counts = np.bincount(np.asarray(ranks), minlength=n + 1)
    return float(np.abs(np.cumsum(counts) / len(ranks) - np.arange(1, n + 2) / (n + 1)).max())


def deviation_limit(draws: int, n: int, probability: float = 0.95, trials: int = 2000, seed: int = 0) -> float:
    """What :func:`deviation` of uniform ranks exceeds with ``1 - probability``, by simulation."""
    rng = np.random.default_rng(seed)
    found = [deviation(rng.integers(0, n + 1, draws), n) for _ in range(trials)]
    return float(np.quantile(found, probability))
