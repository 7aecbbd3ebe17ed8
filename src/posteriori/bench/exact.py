r"""The exact benchmark: every method against posteriors that are known in closed form.

    posteriori benchmark recipes/exact.yaml

Priors are Gaussians and Gaussian mixtures, so are the posteriors, and the denoiser makes no error: what is measured is
the method. Three kinds of rows:

    distances      of samples for one measurement to its posterior (:mod:`posteriori.bench.distances`)
    wrong model    the same, when the method is told another sigma_y or blur than made the measurement
    calibration    ranks of the truth among the samples, over many draws of signal and measurement
                   (:mod:`posteriori.bench.calibration`)

The method ``exact`` draws from the posterior itself; its distances are the Monte Carlo floor. Told a wrong model, it
draws from that model's posterior: the best that any method told the same can do on its own terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from posteriori.bench.calibration import rank_rows
from posteriori.bench.distances import Reference
from posteriori.bench.exact_problems import (
    OperatorName,
    PriorSpec,
    ProblemSpec,
    make_measurement,
    make_operator,
    make_prior,
)
from posteriori.bench.exact_recipe import FLOOR, Calibration, ExactRecipe, Grid, Told
from posteriori.bench.patches import fit_name, patch_mixture
from posteriori.bench.runner import Cell, Meter, Row, read_rows
from posteriori.methods.base import METHODS, Estimate
from posteriori.operators import LinearOperator
from posteriori.pivot import measure
from posteriori.posterior import ExactPosterior
from posteriori.priors import GaussianMixture

__all__ = ["ExactBenchmark", "Problem"]

MEASUREMENT, VALIDATION = 1, 1001  # seeds of the signals that are measured: the test's and those to tune on


class Problem:
    """A problem with everything about it that several rows share.

    Attributes:
        prior, A, y, sigma_y: the problem; ``y`` ``(1, ...)``.
        told: the operator and noise that methods are given.
    """

    def __init__(self, spec: ProblemSpec, prior: GaussianMixture, samples: int, told: Told, signal: int) -> None:
        self.prior, self.samples, self.sigma_y, self.seed = prior, samples, spec.sigma_y, spec.seed
        d = spec.prior.d
        self.A = make_operator(spec.operator, d, spec.seed)
        self.told_A: LinearOperator = (
            self.A if told.blur == 1 else make_operator(spec.operator, d, spec.seed, told.blur)
        )
        self.told_sigma_y = told.sigma_y * spec.sigma_y
        self.x_0, self.y = make_measurement(prior, self.A, spec.sigma_y, signal + spec.seed)

    @cached_property
    def reference(self) -> Reference:
        """The true posterior."""
        return Reference(self.prior.posterior(self.A, self.y, self.sigma_y), self.samples, seed=self.seed)

    @cached_property
    def floor(self) -> tuple[dict[str, float], dict[str, float]]:
        return self.reference.floor()

    def posterior(self, device: str = "cpu") -> ExactPosterior:
        """What a method is given."""
        return ExactPosterior(on_device(self.prior, device), self.told_A, self.y.to(device), self.told_sigma_y)


class ExactBenchmark:
    """See the module's head."""

    recipe: ClassVar[type] = ExactRecipe

    def __init__(self, recipe: ExactRecipe, out: Path, device: str = "cpu") -> None:
        self.name, self.plan, self.out, self.device = recipe.name, recipe, out, device
        # rows of one problem come one after another
        self.problem: Callable[..., Problem] = lru_cache(maxsize=4)(self._problem)
        self._prior: Callable[..., GaussianMixture] = lru_cache(maxsize=8)(self._make_prior)

    def cells(self) -> Iterator[Cell]:
        for part in self.plan.calibration:
            spec = ProblemSpec(part.prior, part.operator, part.sigma_y, self.plan.seed)
            for name in (FLOOR, *(part.methods or self.plan.methods)):
                key = {**self._key("calibration", name, spec, part.nfe, part.samples), "draws": part.draws}
                yield Cell(key, partial(self.calibrate, spec, part, name))
        for grid in self.plan.grids:
            for prior in grid.priors:
                for operator in grid.operators:
                    for sigma_y in grid.sigma_y:
                        for seed in range(grid.seeds):
                            spec = ProblemSpec(prior, operator, sigma_y, self.plan.seed + seed)
                            yield from self._distance_cells(grid, spec)

    def _distance_cells(self, grid: Grid, spec: ProblemSpec) -> Iterator[Cell]:
        for told in grid.told:
            if told.blur != 1 and spec.operator != "blur":
                continue
            kind = "distances" if told == Told() else "wrong model"
            for name in (FLOOR, *(grid.methods or self.plan.methods)):
                allowed = self.plan.methods[name].nfe if name != FLOOR else [0]
                for nfe in [0] if name == FLOOR else [n for n in grid.nfe if not allowed or n in allowed]:
                    key = self._key(kind, name, spec, nfe, grid.samples)
                    if kind == "wrong model":
                        key["told"] = asdict(told)
                    yield Cell(key, partial(self.measure, spec, told, grid.samples, name, nfe))

    def _key(self, kind: str, name: str, spec: ProblemSpec, nfe: int, samples: int) -> Row:
        """What a row depends on; the recipe's method with all its settings."""
        method = {} if name == FLOOR else asdict(self.plan.methods[name])
        method.pop("nfe", None)
        key = {
            "kind": kind, "method": name, "prior": spec.prior.kind, "d": spec.prior.d, "operator": spec.operator,
            "sigma_y": spec.sigma_y, "nfe": nfe, "seed": spec.seed, "samples": samples, "specification": method,
        }  # fmt: skip
        if spec.prior.kind != "gaussian":
            key["components"] = spec.prior.components
        if spec.prior.kind == "patches":
            key["fit"] = fit_name(self.plan.photos, spec.prior.d, spec.prior.components, self.plan.fit)
        if method.get("tune"):
            key["tuning"] = self.plan.tuning.samples
        return key

    def _make_prior(self, spec: PriorSpec, operator: OperatorName, seed: int) -> GaussianMixture:
        if spec.kind == "patches":
            return patch_mixture(self.plan.photos, spec.d, spec.components, self.plan.fit, self.out / "fits")
        return make_prior(spec, make_operator(operator, spec.d, seed), seed)

    def _problem(self, spec: ProblemSpec, samples: int, told: Told, signal: int) -> Problem:
        # patches have one prior for all operators and seeds
        place = ("selection", 0) if spec.prior.kind == "patches" else (spec.operator, spec.seed)
        return Problem(spec, self._prior(spec.prior, *place), samples, told, signal)

    def settings(self, name: str, spec: ProblemSpec, nfe: int, seed: int) -> tuple[Row, Row]:
        """Settings of a method for a problem, and what tuning, with the right model, found: sw2 of every candidate."""
        method = self.plan.methods[name]
        scores: Row = {}
        if not method.tune:
            return method.settings, scores
        (setting, candidates), *_ = method.tune.items()
        problem = self.problem(spec, self.plan.tuning.samples, Told(), VALIDATION)
        for value in candidates:
            trial = {**method.settings, setting: value}
            points = self._run(name, problem.posterior(self.device), self.plan.tuning.samples, nfe, seed, trial)[1]
            distance = problem.reference.sw2(points) if bool(torch.isfinite(points).all()) else float("inf")
            scores[str(value)] = distance
        best = min(candidates, key=lambda v: scores[str(v)])
        return {**method.settings, setting: best}, scores

    def _run(
        self, name: str, posterior: ExactPosterior, n: int, nfe: int, seed: int, settings: Row
    ) -> tuple[Estimate, Tensor]:
        """A method's answer, and its samples ``(n B, d)`` on the CPU."""
        estimate = METHODS[self.plan.methods[name].method or name](posterior, n, nfe, seed, **settings)
        if estimate.samples is None:
            raise ValueError(f"{name} draws no samples: it has no place in this benchmark")
        return estimate, estimate.samples.reshape(n * posterior.shape[0], -1).double().cpu()

    def measure(self, spec: ProblemSpec, told: Told, samples: int, name: str, nfe: int) -> Row:
        """Distances of one method's samples to the true posterior."""
        problem = self.problem(spec, samples, told, MEASUREMENT)
        if name == FLOOR:
            row: Row = {"distances": problem.floor[0]}
            if told != Told():
                wrong = problem.prior.posterior(problem.told_A, problem.y, problem.told_sigma_y)
                points = wrong.sample(samples, torch.Generator().manual_seed(self.plan.seed)).flatten(1)
                row = {"distances": problem.reference.distances(points)}
            else:
                points = problem.reference.sets[0]
        else:
            settings, scores = self.settings(name, spec, nfe, self.plan.seed)
            posterior = problem.posterior(self.device)
            with Meter(self.device) as meter:
                estimate, points = self._run(name, posterior, samples, nfe, self.plan.seed, settings)
            row = {"distances": problem.reference.distances(points), **_costs(estimate, samples), **meter.row()}
            row |= {"tuned": scores} if scores else {}
        row["floor"], row["limit"] = problem.floor
        shown = self.plan.picture
        here = (spec.prior.kind, spec.prior.d, spec.operator, spec.sigma_y)
        pictured = here == ("mixture", 2, shown.operator, shown.sigma_y) and told == Told()
        if pictured and nfe in (0, shown.nfe):
            row["points"] = [[round(v, 3) for v in p] for p in points[: shown.points].tolist()]
        return row

    def calibrate(self, spec: ProblemSpec, part: Calibration, name: str) -> Row:
        """Ranks of the truth among a method's samples."""
        problem = self.problem(spec, part.samples, Told(), MEASUREMENT)
        truth = problem.prior.sample(part.draws, torch.Generator().manual_seed(self.plan.seed + 7))
        y = measure(problem.A, truth, problem.sigma_y, seed=self.plan.seed + 7)
        row: Row = {}
        if name == FLOOR:
            generator = torch.Generator().manual_seed(self.plan.seed + 8)
            draws = [
                problem.prior.posterior(problem.A, v[None], spec.sigma_y).sample(part.samples, generator) for v in y
            ]
            samples = torch.stack(draws, 1)
        else:
            settings, scores = self.settings(name, spec, part.nfe, self.plan.seed)
            posterior = ExactPosterior(
                on_device(problem.prior, self.device), problem.A, y.to(self.device), problem.sigma_y
            )
            with Meter(self.device) as meter:
                estimate, points = self._run(name, posterior, part.samples, part.nfe, self.plan.seed, settings)
            samples = points.reshape(part.samples, *truth.shape)
            row = {**_costs(estimate, part.samples), **meter.row(), **({"tuned": scores} if scores else {})}
        return {**row, "ranks": rank_rows(problem.prior, problem.A, y, problem.sigma_y, truth, samples)}

    def truth(self, spec: ProblemSpec, prior: GaussianMixture) -> GaussianMixture:
        """The posterior that a row of this problem is compared with."""
        problem = Problem(spec, prior, 1, Told(), MEASUREMENT)
        return problem.prior.posterior(problem.A, problem.y, problem.sigma_y)

    def report(self, rows: list[Row], document: Path) -> None:
        from posteriori.bench.exact_report import write_report

        write_report(self, rows, document)

    @classmethod
    def report_again(cls, recipe: ExactRecipe, rows: Path, document: Path) -> None:
        cls(recipe, document.parent).report(read_rows(rows), document)


def on_device(prior: GaussianMixture, device: str) -> GaussianMixture:
    """The prior itself, or a copy: distances are computed on the CPU."""
    return prior if device == "cpu" else deepcopy(prior).to(device)


def _costs(estimate: Estimate, samples: int) -> Row:
    """Evaluations and backward passes per sample, and the settings the method says it had."""
    return {
        "evaluations": round(estimate.evaluations / samples, 3),
        "backward": round(estimate.backward / samples, 3),
        "settings": estimate.settings,
    }
