r"""Distances of a set of points to an exactly known posterior, with their Monte Carlo floor.

    sw2            sliced Wasserstein-2 to sets of as many exact samples
    mean           |mean of the points - mean| / sqrt(tr Cov)
    covariance     |covariance of the points - Cov|_F / |Cov|_F
    weights        total variation between the mixture's weights and those of the points
    energy         energy score E|X - Y| - E|X - X'|/2 over exact Y, relative to the one of exact samples
    log_score      mean of -log p(x|y) over the points, less that of exact samples, per dimension
    coverage_50, coverage_90     probability of the points' central interval of every entry, less what it should be

``X`` are the points and ``Y`` exact samples. All but the last three are zero for the posterior itself and positive
otherwise; those are signed: a positive energy is too far away, a negative log score too concentrated, a negative
coverage overconfident. The *floor* of a distance is what as many exact samples give on average (of the signed ones,
their size), the *limit* what 95 % of their sets stay below: no method can be expected below the floor, and one within
the limit cannot be told from exact sampling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posteriori.metrics import coverage
from posteriori.priors import GaussianMixture

__all__ = ["DISTANCES", "SIGNED", "Reference", "energy_score", "moment_errors"]

DISTANCES = ("sw2", "mean", "covariance", "weights", "energy", "log_score", "coverage_50", "coverage_90")
SIGNED = DISTANCES[4:]
DIRECTIONS = 256


def moment_errors(points: Tensor, exact: GaussianMixture) -> dict[str, float]:
    """Errors of mean, covariance and component weights of a set of points ``(N, d)``."""
    covariance = torch.cov(points.T)
    trace = float(exact.covariance.trace())
    return {
        "mean": float((points.mean(0) - exact.mean).norm()) / trace**0.5,
        "covariance": float((covariance - exact.covariance).norm() / exact.covariance.norm()),
        "weights": 0.5 * float((exact.responsibilities(points).mean(0) - exact.weights).abs().sum()),
    }


def energy_score(points: Tensor, truths: Tensor) -> float:
    """``E|X - Y| - E|X - X'|/2`` of an ensemble ``X`` ``(N, d)`` (distinct pairs), averaged over truths ``(M, d)``."""
    return float(torch.cdist(points, truths).mean()) - 0.5 * float(torch.pdist(points).mean())


class Reference:
    """An exact posterior, sets of its samples, and distances to it.

    Args:
        exact: the posterior; its covariances must be positive definite.
        n: points in a set.
        sets: number of independent sets.
        seed: of the sets and of the directions of projection.
    """

    def __init__(self, exact: GaussianMixture, n: int, sets: int = 20, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        d = exact.means.shape[1]
        # drawn together, because roots of covariances are costly; the last ones are for what is compared with many
        drawn = exact.sample((sets + 3) * n, generator).flatten(1)
        self.exact, self.n = exact, n
        self.sets = list(drawn[: sets * n].split(n))
        self.pool = drawn[sets * n :]
        directions = torch.randn(d, DIRECTIONS, generator=generator, dtype=drawn.dtype)
        self.directions = directions / directions.norm(dim=0)
        self._sorted = [self._project(s) for s in self.sets]
        self._log_density = float(exact.log_prob(self.pool).mean())
        self._energy = sum(energy_score(s, self.pool) for s in self.sets) / sets

    def _project(self, points: Tensor) -> Tensor:
        return (points @ self.directions).sort(dim=0).values

    def sw2(self, points: Tensor) -> float:
        """Sliced Wasserstein-2 distance to the sets, averaged over them."""
        mine = self._project(points)
        return float(torch.stack([(mine - other).square().mean().sqrt() for other in self._sorted]).mean())

    def distances(self, points: Tensor) -> dict[str, float]:
        """All of a set of points ``(n, d)``; NaN where the points are not finite."""
        if not bool(torch.isfinite(points).all()):
            return dict.fromkeys(DISTANCES, float("nan"))
        return {"sw2": self.sw2(points), **self._others(points)}

    def _others(self, points: Tensor) -> dict[str, float]:
        values = moment_errors(points, self.exact)
        values["energy"] = energy_score(points, self.pool) / self._energy - 1
        log_density = float(self.exact.log_prob(points).mean())
        values["log_score"] = (self._log_density - log_density) / points.shape[1]
        for level in (50, 90):
            inside, expected = coverage_of(points, self.pool, level / 100)
            values[f"coverage_{level}"] = inside - expected
        return values

    def floor(self) -> tuple[dict[str, float], dict[str, float]]:
        """What exact samples give, of the signed ones the size: on average, and what 95 % of the sets stay below."""
        rows = []
        for k, points in enumerate(self.sets):
            others = [(self._sorted[k] - o).square().mean().sqrt() for j, o in enumerate(self._sorted) if j != k]
            rows.append({"sw2": float(torch.stack(others).mean()), **self._others(points)})
        values = {name: torch.tensor([abs(r[name]) for r in rows], dtype=torch.float64) for name in DISTANCES}
        mean = {name: float(v.mean()) for name, v in values.items()}
        return mean, {name: float(v.quantile(0.95)) for name, v in values.items()}


def coverage_of(points: Tensor, truths: Tensor, level: float) -> tuple[float, float]:
    """:func:`posteriori.metrics.coverage` of one set of points ``(n, d)`` by many truths ``(M, d)``."""
    return coverage(points[:, None], truths, level)
