r"""The search for the sampler of posterior ODEs: solvers, grids and warm starts on exact priors and on photos.

    python -m posteriori.bench.sampler --out runs/sampler [--photos VALIDATION_PHOTOS] [--parts attempts grid curves]

Exact priors (:mod:`posteriori.bench.exact_problems`): mixtures in 2, 16 and 64 dimensions and a mixture fitted to 8x8
patches of photos; selection, blur, downsampling, random projections; sigma_y .01, .05, .3. The denoiser makes no error.
Two kinds of distances. *Distribution*: sliced Wasserstein-2, mean, covariance and mode weights of the samples against
the exact posterior, over the Monte Carlo floor. *Solver*: the same noises carried to 0 by 300 steps of the exponential
integrator are the truth; paired with it a sample has no Monte Carlo error, and what is left is the solver's own:

    pair         root mean square of the difference, over the posterior's standard deviation
    covariance   |C - C_truth|_F / |C_truth|_F
    whitened     the same in units of the posterior, sqrt(|W (C - C_truth) W^T|_F^2 / d):  sees measured directions
    residual     |rms of (y - A x)/sigma_y over that of the truth - 1|

*Held out* are problems that no sampler was chosen on: other priors, operators and measurements (another seed), other
sizes and noises, 3 or 8 components. The curves' samplers are measured on them at fewer numbers of evaluations.

Photos: centre crops of validation photos in five tasks by the bundled model. Rows are kept in the output folder, and a
run that was stopped continues.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posteriori.bench.common import HalfPrecision, Results, markdown_table, photo_files, say
from posteriori.bench.distances import Reference, moment_errors
from posteriori.bench.exact_problems import OperatorName, PriorSpec, make_measurement, make_operator, make_prior
from posteriori.bench.patches import PatchFit, bundled_photos, patch_mixture
from posteriori.bench.photos import TASKS
from posteriori.bench.photos import Problem as PhotoProblem
from posteriori.bench.sampler_tables import curve_table, figure, solver_table, summary
from posteriori.bench.sampler_variants import (
    ancestral,
    churned,
    gaussian_end,
    open_exponential,
    pilot_grid,
    pivot_euler,
)
from posteriori.checkpoint import load, write_atomically
from posteriori.exponential import exponential
from posteriori.grids import time_grid
from posteriori.metrics import crps, mse, mse_ratios, residual, sliced_wasserstein
from posteriori.pivot import sample_generator
from posteriori.posterior import ExactPosterior
from posteriori.solvers import State, Transition, ddim, dpmpp, euler, heun, steps_for, stochastic

__all__ = ["ATTEMPTS", "PROBLEMS", "Attempt", "Exact", "carry", "main"]

Make = Callable[[ExactPosterior], Transition]
Row = dict[str, Any]
Curves = dict[str, dict[int, list[Row]]]
PARTS = ("attempts", "grid", "curves", "held-out")
NFE = (4, 5, 6, 8, 10, 12, 16, 20, 50, 100)

# prior, d, operator, sigma_y
PROBLEMS: tuple[tuple[str, int, OperatorName, float], ...] = (
    ("mixture", 2, "selection", 0.05),
    ("mixture", 2, "projection", 0.3),
    ("mixture", 16, "selection", 0.05),
    ("mixture", 16, "blur", 0.01),
    ("mixture", 16, "downsampling", 0.3),
    ("mixture", 16, "projection", 0.01),
    ("mixture", 64, "selection", 0.3),
    ("mixture", 64, "blur", 0.05),
    ("mixture", 64, "downsampling", 0.05),
    ("mixture", 64, "projection", 0.05),
    ("patches", 64, "selection", 0.05),
    ("patches", 64, "blur", 0.05),
    ("patches", 64, "downsampling", 0.01),
)
# prior, d, operator, sigma_y, seed, components
HELD_OUT: tuple[tuple[str, int, OperatorName, float, int, int], ...] = (
    ("mixture", 2, "blur", 0.1, 11, 3),
    ("mixture", 2, "selection", 0.02, 12, 8),
    ("mixture", 16, "selection", 0.02, 13, 8),
    ("mixture", 16, "blur", 0.1, 14, 3),
    ("mixture", 36, "downsampling", 0.02, 15, 8),
    ("mixture", 36, "projection", 0.1, 16, 3),
    ("mixture", 36, "blur", 0.03, 17, 5),
    ("mixture", 100, "selection", 0.1, 18, 5),
    ("mixture", 100, "projection", 0.02, 19, 8),
    ("patches", 36, "selection", 0.02, 20, 15),
    ("patches", 36, "downsampling", 0.1, 21, 15),
    ("patches", 100, "blur", 0.03, 22, 15),
)
HELD_OUT_NFE = (6, 8, 12, 20, 100)


@dataclass(frozen=True)
class Attempt:
    """A sampler: its transition, and its times for ``nfe`` evaluations of a problem."""

    transition: Make
    grid: str = "posterior"
    options: tuple[tuple[str, float], ...] = ()
    paired: bool = False  # two evaluations a step

    def times(self, posterior: ExactPosterior, nfe: int) -> Tensor:
        steps = steps_for("heun", nfe) if self.paired else nfe
        if self.grid.startswith("pilot"):
            _, measure, power = self.grid.split(" ")
            return pilot_grid(posterior, nfe, measure, float(power))  # type: ignore[arg-type]
        options = dict(self.options)
        s = posterior.denoiser.data_std
        scaled = {k: v * s if k in ("start", "stop") else v for k, v in options.items()}
        return time_grid(posterior.schedule, steps, self.grid, s, **scaled)  # type: ignore[arg-type]


def _as(transition: Transition) -> Make:
    return lambda _: transition


CURVES = {
    "Euler, EDM's grid": Attempt(_as(euler), "karras"),
    "Heun, EDM's grid": Attempt(_as(heun), "karras", paired=True),
    "DPM-Solver++ 2M, EDM's grid (the old default)": Attempt(_as(dpmpp), "karras"),
    "DPM-Solver++ 2M, posterior grid": Attempt(_as(dpmpp)),
    "exponential, posterior grid (the default)": Attempt(exponential),
}
ATTEMPTS = {
    **CURVES,
    "Euler, posterior grid": Attempt(_as(euler)),
    "DPM-Solver++ 2M, warm start at 5, rho 3, to .05": Attempt(
        _as(dpmpp), options=(("start", 10.0), ("stop", 0.1), ("rho", 3.0))
    ),
    "exponential, EDM's grid": Attempt(exponential, "karras"),
    "exponential, 1 value": Attempt(partial(exponential, order=1)),
    "exponential, 2 values": Attempt(partial(exponential, order=2)),
    "exponential, 4 values": Attempt(partial(open_exponential, order=4)),
    "exponential, 2 values, corrector": Attempt(partial(open_exponential, order=2, corrector=True)),
    "exponential, 3 values, corrector": Attempt(partial(open_exponential, corrector=True)),
    "exponential, log q levelling off at 8 s": Attempt(partial(open_exponential, knee=8.0)),
    "exponential, log q levelling off at 8 s, corrector": Attempt(partial(open_exponential, knee=8.0, corrector=True)),
    "exponential, polynomial in theta": Attempt(partial(open_exponential, clock="theta")),
    "exact for the prior alone": Attempt(partial(open_exponential, exact="prior")),
    "data prediction, 3 values (DPM-Solver++ 3M)": Attempt(partial(open_exponential, exact="nothing")),
    "data prediction, 3 values, corrector (UniPC-3)": Attempt(
        partial(open_exponential, exact="nothing", corrector=True)
    ),
    "DPM-Solver++ 2M, Gaussian noise at the end": Attempt(gaussian_end),
    "Euler for the pivot": Attempt(pivot_euler, options=(("start", 4.0),)),
    "DDIM eta 1, EDM's grid": Attempt(_as(ddim(1.0)), "karras"),
    "DDIM eta 1, posterior grid": Attempt(_as(ddim(1.0))),
    "EDM stochastic": Attempt(_as(stochastic(40.0, 4)), "karras", paired=True),
    "ancestral with the Gaussian's variance": Attempt(ancestral),
    "exponential, noise raised 10 % in .05 to 1": Attempt(churned(exponential, 0.1, 0.05, 1.0)),
    "exponential, noise raised 30 % in .05 to 1": Attempt(churned(exponential, 0.3, 0.05, 1.0)),
    "exponential, pilot: equal change of the mean": Attempt(exponential, "pilot mean 1"),
    "exponential, pilot: root of that change": Attempt(exponential, "pilot mean 0.5"),
    "exponential, pilot: equal entropy": Attempt(exponential, "pilot entropy 1"),
    "exponential, pilot: root of the entropy": Attempt(exponential, "pilot entropy 0.5"),
}
GRID = {
    f"{start:g} {stop:g} {rho:g}": Attempt(exponential, options=(("start", start), ("stop", stop), ("rho", rho)))
    for start, stop, rho in [
        *[(a, 0.01, 15.0) for a in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 16.0, 40.0)],
        *[(5.0, b, 15.0) for b in (0.0025, 0.005, 0.02, 0.04, 0.1)],
        *[(5.0, 0.01, c) for c in (3.0, 7.0, 50.0)],
    ]
}


@torch.no_grad()
def carry(posterior: ExactPosterior, make: Make, times: Tensor, start: Tensor, seed: int = 0) -> Tensor:
    """Standard normal ``start`` ``(n, *signal)`` carried along ``times`` to noise 0."""
    schedule, problem = posterior.schedule, posterior.expand(len(start))
    generator = torch.Generator().manual_seed(seed)
    q = [float(r) for r in schedule.ratio(times)]

    def mean(u: Tensor, level: float) -> Tensor:
        t = schedule.time(torch.tensor(level, dtype=torch.float64))
        return problem.denoise(float(schedule.alpha(t)) * u, float(t)).mean

    def noise() -> Tensor:
        return torch.randn(start.shape, generator=generator, dtype=start.dtype)

    transition, state = make(problem), State(start * q[0], q[0])
    for level in q[1:]:
        state = transition(state, level, mean, noise)
    return state.u


class Exact:
    """A problem with a known posterior, and what attempts are compared with."""

    def __init__(
        self, prior: str, d: int, operator: OperatorName, sigma_y: float, n: int, photos: Path, out: Path,
        seed: int = 0, components: int = 0,
    ) -> None:  # fmt: skip
        self.name, self.d = f"{prior} {d}, {operator}, {sigma_y:g}", d
        A = make_operator(operator, d, seed)
        if prior == "patches":
            self.prior = patch_mixture(
                photos, d, components or 20, PatchFit(patches=8000, iterations=15, seed=seed), out / "fits"
            )
        else:
            self.prior = make_prior(PriorSpec("mixture", d, components or 5), A, seed)
        y = make_measurement(self.prior, A, sigma_y, 1001 + seed)[1]
        self.exact, self.posterior = self.prior.posterior(A, y, sigma_y), ExactPosterior(self.prior, A, y, sigma_y)
        shape = self.posterior.shape[1:]
        self.start = torch.stack(
            [torch.randn(shape, generator=sample_generator(7, k), dtype=torch.float64) for k in range(n)]
        )

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.exact, len(self.start))

    @cached_property
    def truth(self) -> Tensor:
        times = time_grid(
            self.posterior.schedule, 300, "posterior", self.prior.data_std, start=20.0, stop=0.003, rho=15.0
        )
        return carry(self.posterior, exponential, times, self.start)

    def residual(self, x: Tensor) -> float:
        return residual(self.posterior.A, x.unsqueeze(1), self.posterior.y, self.posterior.sigma_y)

    def row(self, attempt: Attempt, nfe: int) -> dict[str, Any]:
        began = time.perf_counter()
        x = carry(self.posterior, attempt.transition, attempt.times(self.posterior, nfe), self.start)
        seconds = time.perf_counter() - began
        points, truth, covariance = x.flatten(1), self.truth.flatten(1), self.exact.covariance
        change = torch.cov(points.T) - torch.cov(truth.T)
        lam, axes = torch.linalg.eigh(covariance)
        white = axes / lam.clamp_min(1e-12).sqrt()
        solver = {
            "pair": float((points - truth).square().sum(1).mean() / covariance.trace()) ** 0.5,
            "covariance": float(change.norm() / torch.cov(truth.T).norm()),
            "whitened": float((white.T @ change @ white).norm()) / self.d**0.5,
            "residual": abs(self.residual(x) / self.residual(self.truth) - 1),
        }
        distances = {"sw2": self.reference.sw2(points), **moment_errors(points, self.exact)}
        return {"solver": solver, "distances": distances, "seconds": round(seconds, 3)}

    def floor(self) -> dict[str, Any]:
        sets = self.reference.sets
        pairs = [sliced_wasserstein(a, b, 256) for k, a in enumerate(sets) for b in sets[:k]]
        moments = [moment_errors(s, self.exact) for s in sets]
        found = {"sw2": float(np.mean(pairs)), **{k: float(np.mean([m[k] for m in moments])) for k in moments[0]}}
        return {"distances": found, "weights": [round(w, 3) for w in self.exact.weights.tolist()]}


def photo_row(denoiser: Any, problem: PhotoProblem, attempt: Attempt, nfe: int, n: int) -> dict[str, Any]:
    """Figures of one photo in one task."""
    posterior = ExactPosterior(denoiser, problem.A, problem.y, problem.sigma_y)
    start = torch.stack(
        [torch.randn(problem.x_0.shape[1:], generator=sample_generator(problem.seed, 0, k)) for k in range(n)]
    )
    mean = posterior.mean()
    began = time.perf_counter()
    x = carry(posterior, attempt.transition, attempt.times(posterior, nfe), start)[:, None]
    seconds = (time.perf_counter() - began) / n
    count = float(problem.A.measurement_count(problem.y).sum())
    return {
        "crps": float(crps(x, problem.x_0)), "residual": residual(problem.A, x, problem.y, problem.sigma_y),
        "count": count, "mse_mean": float(mse(mean, problem.x_0)), "seconds": round(seconds, 3),
        **{f"ratio_{k}": v for k, v in vars(mse_ratios(x, mean, problem.x_0)).items()},
    }  # fmt: skip


def run_photos(args: argparse.Namespace) -> str:
    """Old and new default, and Euler with 100 steps, on photos in five tasks."""
    rows = Results(args.out / "photos.jsonl", ("attempt", "nfe", "task", "photo", "size", "samples"))
    files = photo_files(args.photos, args.match, args.count)
    denoiser = load(args.model)
    denoiser.backbone = HalfPrecision(denoiser.backbone)
    names = list(CURVES)
    lines = []
    shown = [(names[k], nfe) for k, nfe in ((4, 8), (2, 8), (2, 20), (3, 8), (4, 20))]
    shown += [("exact for the prior alone", 8), ("exponential, 3 values, corrector", 8), (names[0], 100)]
    for name, nfe in shown:
        cells = []
        for task in TASKS:

            def compute(file: Path, task: str = task, name: str = name, nfe: int = nfe) -> dict[str, Any]:
                problem = PhotoProblem(file, task, args.size, 0.05)
                return photo_row(denoiser, problem, ATTEMPTS[name], nfe, args.photo_samples)

            key = {"attempt": name, "nfe": nfe, "task": task, "size": args.size, "samples": args.photo_samples}
            found = [rows.get(partial(compute, file), photo=file.name, **key) for file in files]
            score, whitened, one, several, count, error = (
                np.array([r[c] for r in found])
                for c in ("crps", "residual", "ratio_one", "ratio_mean", "count", "mse_mean")
            )
            pooled = float((count * whitened**2).sum() / count.sum()) ** 0.5
            ratios = [float((error * r).sum() / error.sum()) for r in (one, several)]
            cells.append([100 * float(score.mean()), pooled, *ratios])
            lines.append([name, nfe, task, *[f"{v:.3f}" for v in cells[-1]]])
        lines.append([name, nfe, "**all**", *[f"{v:.3f}" for v in np.mean(cells, 0)]])
        say(f"{name}, {nfe}: {lines[-1][3:]}")
    ratios_of = ["MSE sample / mean", "MSE mean of samples / mean"]
    header = ["sampler", "evaluations", "task", "CRPS x100", "residual", *ratios_of]
    return markdown_table(header, lines, names=3)


def run_exact(args: argparse.Namespace) -> dict[str, str]:
    """The tables of the exact priors, by part."""
    rows = Results(args.out / "exact.jsonl", ("problem", "attempt", "nfe", "samples"))
    problems = [Exact(*spec, args.samples, args.patches, args.out) for spec in PROBLEMS]

    def curves_of(problems: Sequence[Exact], nfes: Sequence[int]) -> tuple[Curves, str]:
        floors = [rows.get(p.floor, problem=p.name, attempt="floor", nfe=0, samples=args.samples) for p in problems]
        found: Curves = {}
        for name, attempt in CURVES.items():
            found[name] = {nfe: rows_of(name, attempt, nfe, problems) for nfe in nfes}
            say(f"{name}: {[round(float(summary(r)[1]), 3) for r in found[name].values()]}")
        return found, curve_table(found, floors)

    def rows_of(name: str, attempt: Attempt, nfe: int, problems: Sequence[Exact] = problems) -> list[Row]:
        key = {"attempt": name, "nfe": nfe, "samples": args.samples}
        return [rows.get(partial(p.row, attempt, nfe), problem=p.name, **key) for p in problems]

    tables = {}
    for part, attempts, first in (("attempts", ATTEMPTS, "sampler"), ("grid", GRID, "start / s, stop / s, rho")):
        if part in args.parts:
            found = {}
            for name, attempt in attempts.items():
                found[name] = rows_of(name if part == "attempts" else f"grid {name}", attempt, args.nfe)
                say(f"{part}: {name}: {[round(float(v), 3) for v in summary(found[name])]}")
            if part == "attempts":
                euler_100 = next(iter(CURVES))
                found = {f"{euler_100}, 100 evaluations": rows_of(euler_100, CURVES[euler_100], 100), **found}
            tables[part] = solver_table(found, first)
    if "curves" in args.parts:
        curves, tables["curves"] = curves_of(problems, NFE)
        figure(curves, [p.name for p in problems], args.out / "sampler.png")
    if "held-out" in args.parts:
        others = [Exact(*s[:4], args.samples, args.patches, args.out, *s[4:]) for s in HELD_OUT]
        tables["held out"] = curves_of(others, HELD_OUT_NFE)[1]
    return tables


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser("python -m posteriori.bench.sampler", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for rows, tables and the figure")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--nfe", type=int, default=8, help="evaluations of attempts and grids")
    parser.add_argument("--samples", type=int, default=1024, help="of every exact posterior")
    parser.add_argument("--patches", type=Path, default=bundled_photos(), help="photos that patches are fitted to")
    parser.add_argument("--photos", type=Path, help="folder of validation photos; without it they are left out")
    parser.add_argument("--match", default=".*", help="regular expression that their names match in full")
    parser.add_argument("--count", type=int, default=6, help="how many, evenly spread")
    parser.add_argument("--size", type=int, default=128, help="side of the centre crops")
    parser.add_argument("--photo-samples", type=int, default=2)
    parser.add_argument("--model", default="photo")
    args = parser.parse_args(arguments)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}: choose {', '.join(PARTS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    tables = run_exact(args)
    if args.photos:
        tables["photos"] = run_photos(args)
    text = "\n\n".join(f"## {name}\n\n{table}" for name, table in tables.items())
    write_atomically(args.out / "tables.md", (text + "\n").encode())
    say("\n" + text)


if __name__ == "__main__":
    main()
