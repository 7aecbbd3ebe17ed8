"""Fixed validation problems: their loss, and a sheet of what the model makes of them, as the run goes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from posteriori.checkpoint import write_atomically
from posteriori.data import Photos
from posteriori.denoise import NetworkDenoiser
from posteriori.images import encode_png, to_picture
from posteriori.objective import Problem, eps_loss
from posteriori.operators import Nothing
from posteriori.pivot import measure
from posteriori.posterior import ExactPosterior
from posteriori.recipe import Recipe
from posteriori.sample import sample
from posteriori.sheets import contact_sheet

__all__ = ["Sheets"]

LOSS_IMAGES = 64
NFE = 20


class Sheets:
    """The problems of a run's sheets: one of each task to look at, and a batch of the mixture for the loss.

    Args:
        recipe: of the run.
        photos: what the problems are made from.
        unseen: whether the images are kept from training.
    """

    def __init__(self, recipe: Recipe, photos: Photos, unseen: bool) -> None:
        rng = np.random.default_rng([recipe.seed, 0x5EED])
        size, self.recipe, self.unseen = recipe.crops[0].size, recipe, unseen
        tasks = recipe.tasks
        self.shown: list[tuple[str, Problem]] = []
        for name in [name for name, share in tasks.shares.items() if share > 0]:
            x_0 = photos.crops(1, size, rng)
            one = replace(tasks, shares={name: 1.0}, drop=0.0)
            self.shown.append((name, Problem(x_0, *one.draw(1, size, rng)[1:])))
        self.problems = []
        for count in tasks.groups(LOSS_IMAGES):
            x_0 = photos.crops(count, size, rng)
            self.problems.append(Problem(x_0, *tasks.draw(count, size, rng)[1:]))
        photos.take_counts()

    def loss(self, denoiser: NetworkDenoiser) -> float:
        """Loss on fixed images, operators and noise: comparable between the steps of a run."""
        device = next(denoiser.parameters()).device
        with torch.no_grad():
            torch.manual_seed(self.recipe.seed)
            generator = torch.Generator().manual_seed(self.recipe.seed)
            each = [
                eps_loss(denoiser, [_on(p, device)], self.recipe.noise, generator, weight=self.recipe.weight)[1]
                for p in self.problems
            ]
        return float(torch.cat(each).mean())

    def draw(self, denoiser: NetworkDenoiser, step: int) -> Image.Image:
        """Measurement, posterior mean from one evaluation, a sample, and the truth, of every task."""
        device = next(denoiser.parameters()).device
        rows, titles = [], []
        for name, problem in self.shown:
            p = _on(problem, device)
            y = measure(p.A, p.x_0, p.sigma_y, seed=self.recipe.seed)
            posterior = ExactPosterior(denoiser, p.A, y, p.sigma_y)
            drawn = sample(posterior, n=1, nfe=NFE, seed=self.recipe.seed)[0]
            seen = None if isinstance(p.A, Nothing) else _picture(y)
            mean = _picture(posterior.mean())
            rows.append(
                [("measurement", seen), ("mean", mean), ("sample", _picture(drawn)), ("truth", _picture(p.x_0))]
            )
            titles.append(f"{name}\nsigma_y {float(p.sigma_y[0]):.3f}")
        kind = "validation" if self.unseen else "training"
        return contact_sheet(
            rows, titles, heading=f"{self.recipe.name}, step {step}", cell=160,
            footer=f"{kind} images; sample: {NFE} evaluations; averaged weights",
        )  # fmt: skip

    def write(self, denoiser: NetworkDenoiser, step: int, folder: Path) -> Path:
        """Write ``sheets/step-00001000.png``."""
        path = folder / "sheets" / f"step-{step:08d}.png"
        write_atomically(path, encode_png(self.draw(denoiser, step)))
        return path


def _on(p: Problem, device: torch.device) -> Problem:
    return Problem(p.x_0.to(device), p.A, p.sigma_y)


def _picture(x: Tensor) -> Image.Image | None:
    """The first signal as a picture, where it is one."""
    return to_picture(x[0]) if x.ndim == 4 and x.shape[1] in (1, 3) else None
