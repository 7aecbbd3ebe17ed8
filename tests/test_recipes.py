"""The recipes that ship: each must load, and run at a tiny size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from posteriori.checkpoint import build_denoiser, load
from posteriori.recipe import load_recipe
from posteriori.train import card_of, draw_problems, train

RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))
# Weights travel as bfloat16 in one file of at most 16 MiB; what the package carries is at most 12 MiB.
LIMITS = {"photo": 12 * 2**20, "photo-large": 16 * 2**20}
TINY = [
    "network={kind: photo, channels: [8, 16], blocks: [1, 1], embedding: 16}",
    "crops=[{size: 32, batch: 4}, {size: 48, batch: 1, slot: 1}]",
    "steps=4", "save_every=2", "log_every=1", "workers=0",
]  # fmt: skip


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A data folder laid out as the recipes expect it, with names they accept."""
    rng = np.random.default_rng(0)
    for folder in ("train", "train-more"):
        (tmp_path / folder).mkdir()
        for i in range(3):
            pixels = rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{i:016x}.jpg")
    return tmp_path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_runs_resumes_and_gives_a_loadable_model(path: Path, photos: Path, tmp_path: Path):
    """A recipe with a stale key or a broken data layout would only fail on the user's machine, after hours of setup."""
    recipe = load_recipe(path, [f"data={photos}", *TINY])
    out = tmp_path / "run"
    train(recipe, out, progress=False)
    longer = load_recipe(path, [f"data={photos}", *TINY, "steps=6"])
    train(longer, out, resume=True, progress=False)
    denoiser = load(out / "model")
    assert denoiser.card["training"]["steps"] == 6
    assert all(bool(torch.isfinite(p).all()) for p in denoiser.parameters())


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_fits_its_budget(path: Path):
    """A network too large for its file would be found out when the weights of a long run are to be published."""
    recipe = load_recipe(path)
    denoiser = build_denoiser(card_of(recipe, 0))
    assert 2 * sum(p.numel() for p in denoiser.parameters()) <= LIMITS[recipe.name]
    assert denoiser.backbone.receptive_radius * 2 >= 192


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_mixture_is_as_documented(path: Path, photos: Path):
    """Too few unconditional samples would spoil the prior; too few large crops, large missing regions."""
    recipe = load_recipe(path, [f"data={photos}"])
    shares = recipe.tasks.shares
    assert shares["none"] / sum(shares.values()) == pytest.approx(0.15, abs=0.01)
    slots: dict[int, list] = {}
    for kind in recipe.crops:
        slots.setdefault(kind.slot, []).append(kind)
    expected = {True: 0.0, False: 0.0}
    for kinds in slots.values():
        for kind in kinds:
            expected[kind.size >= 160] += kind.batch * kind.share / sum(k.share for k in kinds)
    assert expected[True] / sum(expected.values()) == pytest.approx(0.2, abs=0.03)


def test_steps_do_not_depend_on_what_came_before(photos: Path):
    """Resuming is exact only if a step's data are a function of its number."""
    recipe = load_recipe(RECIPES[-1], [f"data={photos}", *TINY])
    from posteriori.data import Photos, PhotoSource

    source = Photos([PhotoSource(str(photos / "train"))])
    first = draw_problems(recipe, source, 3)
    draw_problems(recipe, source, 1)
    again = draw_problems(recipe, source, 3)
    assert all(
        torch.equal(a.x_0, b.x_0) and torch.equal(a.sigma_y, b.sigma_y) for a, b in zip(first, again, strict=True)
    )
