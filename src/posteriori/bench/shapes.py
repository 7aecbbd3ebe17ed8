r"""Signals that are not images: posterior samples of 1-D and 3-D problems against their exact posterior.

    python -m posteriori.bench.shapes [--nfe 20 50 100] [--out shapes.jsonl]

Each prior is a mixture of Gaussian processes that differ in mean and correlation length, so the posterior is a known
mixture; the distances and their Monte Carlo floor are those of :mod:`posteriori.bench.mixture`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posteriori import operators
from posteriori.bench.common import markdown_table, say
from posteriori.bench.mixture import MEASURES, Floor
from posteriori.checkpoint import write_atomically
from posteriori.operators import LinearOperator
from posteriori.pivot import measure
from posteriori.posterior import ExactPosterior
from posteriori.priors import GaussianMixture
from posteriori.sample import sample

__all__ = ["PROBLEMS", "ShapeProblem", "main", "process_mixture"]

SIGNAL, VOLUME = (1, 48), (1, 4, 5, 4)


@dataclass(frozen=True)
class ShapeProblem:
    """A name, the shape of a signal without the batch, and the operator."""

    name: str
    shape: tuple[int, ...]
    A: LinearOperator


def process_mixture(shape: Sequence[int], lengths: Sequence[float] = (1.0, 2.5, 5.0), seed: int = 0) -> GaussianMixture:
    """Mixture of Gaussian processes on the grid of ``shape`` (channels first): squared-exponential covariances of
    these correlation lengths, in grid steps, about random means; float64."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.stack(torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in shape[1:]], indexing="ij"), -1)
    points = grid.reshape(-1, len(shape) - 1)
    squares = torch.cdist(points, points).square()
    covs = torch.stack([0.25 * torch.exp(-0.5 * squares / length**2) for length in lengths])
    covs = covs + 1e-4 * torch.eye(len(points), dtype=torch.float64)
    means = 0.4 * torch.randn(len(lengths), 1, generator=generator, dtype=torch.float64).expand(-1, len(points))
    return GaussianMixture(torch.ones(len(lengths)).double(), means.contiguous(), covs, shape=tuple(shape))


def _missing_segments() -> Tensor:
    mask = torch.ones(SIGNAL)
    mask[..., 6:15] = 0
    mask[..., 30:42] = 0
    return mask


def _problems() -> tuple[ShapeProblem, ...]:
    slices = torch.zeros(VOLUME)
    slices[:, ::3] = 1
    generator = torch.Generator().manual_seed(1)
    places = torch.randperm(SIGNAL[-1], generator=generator)[:14].sort().values
    blob = torch.tensor([0.25, 0.5, 0.25])
    return (
        ShapeProblem("1-D blur, reflect", SIGNAL, operators.GaussianBlur(2.0, dims=1)),
        ShapeProblem("1-D irregular samples", SIGNAL, operators.Sampling(places, SIGNAL[-1])),
        ShapeProblem("1-D missing segments", SIGNAL, operators.Inpainting(_missing_segments())),
        ShapeProblem("3-D blur, reflect", VOLUME, operators.GaussianBlur(0.8, dims=3)),
        ShapeProblem("3-D blur, circular", VOLUME, operators.Blur(torch.einsum("i,j,k->ijk", *[blob] * 3), "circular")),
        ShapeProblem("3-D random mask", VOLUME, operators.Inpainting(torch.rand(VOLUME, generator=generator) > 0.6)),
        ShapeProblem("3-D every third slice", VOLUME, operators.Inpainting(slices)),
    )


PROBLEMS = _problems()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser("python -m posteriori.bench.shapes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--nfe", type=int, nargs="+", default=[20, 50, 100])
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--sigma-y", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON lines")
    args = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    lines: list[list[str]] = []
    for problem in PROBLEMS:
        prior = process_mixture(problem.shape, seed=args.seed)
        truth = prior.sample(1, torch.Generator().manual_seed(args.seed))
        y = measure(problem.A, truth, args.sigma_y, seed=args.seed)
        floor = Floor(prior.posterior(problem.A, y, args.sigma_y), args.samples)
        base = floor.values()
        found = []
        for nfe in args.nfe:
            posterior = ExactPosterior(prior, problem.A, y, args.sigma_y)
            points = sample(posterior, n=args.samples, nfe=nfe, seed=args.seed, batch_size=args.samples)
            found.append(floor.distances(points.reshape(args.samples, -1)))
            rows.append({"problem": problem.name, "solver": problem.A.solver, "nfe": nfe, **found[-1], "floor": base})
            say(json.dumps(rows[-1]))
        for name in MEASURES:
            ratios = [f"{f[name] / base[name]:.2f}" if base[name] > 1e-4 else "(certain)" for f in found]
            lines.append([problem.name, problem.A.solver, name, *ratios, f"{base[name]:.4f}"])
    header = ["problem", "solver", "distance / floor", *[f"{n} NFE" for n in args.nfe], "floor"]
    say("\n" + markdown_table(header, lines, names=3))
    if args.out:
        write_atomically(args.out, "".join(json.dumps(r) + "\n" for r in rows).encode())


if __name__ == "__main__":
    main()
