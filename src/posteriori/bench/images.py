r"""The image benchmark: every method on a test set of images, with trained models.

    posteriori benchmark recipes/lfw-32-benchmark.yaml --set data=LFW --set models.base=MODEL \
        --set models.eps=MODEL --set models.palette=MODEL

One row for every method, task, number of evaluations, seed and batch of images. A row holds numbers for every image
(:mod:`posteriori.bench.images_scores`), so a table is the same whatever the batches were, and what it depends on:
settings, versions, hashes of model and images, device. Features of samples are kept beside the rows (``features/``)
for distances between sets; images only where the recipe says ``keep_images``.
"""

from __future__ import annotations

import io
import platform
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from posteriori.bench.common import HalfPrecision
from posteriori.bench.images_problems import Problem, digest, make_problem, read_images
from posteriori.bench.images_recipe import Grid, ImageRecipe
from posteriori.bench.images_report import read_paper, report_again, write_report
from posteriori.bench.images_scores import LEVELS, absolute_error, feature_scores, pixel_scores
from posteriori.bench.runner import Cell, Meter, Row, identity
from posteriori.checkpoint import load, read_card, write_atomically
from posteriori.denoise import Denoiser, NetworkDenoiser
from posteriori.methods.base import METHODS, Entry
from posteriori.metrics import coverage
from posteriori.perceptual import FeatureNetwork, feature_network
from posteriori.posterior import ExactPosterior
from posteriori.precision import prefers_bfloat16
from posteriori.schedule import VE

__all__ = ["ImageBenchmark"]


