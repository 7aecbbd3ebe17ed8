"""The recipes that ship: each must load, run and resume at a tiny size, and learn what its objective promises."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import posteriori as po
from posteriori.backbones.cards import build_denoiser
from posteriori.checkpoint import load
from posteriori.data import Augmentation, Photos, PhotoSource
from posteriori.metrics import residual
from posteriori.operators import Identity, Nothing
from posteriori.pivot import measure
from posteriori.posterior import ExactPosterior
from posteriori.recipe import CropSize, Recipe, load_recipe, read_recipe
from posteriori.sample import sample
from posteriori.train import card_of, draw_problems, train
from tiny_data import png, write_shard

FOLDER = Path(__file__).parents[1] / "recipes"
PATHS = {p.stem: p for p in sorted(FOLDER.rglob("*.yaml")) if "sources" in read_recipe(p)}
VARIANTS = tuple(n for n, p in PATHS.items() if p.parent.name == "photo-variants")
PHOTO = ("photo", "photo-large", *VARIANTS)
# Weights travel as bfloat16 in one file of at most 16 MiB; what the package carries is at most 12 MiB.
LIMITS = dict.fromkeys(PATHS, 16 * 2**20) | {"photo": 12 * 2**20}
SIDE = 8
TINY_UNET: dict[str, Any] = {
    "kind": "unet2d", "image_channels": 3, "sample_size": SIDE, "block_out_channels": [16], "layers_per_block": 1,
    "norm_num_groups": 4, "dropout": 0.0, "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
}  # fmt: skip
TINY_PHOTO = {"kind": "photo", "channels": [8, 16], "blocks": [1, 1], "embedding": 16}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder laid out as every recipe expects it, with names it accepts."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for folder in ("train", "train-more"):
        (root / folder).mkdir()
        for i in range(3):
            pixels = rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{i:016x}.jpg")
    for shard in range(2):
        faces = {f"{i}.png": png(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for i in range(10)}
        write_shard(root / f"train-{shard}.tar", faces)
    return root


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``base`` and ``init`` start from: a diffusers pipeline with EDM's convention, untrained."""
    from diffusers import DDPMPipeline, EDMEulerScheduler, UNet2DModel

    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    own = {k: v for k, v in TINY_UNET.items() if k not in ("kind", "image_channels")}
    DDPMPipeline(UNet2DModel(**own), EDMEulerScheduler()).save_pretrained(folder)
    return folder


def shrunk(name: str, data: Path, pretrained: Path, *more: str) -> Recipe:
    """The recipe with its own objective, tasks, noise and sources, and a network and crops that take milliseconds."""
    recipe = load_recipe(PATHS[name], [f"data={data}", "workers=0", "log_every=1", "sheet_every=0", *more])
    if recipe.base:
        recipe = replace(recipe, base={"source": str(pretrained)})
    elif recipe.network["kind"] == "photo":
        kept = {k: v for k, v in recipe.network.items() if k in ("smooth_input", "refine")}
        recipe = replace(recipe, network={**TINY_PHOTO, **kept}, init="")
    else:
        kept = {k: v for k, v in recipe.network.items() if k in ("conditioned", "smooth_input")}
        recipe = replace(recipe, network={**TINY_UNET, **kept}, init="")
    return replace(recipe, mixed_precision="no", microbatches=1, milestones=0)


def no_machine(text: str) -> bool:
    return not any(word in text for word in ("/home", "/work", "/data", "/mnt", "/tmp"))


@pytest.mark.parametrize("name", PATHS)
def test_a_recipe_runs_resumes_and_gives_a_loadable_model(name: str, data: Path, pretrained: Path, tmp_path: Path):
    """A recipe with a stale key, a broken data layout or a path of one machine would only fail on the user's machine,
    after hours of setup."""
    recipe = shrunk(name, data, pretrained, "save_every=2")
    assert recipe.name == name
    assert no_machine(PATHS[name].read_text())
    crops = [CropSize(32, 4), CropSize(48, 1, slot=1)] if name in PHOTO else [CropSize(SIDE, 4)]
    recipe = replace(recipe, crops=crops)
    out = tmp_path / "run"
    train(replace(recipe, steps=4), out, progress=False)
    train(replace(recipe, steps=6), out, resume=True, progress=False)
    denoiser = load(out / "model")
    assert denoiser.card["training"]["steps"] == 6
    assert denoiser.preconditioning == recipe.preconditioning
    assert all(bool(torch.isfinite(p).all()) for p in denoiser.parameters())


