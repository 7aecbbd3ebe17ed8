r"""How well diffusers' schedulers sample an exact posterior, through the pipeline of :mod:`posteriori.export`.

The prior is a Gaussian, so a deterministic scheduler is an affine map of the noise it starts from, and run from 0 and
from the unit vectors it tells the mean and the covariance of its samples exactly. What remains is the discretisation.
Errors are whitened by the exact posterior ``N(m, L L^T)`` in ``d`` dimensions:

    mean        |L^-1 (mean - m)| / sqrt(d)
    covariance  |L^-1 cov L^-T - I|_F / sqrt(d)         1 where samples have no spread at all
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posteriori.bench.common import Results, markdown_table, say
from posteriori.operators import Downsampling
from posteriori.pivot import measure
from posteriori.posterior import ExactPosterior
from posteriori.priors import Gaussian

__all__ = ["STOCHASTIC", "distribution", "draw", "errors", "field"]

STEPS = (5, 10, 20, 50, 100)
#: Schedulers that add noise on the way: mean and covariance of these are those of samples.
STOCHASTIC = ("ddpm", "euler-ancestral")
SAMPLES = 10_000


def field(side: int = 4, length: float = 2.0, std: float = 0.5, seed: int = 0) -> ExactPosterior:
    """A grey image of ``side x side`` correlated pixels, of which the averages of 2x2 are measured, in float64."""
    at = torch.cartesian_prod(*[torch.arange(side, dtype=torch.float64)] * 2)
    cov = std**2 * torch.exp(-torch.cdist(at, at) / length)
    prior = Gaussian(torch.zeros(side**2, dtype=torch.float64), cov, shape=(1, side, side))
    x_0 = prior.sample(1, torch.Generator().manual_seed(seed))
    A = Downsampling(2)
    return ExactPosterior(prior, A, measure(A, x_0, 0.05, seed), 0.05)


def distribution(pipe: Any, posterior: ExactPosterior, steps: int) -> tuple[Tensor, Tensor]:
    """Mean ``(d,)`` and covariance ``(d, d)`` of a deterministic scheduler's samples of one measurement."""
    d = math.prod(posterior.shape[1:])
    start = torch.cat([torch.zeros(1, d), torch.eye(d)]).reshape(d + 1, *posterior.shape).to(posterior.y)
    y, A, sigma_y = posterior.y, posterior.A, posterior.sigma_y
    ends = pipe(y, A, sigma_y, steps, d + 1, latents=start, output_type="pt").images.reshape(d + 1, d)
    root = (ends[1:] - ends[0]).T
    return ends[0], root @ root.T


def draw(pipe: Any, posterior: ExactPosterior, steps: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The same of ``n`` samples; the covariance's Monte Carlo error is ``sqrt((d + 1) / n)``."""
    generator = torch.Generator().manual_seed(seed)
    y, A, sigma_y = posterior.y, posterior.A, posterior.sigma_y
    x = pipe(y, A, sigma_y, steps, n, generator, output_type="pt").images.reshape(n, -1)
    return x.mean(0), torch.cov(x.T)


def errors(mean: Tensor, cov: Tensor, exact: Any) -> tuple[float, float]:
    """Errors of a mean and a covariance, see the module's head; ``exact`` has them as attributes."""
    factor = torch.linalg.cholesky(exact.covariance)
    white = torch.linalg.solve_triangular(factor, (mean - exact.mean).unsqueeze(1), upper=False)
    half = torch.linalg.solve_triangular(factor, cov, upper=False)
    spread = torch.linalg.solve_triangular(factor, half.mT, upper=False) - torch.eye(len(mean), dtype=mean.dtype)
    return float(white.norm()) / len(mean) ** 0.5, float(spread.norm()) / len(mean) ** 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        "python -m posteriori.bench.schedulers", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; what it has is not measured again")
    parser.add_argument("--side", type=int, default=4, help="side of the image")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of the schedulers that add noise")
    args = parser.parse_args(arguments)

    import diffusers

    from posteriori.export import SCHEDULERS, to_pipeline

    diffusers.utils.logging.set_verbosity_error()  # it warns of settings that a scheduler does not have
    posterior = field(args.side)
    prior: Any = posterior.denoiser
    exact = prior.posterior(posterior.A, posterior.y, 0.05)
    pipe = to_pipeline(prior)
    pipe.set_progress_bar_config(disable=True)
    shared = pipe.scheduler.config
    results = Results(args.out, ("scheduler", "steps", "side"))
    rows = []
    for name, kind in SCHEDULERS.items():
        pipe.scheduler = getattr(diffusers, kind).from_config(shared)

        def row(steps: int, n: int | None = args.samples if name in STOCHASTIC else None) -> dict[str, Any]:
            found = draw(pipe, posterior, steps, n) if n else distribution(pipe, posterior, steps)
            return dict(zip(("mean", "covariance"), errors(*found, exact), strict=True))

        each = [results.get(partial(row, steps), scheduler=name, steps=steps, side=args.side) for steps in STEPS]
        rows.append([f"`{kind}`", f"`{name}`", *[f"{r['covariance']:.2g}" for r in each], f"{each[-1]['mean']:.1g}"])
        say(f"{name}: covariance {', '.join(rows[-1][2:-1])}; mean {rows[-1][-1]}")
    header = ["scheduler", "`--scheduler`", *[f"{s} steps" for s in STEPS], f"mean, {STEPS[-1]} steps"]
    say("\n" + markdown_table(header, rows, 2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
