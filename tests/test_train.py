"""Training on a few generated pictures: it learns, it resumes to the bit, and it refuses what it cannot do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import posteriori as po
from posteriori.checkpoint import build_denoiser
from posteriori.data import Augmentation, Photos, PhotoSource
from posteriori.objective import NoiseLevels, eps_loss
from posteriori.operators.checking import report
from posteriori.tasks import TaskMixture, box_mask, free_form_mask, random_mask
from posteriori.train import CropSize, Recipe, RecipeError, card_of, draw_problems, load_recipe, train


def picture(seed: int, size: tuple[int, int] = (40, 56)) -> np.ndarray:
    """A smooth colour gradient with a few rectangles."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]] / max(size)
    slopes = rng.uniform(-1, 1, (3, 3))
    image = slopes[:, 0, None, None] + slopes[:, 1, None, None] * y + slopes[:, 2, None, None] * x
    for _ in range(4):
        top, left = rng.integers(0, size[0] - 8), rng.integers(0, size[1] - 8)
        image[:, top : top + rng.integers(5, 16), left : left + rng.integers(5, 16)] = rng.uniform(-1, 1, (3, 1, 1))
    return (np.clip(image.transpose(1, 2, 0), -1, 1) * 127.5 + 127.5).astype(np.uint8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "photos"
    folder.mkdir()
    for i in range(6):
        Image.fromarray(picture(i)).save(folder / f"{i}.png")
    return folder


def content(photos: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "data": str(photos.parent),
        "sources": [{"folder": photos.name}],
        "network": {"kind": "photo", "image_channels": 3, "channels": [12, 16], "blocks": [1, 1], "embedding": 16},
        "crops": [{"size": 16, "batch": 12}],
        "steps": 12,
        "warmup": 2,
        "learning_rate": 0.003,
        "mixed_precision": "no",
        "save_every": 4,
        "log_every": 2,
        **changes,
    }


def recipe(photos: Path, tmp_path: Path, **changes: Any) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content(photos, **changes)))
    return load_recipe(path)


