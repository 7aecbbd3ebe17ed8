"""Training: the EPS objective with accelerate, EMA, atomic checkpoints and exact resume.

    posteriori train RECIPE.yaml -o RUN [--resume]                          one process
    accelerate launch -m posteriori.train RECIPE.yaml -o RUN [--resume]     one or many

A step is ``microbatches`` batches, each drawn by generators seeded with ``(seed, step, microbatch)`` and, for streamed
shards, from a lane of its own. Which process evaluates a microbatch therefore changes nothing but rounding, and a
checkpoint needs weights, averages, moments, the step and the lanes' positions to continue bit for bit.
"""

from __future__ import annotations

from posteriori.recipe import CropSize, Recipe, RecipeError, load_recipe
from posteriori.train.batches import by_shape, draw_problems
from posteriori.train.loop import train
from posteriori.train.network import card_of
from posteriori.train.state import TrainingError

__all__ = [
    "CropSize",
    "Recipe",
    "RecipeError",
    "TrainingError",
    "by_shape",
    "card_of",
    "draw_problems",
    "load_recipe",
    "train",
]
