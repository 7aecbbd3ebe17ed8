r"""Samples against an exactly known posterior: what is left is the solver's error alone.

    python -m posteriori.bench.mixture [--dims 16 64 --nfe 1 8 20 50 100] [--out mixture.jsonl]

The prior is a Gaussian mixture, so is the posterior given ``y = A x_0 + sigma_y noise``, and the denoiser has no
network error. Distances of 4,096 samples to the posterior stand beside the Monte Carlo floor, which is what 4,096
*exact* samples give: sliced Wasserstein-2 to fresh exact sets, mean (over the root of the trace of the covariance),
covariance (Frobenius, relative) and component weights (total variation). No solver can be expected below the floor.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posteriori.bench.common import markdown_table, say
from posteriori.bench.distances import moment_errors
from posteriori.checkpoint import write_atomically
from posteriori.metrics import sliced_wasserstein
from posteriori.operators import LinearOperator, Matrix
from posteriori.pivot import measure
from posteriori.posterior import ExactPosterior
from posteriori.priors import GaussianMixture
from posteriori.sample import Solver, sample

__all__ = ["Floor", "main", "problem"]

SOLVERS: tuple[Solver, ...] = ("exponential", "dpmpp", "heun", "euler")
MEASURES = ("sw2", "mean", "covariance", "weights")


def problem(d: int, seed: int = 0, components: int = 5) -> tuple[GaussianMixture, LinearOperator, Tensor, float]:
    """A mixture in ``d`` dimensions, a random ``(d/4, d)`` matrix, a measurement and its noise.

    What the measurements tell does not grow with ``d``: several components keep some weight in the posterior.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = torch.rand(components, generator=generator, dtype=torch.float64) + 0.2
    axes = torch.linalg.qr(random(components, d, d)).Q
    variances = torch.logspace(0, -2, d, dtype=torch.float64)
    covs = (axes * variances) @ axes.mT * 0.25
    prior = GaussianMixture(weights, random(components, d) * (8 / d) ** 0.5, covs)
    m = max(d // 4, 1)
    A = Matrix(random(m, d) * (4 / (m * d)) ** 0.5)
    sigma_y = 0.3
    return prior, A, measure(A, prior.sample(1, generator), sigma_y, seed=seed), sigma_y


class Floor:
    """Exact samples of a posterior: what to compare with, and how far they are from each other.

    Args:
        exact: the posterior.
        n: points in a set.
        sets: number of independent sets; distances to all of them are averaged.
    """

    def __init__(self, exact: GaussianMixture, n: int, sets: int = 6, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.exact, self.sets = exact, [exact.sample(n, generator).flatten(1) for _ in range(sets)]

    def distances(self, points: Tensor) -> dict[str, float]:
        """Of a set of points to the posterior."""
        sw2 = [sliced_wasserstein(points, other, seed=k) for k, other in enumerate(self.sets)]
        return {"sw2": float(np.mean(sw2)), **moment_errors(points, self.exact)}

    def values(self) -> dict[str, float]:
        """Of exact samples to the posterior."""
        pairs = [(a, b) for k, a in enumerate(self.sets) for b in self.sets[:k]]
        sw2 = [sliced_wasserstein(a, b, seed=k) for k, (a, b) in enumerate(pairs)]
        moments = [moment_errors(points, self.exact) for points in self.sets]
        return {"sw2": float(np.mean(sw2)), **{k: float(np.mean([m[k] for m in moments])) for k in moments[0]}}


def table(rows: Sequence[dict[str, Any]], floors: dict[int, dict[str, float]]) -> str:
    """Sliced Wasserstein distance as a multiple of the floor, with the floor itself."""
    nfes = sorted({r["nfe"] for r in rows})
    lines = []
    for d, floor in floors.items():
        for name in MEASURES:
            for solver in SOLVERS:
                cells = [r for r in rows if (r["d"], r["solver"]) == (d, solver)]
                found = {r["nfe"]: f"{r[name] / floor[name]:.2f}" for r in cells}
                if found:
                    lines.append([d, name, solver, *[found.get(n, "") for n in nfes], f"{floor[name]:.4f}"])
    return markdown_table(["d", "distance / floor", "solver", *[f"{n} NFE" for n in nfes], "floor"], lines, names=3)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser("python -m posteriori.bench.mixture", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--nfe", type=int, nargs="+", default=[1, 8, 20, 50, 100])
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=SOLVERS)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON lines")
    args = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    floors: dict[int, dict[str, float]] = {}
    for d in args.dims:
        prior, A, y, sigma_y = problem(d, args.seed)
        exact = prior.posterior(A, y, sigma_y)
        floor = Floor(exact, args.samples)
        floors[d] = floor.values()
        say(f"d = {d}: posterior weights {[round(w, 3) for w in exact.weights.tolist()]}, floor {floors[d]}")
        posterior = ExactPosterior(prior, A, y, sigma_y)
        for solver in args.solvers:
            for nfe in args.nfe:
                began = time.perf_counter()
                points = sample(
                    posterior, n=args.samples, nfe=nfe, seed=args.seed, solver=solver, batch_size=args.samples
                ).reshape(args.samples, d)
                seconds = round(time.perf_counter() - began, 2)
                rows.append({"d": d, "solver": solver, "nfe": nfe, **floor.distances(points), "seconds": seconds})
                say(json.dumps(rows[-1]))
    say("\n" + table(rows, floors))
    if args.out:
        lines = [*rows, *[{"d": d, "solver": "exact samples", **values} for d, values in floors.items()]]
        write_atomically(args.out, "".join(json.dumps(r) + "\n" for r in lines).encode())


if __name__ == "__main__":
    main()