@pytest.mark.parametrize("name", PATHS)
def test_a_recipe_fits_its_budget(name: str):
    """A network too large for its file would be found out when the weights of a long run are to be published; one too
    narrow in its view could not fill a hole. Its crops must suit it."""
    recipe = load_recipe(PATHS[name])
    if recipe.base:
        return
    denoiser = build_denoiser(card_of(recipe, 0))
    assert 2 * sum(p.numel() for p in denoiser.parameters()) <= LIMITS[name]
    if name in PHOTO:
        assert denoiser.backbone.receptive_radius * 2 >= 192
    elif recipe.network["kind"] == "unet2d":
        assert recipe.network["sample_size"] == recipe.crops[0].size


@pytest.mark.parametrize("name", PHOTO)
def test_the_mixture_is_as_documented(name: str):
    """Too few unconditional samples would spoil the prior; too few large crops, large missing regions."""
    recipe = load_recipe(PATHS[name])
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


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_photo_model_differ_in_the_network_alone(name: str):
    """An experiment on architectures would be one on learning rates or crops."""
    photo, variant = load_recipe(PATHS["photo"]), load_recipe(PATHS[name])
    assert variant.network != photo.network
    assert replace(variant, name=photo.name, network=photo.network) == photo


@pytest.mark.parametrize("data_set", ["lfw-64", "lfw-32", "tiny-imagenet-64", "tiny-imagenet-32"])
def test_recipes_to_compare_differ_in_one_thing(data_set: str):
    """A comparison of EPS with Palette would be one of two learning rates or budgets; a fine-tuned network would not be
    the one it starts from."""
    base, eps, palette = (load_recipe(PATHS[data_set + end]) for end in ("", "-eps", "-palette"))
    assert replace(palette, name=eps.name, preconditioning=eps.preconditioning, training_data={}) == replace(
        eps, training_data={}
    )
    assert (eps.preconditioning, palette.preconditioning) == ("spectral", "palette")
    told = {"conditioned": True} if base.network["kind"] == "unet2d" else {"refine": True}
    assert eps.network == {**base.network, **told, "smooth_input": True}
    assert not base.network.get("conditioned")
    assert base.tasks.shares == {"none": 1.0}
    assert eps.init == f"runs/{base.name}/model"
    assert eps.sources == base.sources


def test_steps_do_not_depend_on_what_came_before(data: Path, pretrained: Path):
    """Resuming is exact only if a step's data are a function of its number."""
    recipe = shrunk("photo", data, pretrained)
    source = Photos([PhotoSource(str(data / "train"))])
    first = draw_problems(recipe, source, 3)
    draw_problems(recipe, source, 1)
    again = draw_problems(recipe, source, 3)
    assert all(
        torch.equal(a.x_0, b.x_0) and torch.equal(a.sigma_y, b.sigma_y) for a, b in zip(first, again, strict=True)
    )


# -- what a recipe learns --------------------------------------------------------------------------------------------

STD, LENGTH = 0.25, 1.2


def smooth_prior() -> po.priors.Gaussian:
    """Three independent channels with covariance ``STD^2 exp(-d^2 / (2 LENGTH^2))``: neighbours tell of each other."""
    y, x = np.mgrid[:SIDE, :SIDE].reshape(2, -1)
    d2 = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2
    one = STD**2 * (np.exp(-d2 / (2 * LENGTH**2)) + 0.02 * np.eye(SIDE**2))
    cov = torch.from_numpy(np.kron(np.eye(3), one))
    return po.priors.Gaussian(torch.zeros(3 * SIDE**2, dtype=torch.float64), cov, shape=(3, SIDE, SIDE))