def same_state(a: Path, b: Path) -> bool:
    first, second = load_file(a / "state.safetensors"), load_file(b / "state.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def logged(folder: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["lr"]) for r in rows]


# -- learning --------------------------------------------------------------------------------------------------------


def test_training_learns(photos: Path, tmp_path: Path) -> None:
    """A sign, a detached graph or a learning rate of 0: on problems that training has not seen, the loss must be below
    0.85 of that of the linear estimate, which an untrained network is. The log must say so too."""
    r = recipe(photos, tmp_path, steps=160, save_every=160, log_every=20, ema=0.97, learning_rate=0.005)
    trained = train(r, tmp_path / "run", progress=False)
    source = Photos([PhotoSource(str(photos))])
    untrained = build_denoiser(card_of(r, 0))
    means = []
    for denoiser in (untrained, trained):
        torch.manual_seed(0)
        with torch.no_grad():
            losses = [eps_loss(denoiser, draw_problems(r, source, 10_000 + i), r.noise)[0] for i in range(20)]
        means.append(float(torch.stack(losses).mean()))
    assert means[1] < 0.85 * means[0], means
    rows = logged(tmp_path / "run")
    assert [step for step, _, _ in rows] == list(range(20, 161, 20))
    assert np.mean([loss for _, loss, _ in rows[-3:]]) < 0.95 * rows[0][1]
    # the returned and the saved model are both the averaged weights (saved in bfloat16)
    loaded = po.load(tmp_path / "run" / "model")
    averaged = {k[4:]: v for k, v in load_file(tmp_path / "run" / "state.safetensors").items() if k.startswith("ema.")}
    for name, weight in trained.backbone.named_parameters():
        assert torch.equal(weight, averaged[name]), name
        assert torch.equal(dict(loaded.backbone.named_parameters())[name], averaged[name].bfloat16().float()), name
    assert loaded.card["training"]["steps"] == 160
    assert loaded.sigma_y_range == (0.01, 0.2)
    assert not trained.training


def test_mixed_precision_trains(photos: Path, tmp_path: Path) -> None:
    """bfloat16 must reach the network alone: weights stay float32 and the loss finite."""
    trained = train(recipe(photos, tmp_path, mixed_precision="bf16", steps=3), tmp_path / "run", progress=False)
    assert all(p.dtype == torch.float32 for p in trained.backbone.parameters())
    assert np.isfinite([loss for _, loss, _ in logged(tmp_path / "run")]).all()


@pytest.mark.parametrize("has", [True, False])
def test_precision_is_chosen_by_the_processor(
    has: bool, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emulated bfloat16 would train fifty times slower than float32, in silence."""
    monkeypatch.setattr("posteriori.train.loop.prefers_bfloat16", lambda device: has)
    seen: set[torch.dtype] = set()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, out: seen.add(out.dtype) if isinstance(module, torch.nn.Conv2d) else None
    )
    try:
        train(recipe(photos, tmp_path, mixed_precision="auto", steps=1), tmp_path / "run", progress=False)
    finally:
        hook.remove()
    assert seen == {torch.bfloat16 if has else torch.float32}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_networks_train_on_crops_of_several_sizes(photos: Path, tmp_path: Path) -> None:
    """A graph for all sizes at once is refused by the compiler, at the first crop of the second size."""
    crops = [{"size": 16, "batch": 2, "slot": 0}, {"size": 24, "batch": 1, "slot": 1}]
    small = {"kind": "photo", "image_channels": 3, "channels": [8], "blocks": [1], "embedding": 8}
    plain, compiled = (recipe(photos, tmp_path, crops=crops, network=small, steps=2, compile=c) for c in (False, True))
    train(plain, tmp_path / "plain", progress=False)
    train(compiled, tmp_path / "compiled", progress=False)
    for (_, a, _), (_, b, _) in zip(logged(tmp_path / "plain"), logged(tmp_path / "compiled"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_an_unquoted_no_is_the_word(tmp_path: Path) -> None:
    """YAML reads ``mixed_precision: no`` as false; it must not be refused."""
    (tmp_path / "r.yaml").write_text(
        "name: x\nsources: [{folder: .}]\nnetwork: {kind: photo}\ncrops: [{size: 16, batch: 1}]\nmixed_precision: no\n"
    )
    assert load_recipe(tmp_path / "r.yaml").mixed_precision == "no"
    with pytest.raises(RecipeError, match="must be"):
        load_recipe(tmp_path / "r.yaml", ["mixed_precision=yes"])


def test_rate_of_learning() -> None:
    """A warm-up that starts at 0, a decay that ends early, or one that turns negative."""
    r = Recipe(
        "x",
        [PhotoSource(".")],
        {"kind": "photo"},
        [CropSize(16, 4)],
        steps=100,
        warmup=10,
        decay=0.25,
        learning_rate=2.0,
    )
    rates = [r.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9:76] == pytest.approx([2.0] * 67)
    assert rates[75:] == pytest.approx([2.0 * (100 - s) / 25 for s in range(75, 100)])


# -- resuming --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(recipe(photos, folder), folder / "run", progress=False)
    return folder / "run"


def test_killed_run_resumes_to_the_bit(photos: Path, tmp_path: Path, uninterrupted: Path) -> None:
    """A run on a machine that goes away would end with other weights, or with its log doubled. A process is killed
    (SIGKILL) after step 7, three steps past its last checkpoint."""
    r = recipe(photos, tmp_path)
    script = textwrap.dedent(f"""
        import time, torch
        torch.set_num_threads({torch.get_num_threads()})
        from posteriori.train import load_recipe, train
        def on_step(step, loss):
            print(step, flush=True)
            if step == 7:
                time.sleep(600)
        recipe = load_recipe({str(tmp_path / "recipe.yaml")!r})
        train(recipe, {str(tmp_path / "run")!r}, progress=False, on_step=on_step)
    """)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    steps = []
    for line in process.stdout:
        steps.append(int(line))
        if steps[-1] == 7:
            break
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    process.stdout.close()
    assert steps == list(range(1, 8))
    assert [s for s, _, _ in logged(tmp_path / "run")] == [2, 4, 6]
    with (tmp_path / "run" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 8, "lo')  # torn off in the middle of a line
    resumed: list[int] = []
    train(r, tmp_path / "run", resume=True, progress=False, on_step=lambda step, loss: resumed.append(step))
    assert resumed == list(range(5, 13))
    assert same_state(tmp_path / "run", uninterrupted)
    assert logged(tmp_path / "run") == logged(uninterrupted)
    weights = [f / "model" / "model.safetensors" for f in (tmp_path / "run", uninterrupted)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_finished_run_resumes_to_itself(photos: Path, tmp_path: Path, uninterrupted: Path) -> None:
    """Asking again for a finished run would train on, or fail."""
    r = recipe(photos, tmp_path)
    before = (uninterrupted / "state.safetensors").read_bytes()
    trained = train(r, uninterrupted, resume=True, progress=False)
    assert (uninterrupted / "state.safetensors").read_bytes() == before
    averaged = load_file(uninterrupted / "state.safetensors")
    for name, weight in trained.backbone.named_parameters():
        assert torch.equal(weight, averaged[f"ema.{name}"])


def test_runs_are_not_overwritten(photos: Path, tmp_path: Path, uninterrupted: Path) -> None:
    """Hours of training lost to a forgotten option, or continued with another network."""
    with pytest.raises(RecipeError, match="already holds a run: add --resume"):
        train(recipe(photos, tmp_path), uninterrupted, progress=False)
    other = {"kind": "photo", "channels": [12, 12], "blocks": [1, 1], "embedding": 16}
    for network in (other, {**other, "channels": [12], "blocks": [1]}):
        with pytest.raises(RecipeError, match="not a run of this recipe"):
            train(recipe(photos, tmp_path, network=network), uninterrupted, resume=True, progress=False)


def test_seed_decides(photos: Path, tmp_path: Path, uninterrupted: Path) -> None:
    """Another seed that gives the same run, or the same seed another."""
    train(recipe(photos, tmp_path), tmp_path / "same", progress=False)
    assert same_state(tmp_path / "same", uninterrupted)
    train(recipe(photos, tmp_path, seed=1), tmp_path / "other", progress=False)
    assert not same_state(tmp_path / "other", uninterrupted)


def test_problems_depend_on_the_step_alone(photos: Path, tmp_path: Path) -> None:
    """A resumed run would see other crops, masks or noise; two processes of one run the same."""
    r = recipe(photos, tmp_path)
    source = Photos([PhotoSource(str(photos))])

    def parts(step: int, process: int = 0) -> list[Tensor]:
        return [t for p in draw_problems(r, source, step, process) for t in (p.x_0, p.sigma_y, p.A(p.x_0))]

    def equal(u: list[Tensor], v: list[Tensor]) -> bool:
        return len(u) == len(v) and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(u, v, strict=True))

    parts(4)
    assert equal(parts(3), parts(3))
    assert not equal(parts(3), parts(4))
    assert not equal(parts(3), parts(3, process=1))
    assert sum(p.x_0.shape[0] for p in draw_problems(r, source, 3)) == 12


# -- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rates": 1.0}, "unknown key 'learning_rates'"),
        ({"crops": [{"size": 16, "batch": 4, "shape": 3}]}, r"unknown key 'crops\[0\].shape'"),
        ({"noise": {"men": 1.0}}, "unknown key 'noise.men'"),
        ({"steps": "many"}, "steps must be of type int, got 'many'"),
        ({"steps": 2.5}, "steps must be of type int"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"learning_rate": "fast"}, "learning_rate must be a number"),
        ({"learning_rate": True}, "learning_rate must be a number"),
        ({"crops": {"size": 16}}, "crops must be a list"),
        ({"crops": []}, "at least one entry in sources and in crops"),
        ({"crops": [{"size": 16}]}, r"crops\[0\].*batch"),
        ({"crops": [16]}, r"crops\[0\] must be a mapping"),
        ({"network": "photo"}, "network must be a mapping"),
        ({"tasks": {"sigma_y": [0.1]}}, "tasks.sigma_y must be a list of 2 values"),
        ({"tasks": {"shares": {"colour": 1.0}}}, r"tasks: unknown tasks \['colour'\]"),
        ({"preconditioning": "none"}, "preconditioning must be 'spectral' or"),
        ({"weight": 2}, "weight must be 'expected' or 'backbone'"),
        ({"base": {"source": "model"}}, "either network or base"),
        ({"sources": [{"folder": "a", "array": "b.npy"}]}, r"sources\[0\]: a source is one of .*given: folder, array"),
        ({"sources": [{"array": "b.npy", "value_range": [1, 0]}]}, r"value_range must be \[black, white\]"),
        ({"sources": [{"shards": "*.tar"}], "workers": 2}, "lanes is 1, which 2 workers cannot share"),
        ({"tasks": {"shares": {"none": "half"}}}, "tasks.shares.none must be a number"),
        ({"tasks": {"shares": {"none": 0}}}, "shares must not be negative, nor all 0"),
        ({"corrupt": 2}, "corrupt must be between 0 and 1"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be 'auto' or 'bf16' or 'no'"),
    ],
    ids=str,
)
def test_recipe_errors_name_the_key(photos: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """A misspelt key would be ignored for hours, or found by a traceback."""
    with pytest.raises(RecipeError, match=message):
        recipe(photos, tmp_path, **changes)


def test_missing_key_is_named(photos: Path, tmp_path: Path) -> None:
    """What to add would have to be guessed."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in content(photos).items() if k != "network"}))
    with pytest.raises(RecipeError, match="network"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "must be a mapping"),
        (b"- 1\n", "must be a mapping"),
        (b"name: [", "not valid YAML"),
        (b"\xff\xfe\x00\x01", "not valid YAML"),
    ],
    ids=repr,
)
def test_unreadable_recipes(tmp_path: Path, text: bytes, message: str) -> None:
    """A traceback of the YAML parser instead of a line."""
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)
    with pytest.raises(RecipeError):
        load_recipe(path, ["steps=3"])
    with pytest.raises(RecipeError, match="cannot read recipe"):
        load_recipe(tmp_path / "missing.yaml")