class ImageBenchmark:
    """See the module's head.

    Args:
        recipe: what is measured.
        out: folder of the run.
        device: where methods run.
        denoisers: instead of models to be loaded, by the names that methods call them.
    """

    recipe: ClassVar[type] = ImageRecipe

    def __init__(
        self, recipe: ImageRecipe, out: Path, device: str = "cpu", denoisers: Mapping[str, Denoiser] | None = None
    ) -> None:
        self.name, self.plan, self.out, self.device = recipe.name, recipe, out, device
        self._given = dict(denoisers or {})
        self.denoiser = lru_cache(maxsize=1)(self._denoiser)  # rows of one model come one after another
        self._hashes: dict[str, str] = {}
        self.paper = read_paper(recipe.paper, recipe.paper_set) if recipe.paper else {}
        for grid in recipe.grids:
            for name in recipe.chosen(grid):
                model = recipe.methods[name].model
                if self.entry(name).nfe and model not in self._given and not recipe.models.get(model):
                    raise ValueError(
                        f"methods.{name} has no model: give --set models.{model}=MODEL, or leave the method out with "
                        "--set only=[NAME,...]"
                    )

    def entry(self, name: str) -> Entry:
        return METHODS[self.plan.methods[name].method or name]

    @cached_property
    def images(self) -> Tensor:
        """As many images of the test set as the recipe needs."""
        count = max(g.images for g in self.plan.grids)
        return read_images(self.plan.source, self.plan.data, self.plan.size, count)

    @cached_property
    def network(self) -> FeatureNetwork | None:
        if self.plan.features == "none":
            return None
        return feature_network(self.plan.features).to(self.device)

    @cached_property
    def _precision(self) -> str:
        if self.plan.precision != "auto":
            return self.plan.precision
        return "bfloat16" if prefers_bfloat16(self.device) else "float32"

    def _denoiser(self, model: str) -> Denoiser:
        if model in self._given:
            return self._given[model].to(self.device)
        if not model:  # for methods without a network; never evaluated
            return NetworkDenoiser(nn.Identity(), VE())
        denoiser = load(self.plan.models[model], self.device)
        if self._precision == "bfloat16":
            denoiser.backbone = HalfPrecision(denoiser.backbone)
        return denoiser

    def _hash(self, model: str) -> str:
        """Of a model's weights."""
        if model not in self._hashes:
            if model in self._given:
                self._hashes[model] = digest(self._given[model].state_dict().values())
            else:
                self._hashes[model] = str(read_card(self.plan.models[model])["sha256"])[:16] if model else ""
        return self._hashes[model]

    def cells(self) -> Iterator[Cell]:
        seen: set[str] = set()
        for grid in self.plan.grids:
            for name in self.plan.chosen(grid):
                for task in grid.tasks or self.plan.tasks:
                    for cell in self._cells(grid, name, task):
                        if (cell_id := identity(cell.key)) not in seen:  # grids may overlap
                            seen.add(cell_id)
                            yield cell

    def _cells(self, grid: Grid, name: str, task: str) -> Iterator[Cell]:
        spec, entry = self.plan.methods[name], self.entry(name)
        count = min(grid.images, spec.images or grid.images)
        model = spec.model if entry.nfe else ""
        settings = {**entry.settings(self.plan.tasks[task].kind), **spec.settings, **spec.by_task.get(task, {})}
        for nfe in (grid.nfe.get(name) or spec.nfe or [entry.nfe]) if entry.nfe else [0]:
            samples = 1 if self.certain(name, nfe) else grid.samples
            for seed in range(1 if entry.nfe == 0 else grid.seeds):
                for first in range(0, count, self.plan.batch):
                    x_0 = self.images[first : min(first + self.plan.batch, count)]
                    key = {
                        "kind": "images", "method": name, "task": task, "nfe": nfe, "seed": seed, "first": first,
                        "images": len(x_0), "samples": samples, "registered": self.plan.methods[name].method or name,
                        "settings": settings, "degradation": vars(self.plan.tasks[task]), "sigma_y": self.plan.sigma_y,
                        "size": self.plan.size, "problem_seed": self.plan.seed, "precision": self._precision,
                        "features": self.plan.features, "kept": self.plan.keep_images,
                        "model": self._hash(model), "data": digest([x_0]),
                    }  # fmt: skip
                    yield Cell(key, partial(self.measure, key, model, x_0))

    def certain(self, name: str, nfe: int) -> bool:
        """Whether a method gives one answer and no samples: one evaluation of EPS or Palette is the posterior mean."""
        entry = self.entry(name)
        return entry.nfe == 0 or (entry.extra > 0 and nfe == 1)

    def problem(self, task: str, x_0: Tensor, first: int) -> Problem:
        """Measured images ``first, first + 1, ...`` of the test set."""
        return make_problem(self.plan.tasks[task], task, x_0, first, self.plan.sigma_y, self.plan.seed)

    def measure(self, key: Row, model: str, x_0: Tensor) -> Row:
        """A row: one batch of images."""
        denoiser, certain = self.denoiser(model), self.certain(key["method"], key["nfe"])
        problem = self.problem(key["task"], x_0, key["first"])
        posterior = ExactPosterior(denoiser, problem.A, problem.y.to(self.device), self.plan.sigma_y)
        method, seeds = METHODS[key["registered"]], problem.sampling_seeds(key["seed"])
        with Meter(self.device) as meter:
            estimate = method(posterior, key["samples"], key["nfe"] or None, seeds, **key["settings"])
        answers = estimate.answers.cpu()
        scores = pixel_scores(estimate, answers, problem, self.plan.sigma_y)
        if certain:
            scores["crps"] = absolute_error(answers[0], problem.x_0)
        kept: dict[str, Tensor] = {}
        if self.plan.keep_images:
            for name, images in (("images", answers), ("true_images", problem.x_0[None])):
                kept[name] = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
        if self.network is not None:
            found, samples, truth = feature_scores(self.network, answers.float(), problem.x_0, certain, self.device)
            scores |= found
            kept |= {"samples": samples.half(), "truth": truth[None].half()}
        if kept:
            self._keep(identity(key), kept)
        return {
            "per_image": scores, "nominal": _nominal(key["samples"]), "told": _plain(estimate.settings),
            "evaluations": float(estimate.evaluations), "backward": float(estimate.backward),
            "seconds": meter.seconds, "peak_memory_mib": meter.memory, "seconds_per_image": meter.seconds / len(x_0),
            "device": _device(self.device),
        }  # fmt: skip

    def features_path(self, row_id: str) -> Path:
        """Where a row's features are kept."""
        return self.out / "features" / f"{row_id}.npz"

    def _keep(self, row_id: str, kept: Mapping[str, Tensor]) -> None:
        stream = io.BytesIO()
        arrays: dict[str, Any] = {name: values.numpy() for name, values in kept.items()}
        np.savez_compressed(stream, **arrays)
        write_atomically(self.features_path(row_id), stream.getvalue())

    def report(self, rows: list[Row], document: Path) -> None:
        """See :func:`posteriori.bench.images_report.write_report`."""

        def problem(task: str, count: int) -> Problem:
            return self.problem(task, self.images[:count], 0)

        write_report(self.plan, rows, document, self.out, self.features_path, problem)

    @classmethod
    def report_again(cls, recipe: ImageRecipe, rows: Path, document: Path) -> None:
        """See :func:`posteriori.bench.images_report.report_again`."""
        report_again(recipe, rows, document)


def _nominal(samples: int) -> Row:
    """What the intervals of so many samples are to cover."""
    one = torch.zeros(samples, 1, 1)
    return {str(level): coverage(one, one[0], level / 100)[1] for level in LEVELS} if samples > 1 else {}


def _plain(settings: Row) -> Row:
    return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in settings.items()}


def _device(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"
