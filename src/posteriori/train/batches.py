"""The problems of every step, drawn here or by other processes ahead of the network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch.utils.data import DataLoader, Dataset

from posteriori.data import Counts, DataError, Photos
from posteriori.objective import Problem
from posteriori.recipe import Recipe

__all__ = ["Batch", "batches", "by_shape", "draw_problems", "open_photos"]


@dataclass
class Batch:
    """One microbatch.

    Attributes:
        problems: groups of signals with their operators.
        positions: how far the lane of shards that it came from was then read.
        counts: samples read for it, and skipped.
        error: why there are no problems; other processes cannot raise it in one line.
    """

    problems: list[Problem]
    positions: dict[str, tuple[int, int]] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    error: str = ""


def open_photos(recipe: Recipe, channels: int) -> Photos:
    """The sources of a recipe, as images with so many channels.

    Raises:
        DataError: when one is missing, or too much of it cannot be read.
    """
    photos = Photos(
        recipe.sources, recipe.augmentation, root=recipe.data, channels=channels,
        seed=recipe.seed, lanes=recipe.microbatches * recipe.lanes,
    )  # fmt: skip
    photos.opened.check(recipe.corrupt, enough=1)
    return photos


def draw_problems(recipe: Recipe, photos: Photos, step: int, part: int = 0) -> list[Problem]:
    """The training problems of a step's microbatch ``part``: a function of the recipe, the two numbers, and the
    position of its lane where shards are streamed."""
    rng = np.random.default_rng([recipe.seed, step, part])
    lane = part * recipe.lanes + step % recipe.lanes
    problems = []
    for slot in sorted({c.slot for c in recipe.crops}):
        kinds = [c for c in recipe.crops if c.slot == slot]
        shares = np.array([c.share for c in kinds])
        kind = kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))]
        for count in recipe.tasks.groups(kind.batch):
            x_0 = photos.crops(count, kind.size, rng, lane)
            _, operator, sigma_y = recipe.tasks.draw(count, kind.size, rng)
            problems.append(Problem(x_0, operator, sigma_y))
    return problems


def by_shape(problems: list[Problem]) -> list[list[Problem]]:
    """Problems that can share one network evaluation."""
    groups: dict[tuple[int, ...], list[Problem]] = {}
    for p in problems:
        groups.setdefault(tuple(p.x_0.shape[1:]), []).append(p)
    return list(groups.values())


class _Microbatches(Dataset[Batch]):
    """Item ``i``: the microbatch ``i % k`` of the ``k`` of this process, of step ``i // k``.

    With ``lanes`` a multiple of the workers, a lane is always read by the same worker.
    """

    def __init__(self, recipe: Recipe, photos: Photos, parts: Sequence[int]) -> None:
        self.recipe, self.photos, self.parts = recipe, photos, parts

    def __len__(self) -> int:
        return self.recipe.steps * len(self.parts)

    def __getitem__(self, item: int) -> Batch:
        step, k = divmod(item, len(self.parts))
        lane = self.parts[k] * self.recipe.lanes + step % self.recipe.lanes
        try:
            problems = draw_problems(self.recipe, self.photos, step, self.parts[k])
        except DataError as error:
            return Batch([], error=str(error))
        return Batch(problems, self.photos.positions(lane), self.photos.take_counts())


def batches(recipe: Recipe, photos: Photos, start: int, parts: Sequence[int]) -> Iterator[Batch]:
    """The microbatches ``parts`` of every step from ``start`` on.

    Raises:
        DataError: when one cannot be drawn.
    """
    items = _Microbatches(recipe, photos, parts)
    context = "forkserver" if recipe.workers else None  # a fork of a process that runs threads may hang
    loader = DataLoader(
        items, batch_size=None, sampler=range(start * len(parts), len(items)), num_workers=recipe.workers,
        multiprocessing_context=context,
    )  # fmt: skip
    for batch in loader:
        if batch.error:
            raise DataError(batch.error)
        yield batch