def test_overrides(photos: Path, tmp_path: Path) -> None:
    """--set would be ignored, or change a neighbour."""
    recipe(photos, tmp_path)
    path = tmp_path / "recipe.yaml"
    changed = load_recipe(path, ["steps=7", "noise.mean=-2", "tasks.sigma_y=[0.02, 0.1]", "data="])
    assert changed.steps == 7
    assert changed.noise.mean == -2.0
    assert changed.tasks.sigma_y == (0.02, 0.1)
    assert changed.data == ""
    plain = load_recipe(path)
    assert replace(changed, steps=12, noise=plain.noise, tasks=plain.tasks, data=plain.data) == plain
    for override, message in [
        ("steps", "key=value"),
        ("step=3", "unknown key 'step'"),
        ("crops.size=3", "crops is not a mapping"),
        ("name.first=x", "name is not a mapping"),
        ("steps=[", "not valid YAML"),
    ]:
        with pytest.raises(RecipeError, match=message):
            load_recipe(path, [override])


@pytest.mark.parametrize(
    "changes",
    [
        {"network": {"kind": "vit"}},
        {"network": {"kind": "photo", "depth": 3}},
        {"schedule": {"kind": "VE", "beta": 3}},
        {"scaling": {"kind": "score"}},
    ],
    ids=str,
)
def test_networks_that_cannot_be_built(photos: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """A traceback from the network's constructor, after the photos have been read."""
    with pytest.raises(RecipeError, match="network, schedule, scaling or preconditioning"):
        train(recipe(photos, tmp_path, **changes), tmp_path / "run", progress=False)


def test_missing_photos(photos: Path, tmp_path: Path) -> None:
    """An empty folder would train on nothing, or fail in the first step."""
    with pytest.raises(ValueError, match="no folder"):
        train(recipe(photos, tmp_path, data="/nowhere"), tmp_path / "run", progress=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="no readable photo"):
        Photos([PhotoSource(str(tmp_path / "empty"))])


# -- crops and tasks -------------------------------------------------------------------------------------------------


def test_crops_are_pieces_of_the_photos(tmp_path: Path) -> None:
    """Crops in another range, channel order or orientation than the photo: at its own scale each is found in it."""
    image = picture(3)
    Image.fromarray(image).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    plain = Photos([PhotoSource(str(tmp_path))], Augmentation(native_share=1.0, flip=0.0, turn=0.0))
    assert len(plain) == 1
    assert [s.partition(": ")[0] for s in plain.skipped] == [str(tmp_path / "b.png")]
    crops = plain.crops(5, 24, np.random.default_rng(0))
    assert crops.shape == (5, 3, 24, 24)
    windows = np.lib.stride_tricks.sliding_window_view(image, (24, 24), (0, 1)).reshape(-1, 3, 24, 24)
    for crop in crops:
        as_bytes = ((crop + 1) * 127.5).round().numpy().astype(np.uint8)
        assert (windows == as_bytes).all((1, 2, 3)).any()
    assert torch.equal(crops, plain.crops(5, 24, np.random.default_rng(0)))


def test_crops_of_any_size_and_scale(photos: Path) -> None:
    """Crops outside of [-1, 1], of another size than asked for, or from photos that are too small."""
    source = Photos([PhotoSource(str(photos), weight=2.0), PhotoSource(str(photos), match=r"[01]\.png")])
    assert len(source) == 8
    for size in (8, 40, 41, 90):
        crops = source.crops(20, size, np.random.default_rng(size))
        assert crops.shape == (20, 3, size, size)
        assert crops.dtype == torch.float32
        assert float(crops.min()) >= -1
        assert float(crops.max()) <= 1
        assert float(crops.std()) > 0.1


@pytest.mark.parametrize("task", ["none", "inpaint", "box", "sr", "gaussian", "motion", "denoise"])
def test_tasks_draw_operators_that_keep_their_promises(task: str) -> None:
    """A random operator with an adjoint or a solve of its own mind; noise outside the model's range."""
    mixture = TaskMixture(shares={task: 1.0})
    for seed in range(3):
        name, A, sigma_y = mixture.draw(3, 24, np.random.default_rng(seed))
        assert name == task
        assert sigma_y.shape == (3,)
        assert float(sigma_y.min()) >= 0.01 - 1e-7
        assert float(sigma_y.max()) <= 0.2 + 1e-7
        assert all(row.passed for row in report(A, (3, 24, 24), batch=3))


def test_tasks_have_their_shares() -> None:
    """One task would crowd out another (4 standard errors of 2,000 draws)."""
    shares = {"none": 0.2, "denoise": 0.3, "inpaint": 0.5}
    mixture, rng = TaskMixture(shares=shares), np.random.default_rng(0)
    names = [mixture.draw(1, 8, rng)[0] for _ in range(2000)]
    for name, share in shares.items():
        assert abs(names.count(name) / 2000 - share) < 4 * (share * (1 - share) / 2000) ** 0.5
    for count in (1, 3, 7, 8, 9, 16, 18):
        assert sum(mixture.groups(count)) == count


def test_masks() -> None:
    """Masks turned round (1 is measured), or boxes outside of the image."""
    rng = np.random.default_rng(0)
    mask = random_mask((100, 100), 0.7, rng)
    assert abs(float(mask.mean()) - 0.3) < 0.02
    centred = box_mask((10, 12), (4, 6))
    assert float((1 - centred).sum()) == 24
    assert float((1 - centred)[0, 3:7, 3:9].sum()) == 24
    for _ in range(20):
        assert float((1 - box_mask((10, 12), (4, 6), rng)).sum()) == 24
        strokes = free_form_mask((40, 40), rng)
        assert set(strokes.unique().tolist()) <= {0.0, 1.0}
        assert 0 < float(strokes.mean()) < 1
    assert float(box_mask((5, 5), (9, 9)).sum()) == 0


def test_init_starts_from_the_weights_of_a_model(photos: Path, tmp_path: Path) -> None:
    """A fine-tune would start from noise, or change nothing but say it did: at a learning rate of 0 the weights are
    those of the model it names."""
    first = recipe(photos, tmp_path, steps=3)
    train(first, tmp_path / "first", progress=False)
    start = tmp_path / "first" / "model"
    second = recipe(photos, tmp_path, steps=1, learning_rate=0.0, weight_decay=0.0, init=str(start), seed=5)
    train(second, tmp_path / "second", progress=False)
    before, after = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(after[k], v) for k, v in before.items())
    deeper = {**first.network, "blocks": [1, 2], "up_blocks": [2, 1]}
    third = recipe(photos, tmp_path, steps=1, learning_rate=0.0, weight_decay=0.0, init=str(start), network=deeper)
    train(third, tmp_path / "deeper", progress=False)
    grown = load_file(tmp_path / "deeper" / "model" / "model.safetensors")
    assert set(grown) > set(before)
    assert all(torch.equal(grown[k], v) for k, v in before.items())
    other = {"kind": "photo", "image_channels": 3, "channels": [8, 16], "blocks": [1, 1], "embedding": 16}
    for name, network in ((str(start), other), (str(tmp_path / "nowhere"), first.network)):
        with pytest.raises(RecipeError, match="init"):
            train(recipe(photos, tmp_path, init=name, network=network), tmp_path / "third", progress=False)
    assert not list((tmp_path / "third").glob("*"))