def draws(count: int, seed: int) -> torch.Tensor:
    prior = smooth_prior()
    root = torch.linalg.cholesky(prior.covs[0])
    noise = torch.randn(count, root.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (noise @ root.T).reshape(count, 3, SIDE, SIDE).clamp(-1, 1)


# Steps, how far the loss must fall, and how close the mean's and single samples' squared errors must come to the exact
# ones'. Palette, which has to find the pivot by itself, starts at a loss of 37 and learns more slowly.
LEARNED = {
    "lfw-64": (250, 0.88, 0.0, 0.0),
    "lfw-64-eps": (250, 0.9, 1.2, 1.15),
    "lfw-64-palette": (400, 0.2, 1.55, 1.8),
    "ffhq-64-edm": (250, 0.88, 1.2, 1.15),
    "photo": (250, 0.93, 1.4, 1.35),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNED)
def test_a_recipe_learns_its_posterior(name: str, pretrained: Path, tmp_path: Path):
    """A recipe would run to its end and have learned something else than the posterior: one of each kind (the others
    differ in data and sizes) on images of a Gaussian prior, whose posterior is known.

    The loss falls as :data:`LEARNED` says. On noisy images that training has not seen, the squared errors of the mean
    and of samples are within its factors of the exact posterior's (the linear estimate, which is what an untrained
    network gives, is above 1.7), and the whitened residual of samples is between 0.9 and 1.1. Samples of the
    unconditional model have the prior's variance and correlation of neighbours within 15 % (the sampler's own part of
    it, with the exact prior, is 5 %).
    """
    steps, falls, of_mean, of_sample = LEARNED[name]
    np.save(tmp_path / "a.npy", draws(4000, 0).numpy().astype(np.float32))
    recipe = shrunk(name, tmp_path, pretrained)
    shares = {"none": 1.0} if name == "lfw-64" else {"none": 0.1, "denoise": 0.9}
    recipe = replace(
        recipe, sources=[PhotoSource(array="a.npy", value_range=(-1.0, 1.0))], crops=[CropSize(SIDE, 32)],
        augmentation=Augmentation(1.0, flip=0.5, turn=0.0), tasks=replace(recipe.tasks, shares=shares, group=32),
        scaling=recipe.scaling if recipe.base else {"kind": "edm", "data_std": STD}, steps=steps, warmup=20,
        learning_rate=5e-3, decay=0.5, ema=0.99, save_every=1000, log_every=20, lanes=1,
    )  # fmt: skip
    denoiser = train(recipe, tmp_path / "run", progress=False)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.mean(losses[-3:]) < falls * losses[0]
    if name == "lfw-64":
        nothing = ExactPosterior(denoiser, Nothing(), torch.zeros(96, 3, SIDE, SIDE), 0.1)
        x, expected = sample(nothing, n=1, nfe=40)[0].double(), draws(2000, 2)
        for moment in (lambda v: v.square().mean(), lambda v: (v[..., 1:] * v[..., :-1]).mean()):
            assert float(moment(x)) == pytest.approx(float(moment(expected)), rel=0.15)
        return
    x_0, sigma_y = draws(48, 1), 0.2
    y = measure(Identity(), x_0.float(), sigma_y, seed=4)
    bayes = squared(ExactPosterior(smooth_prior(), Identity(), y.double(), sigma_y).mean(), x_0)
    assert squared(STD**2 / (STD**2 + sigma_y**2) * y, x_0) > 1.7 * bayes
    learned = ExactPosterior(denoiser, Identity(), y, sigma_y)
    drawn = sample(learned, n=2, nfe=20)
    assert squared(learned.mean(), x_0) < of_mean * bayes
    assert 0.85 < squared(drawn, x_0) / (2 * bayes) < of_sample
    assert 0.9 < residual(Identity(), drawn, y, sigma_y) < 1.1


def squared(x: torch.Tensor, x_0: torch.Tensor) -> float:
    return float((x - x_0).square().mean())