def test_blindness_is_trained_and_kept(photos: Path, tmp_path: Path) -> None:
    """A network trained without ``x_t`` at the largest noise would be shown it after loading, or the reverse."""
    noise = {"top_share": 0.5, "blind_share": 0.5}
    train(recipe(photos, tmp_path, noise=noise, steps=2), tmp_path / "run", progress=False)
    loaded = po.load(tmp_path / "run" / "model")
    assert loaded.blind_mean
    posterior = po.ExactPosterior(loaded, po.operators.Inpainting(torch.zeros(8, 8)), torch.zeros(1, 3, 8, 8), 0.1)
    assert torch.equal(posterior.mean(0), posterior.mean(1))
    po.save(loaded, tmp_path / "again")
    assert po.load(tmp_path / "again").blind_mean
    train(recipe(photos, tmp_path, steps=2), tmp_path / "seeing", progress=False)
    assert not po.load(tmp_path / "seeing" / "model").blind_mean


@pytest.mark.parametrize("schedule", [po.VE(), po.VP(), po.CosineVP(), po.RectifiedFlow()], ids=str)
def test_share_that_is_blind(schedule: po.Schedule) -> None:
    """Samples below the largest noise would lose what ``x_t`` says, or none would be blind for rounding."""
    generator = torch.Generator().manual_seed(0)
    levels = NoiseLevels(top_share=0.4, blind_share=0.25)
    t = levels.draw(20_000, schedule, generator)
    seen = levels.seen(t, schedule, generator)
    q = schedule.ratio(t)
    top = q > 0.999 * q.max()
    assert bool((seen[~top] == 1).all())
    assert float(1 - seen[top].mean()) == pytest.approx(0.25, abs=0.02)
    assert bool((NoiseLevels(top_share=1.0).seen(t, schedule, generator) == 1).all())
