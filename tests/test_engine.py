"""The engine around the loop: processes, accumulation, starting points, what is shown while a run goes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

import posteriori as po
from posteriori.objective import NoiseLevels
from posteriori.schedule import VP, RectifiedFlow
from posteriori.train import Recipe, RecipeError, load_recipe, train
from posteriori.train.network import choose_trained, merged
from posteriori.train.state import Average
from tiny_data import png, write_shard

CONTENT: dict[str, Any] = {
    "name": "tiny",
    "sources": [{"shards": "*.tar"}],
    "network": {"kind": "photo", "channels": [8, 12], "blocks": [1, 1], "embedding": 8},
    "tasks": {"shares": {"none": 1, "inpaint": 2, "sr": 1}},
    "crops": [{"size": 16, "batch": 4}, {"size": 8, "batch": 2, "slot": 1}],
    "steps": 12,
    "warmup": 4,
    "lanes": 2,
    "mixed_precision": "no",
    "save_every": 6,
    "log_every": 1,
    "sheet_every": 0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for shard in range(2):
        pictures = {f"{i}.png": png(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for i in range(20)}
        write_shard(folder / f"{shard}.tar", pictures)
    return folder


@pytest.fixture
def plan(data: Path, tmp_path: Path) -> Recipe:
    return load_recipe(written(tmp_path), [f"data={data}"])


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**CONTENT, **changes}))
    return path


def losses(run: Path) -> np.ndarray:
    return np.array([json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()])


def weights(run: Path) -> dict[str, torch.Tensor]:
    state = load_file(run / "state.safetensors")
    return {k: v for k, v in state.items() if k.startswith("weights.")}


# -- microbatches and processes --------------------------------------------------------------------------------------


def test_a_step_of_two_microbatches_is_the_mean_of_both(plan: Recipe, tmp_path: Path) -> None:
    """Accumulated gradients would be summed, or the second microbatch repeat the first: the first step's loss is the
    mean of those of two runs that have one of the two each (the loss is taken before the step)."""
    seen: list[float] = []
    train(replace(plan, microbatches=2, steps=1), tmp_path / "two", progress=False, on_step=lambda s, x: seen.append(x))
    from posteriori.data import Photos
    from posteriori.objective import eps_loss
    from posteriori.train import by_shape, draw_problems
    from posteriori.train.loop import _seed
    from posteriori.train.network import build

    torch.manual_seed(0)
    denoiser = build(plan)
    photos = Photos(plan.sources, plan.augmentation, root=plan.data, lanes=4)
    parts = []
    for part in range(2):
        torch.manual_seed(_seed(plan.seed, 0, part))
        problems = draw_problems(plan, photos, 0, part)
        each = [eps_loss(denoiser, group, plan.noise)[1] for group in by_shape(problems)]
        parts.append(float(torch.cat(each).mean()))
    assert abs(parts[0] - parts[1]) > 1e-3
    assert seen[0] == pytest.approx(np.mean(parts), rel=1e-5)


@pytest.mark.slow
def test_two_processes_train_as_one(data: Path, tmp_path: Path) -> None:
    """More processes would train another model, or on the same samples twice: two processes under ``accelerate launch``
    and one of them alone have equal losses in every step (1e-4, what rounding grows to in twelve steps), weights
    (1e-3) and positions in the shards."""
    path = written(tmp_path, microbatches=4)
    options = ["-o", str(tmp_path / "two"), "--set", f"data={data}", "--threads", "1"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    launcher += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    done = subprocess.run(
        [*launcher, "-m", "posteriori.train", str(path), *options],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    train(load_recipe(path, [f"data={data}"]), tmp_path / "one", progress=False)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 12
    np.testing.assert_allclose(two, one, rtol=1e-4)
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, rtol=1e-3, atol=1e-3)
    from safetensors import safe_open

    places = []
    for run in ("one", "two"):
        with safe_open(tmp_path / run / "state.safetensors", "pt") as opened:
            places.append(json.loads(opened.metadata()["run"])["positions"])
    assert places[0] == places[1]
    assert len(places[0]) == 8  # two lanes for each microbatch


@pytest.mark.slow
def test_workers_change_nothing(plan: Recipe, tmp_path: Path) -> None:
    """Crops drawn ahead by two other processes, from streamed shards: the same run to the bit, also when continued."""
    stopped = tmp_path / "stopped"

    def stop(step: int, loss: float) -> None:
        if step == 8:
            raise KeyboardInterrupt

    train(replace(plan, microbatches=2), tmp_path / "none", progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(replace(plan, microbatches=2, workers=2), stopped, progress=False, on_step=stop)
    train(replace(plan, microbatches=2, workers=2), stopped, resume=True, progress=False)
    assert all(torch.equal(weights(stopped)[k], v) for k, v in weights(tmp_path / "none").items())


def test_processes_must_share_equally(data: Path, tmp_path: Path) -> None:
    """Three microbatches on two processes would weigh samples unequally, or hang: the error says what to set."""
    from posteriori.train.loop import _Run

    class Two:
        num_processes, process_index = 2, 0

    import posteriori.train.loop as loop

    before = loop._accelerator
    loop._accelerator = lambda recipe, folder: Two()  # type: ignore[assignment]
    try:
        with pytest.raises(RecipeError, match=r"microbatches is 1, which 2 processes .* --set microbatches=2"):
            _Run(load_recipe(written(tmp_path)), tmp_path / "run", False, False, None)
    finally:
        loop._accelerator = before


# -- where a run starts, and what it trains --------------------------------------------------------------------------


def test_low_rank_adapters(plan: Recipe, tmp_path: Path) -> None:
    """Adapters that train the layers they were to spare, or are lost in the exported model.

    Trained as adapters, with one layer trained whole: the frozen layers keep their weights in the state; the exported
    model does what the adapted network does (bfloat16 weights: 2 %) and differs from the one it started from."""
    pytest.importorskip("peft")
    train(replace(plan, steps=2), tmp_path / "start", progress=False)
    tuned = replace(
        plan, init=str(tmp_path / "start" / "model"), lora=2, trainable=["^stem"], steps=8, learning_rate=0.02,
        ema=0.0, ema_power=0.0, weight_decay=0.0,
    )  # fmt: skip
    trained = train(tuned, tmp_path / "run", progress=False)
    start = po.load(tmp_path / "start" / "model").backbone
    moved = {n for n, p in trained.backbone.named_parameters() if not torch.equal(p, start.get_parameter(n))}
    layers = {n for n, _ in start.named_parameters() if n.endswith("weight") and "norm" not in n}
    assert moved == layers | {n for n, _ in start.named_parameters() if n.startswith("stem.")} | {
        n for n, _ in start.named_parameters() if n.startswith("stem_modulation")
    }
    state = load_file(tmp_path / "run" / "state.safetensors")
    assert not [k for k in state if "base_layer" in k]
    exported = po.load(tmp_path / "run" / "model").backbone
    for name, value in trained.backbone.named_parameters():
        torch.testing.assert_close(exported.get_parameter(name), value, rtol=0.02, atol=0.02)
    change = trained.backbone.get_parameter("grow.0.weight") - start.get_parameter("grow.0.weight")
    assert int(torch.linalg.matrix_rank(change.flatten(1), atol=1e-5)) == 2
    finished = train(tuned, tmp_path / "run", resume=True, progress=False)
    for name, value in finished.backbone.named_parameters():
        assert torch.equal(value, trained.backbone.get_parameter(name)), name


def test_merged_adapters_are_the_adapted_network(plan: Recipe) -> None:
    """``W + B A`` with a wrong scale or layout: convolutions of all strides and linear layers, against peft's own
    forward pass (float32 rounding)."""
    pytest.importorskip("peft")
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3, stride=2), torch.nn.Conv2d(6, 4, 1), torch.nn.Flatten(), torch.nn.Linear(36, 5)
    )
    plain = torch.nn.Sequential(
        *[type(m)(*a) for m, a in zip(network, [(3, 6, 3, 2), (6, 4, 1), (), (36, 5)], strict=True)]
    )
    choose_trained(network, replace(plan, lora=2))
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    plain.load_state_dict(merged(network.state_dict()))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(plain(x), network(x), rtol=1e-4, atol=1e-5)


def test_trainable_freezes_the_rest(plan: Recipe, tmp_path: Path) -> None:
    """Weight decay or the average would move what is frozen; a pattern that finds nothing would train nothing."""
    trained = train(replace(plan, trainable=["head"], steps=3), tmp_path / "run", progress=False)
    from posteriori.train.network import build

    torch.manual_seed(plan.seed)
    start = build(plan).backbone
    for name, parameter in trained.backbone.named_parameters():
        assert torch.equal(parameter, start.get_parameter(name)) != ("head" in name), name
    with pytest.raises(RecipeError, match=r"no parameter's name has 'decoder' in it"):
        train(replace(plan, trainable=["decoder"]), tmp_path / "other", progress=False)


def test_a_base_is_fine_tuned(data: Path, tmp_path: Path) -> None:
    """Somebody's pretrained model would be forgotten, or its convention changed: a diffusers pipeline, fine-tuned at a
    learning rate of 0, denoises unmeasured signals as it did; trained, it can be loaded and knows its noise."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler(clip_sample=False)).save_pretrained(tmp_path / "pipeline")
    content = {k: v for k, v in CONTENT.items() if k != "network"} | {
        "base": {"source": str(tmp_path / "pipeline")}, "crops": [{"size": 8, "batch": 4}], "weight": "backbone",
        "noise": {"distribution": "uniform", "high_share": 0, "top_share": 0}, "steps": 2,
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    still = ["learning_rate=0", "weight_decay=0"]
    same = train(load_recipe(path, [f"data={data}", *still]), tmp_path / "same", progress=False)
    x, step = torch.randn(2, 3, 8, 8), 300
    from posteriori.operators import Nothing

    alpha = DDPMScheduler().alphas_cumprod[step].double()
    t = same.schedule.time(((1 - alpha) / alpha).sqrt())
    with torch.no_grad():
        mean = same(x, t, Nothing(), torch.zeros_like(x), 0.1).mean
        noise = unet.eval()(x, step).sample
    torch.testing.assert_close(
        mean, (x - (1 - alpha).sqrt() * noise) / alpha.sqrt(), rtol=1e-3, atol=1e-3, check_dtype=False
    )
    train(load_recipe(path, [f"data={data}"]), tmp_path / "run", progress=False)
    loaded = po.load(tmp_path / "run" / "model")
    assert loaded.sigma_y_range == (0.01, 0.2)
    assert loaded.scaling.kind == "epsilon"
    with pytest.raises(RecipeError, match="base: no model"):
        train(load_recipe(path, [f"data={data}", "base.source=/nowhere/model"]), tmp_path / "none", progress=False)


def test_average() -> None:
    """An average that remembers its random start, or forgets too fast: against the recursion written out."""
    for power in (0.75, 0.0):
        p = torch.nn.Parameter(torch.tensor([5.0]))
        average, expected = Average({"p": p}, 0.9, power), 5.0
        for step, value in enumerate([1.0, -2.0, 4.0, 0.5] * 5):
            p.data.fill_(value)
            average.update(step)
            decay = min(0.9, 1 - (1 + step) ** -power) if power else 0.9
            expected = decay * expected + (1 - decay) * value
            assert float(average.values["p"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("schedule", [VP(), RectifiedFlow()], ids=lambda s: type(s).__name__)
def test_the_backbones_own_noise(schedule: Any) -> None:
    """Fine-tuning would leave the noise a backbone was made with: ``t`` is uniform (Kolmogorov-Smirnov, p > 1e-3 of
    4,000 draws), or logit-normal."""
    from scipy import stats

    plain = {"high_share": 0.0, "top_share": 0.0}
    t = NoiseLevels("uniform", **plain).draw(4000, schedule, torch.Generator().manual_seed(0))
    share = (t - schedule.t_min) / (schedule.t_max - schedule.t_min)
    assert stats.kstest(share.numpy(), "uniform").pvalue > 1e-3
    t = NoiseLevels("logit-normal", 0.5, 0.8, **plain).draw(4000, schedule, torch.Generator().manual_seed(0))
    share = (t - schedule.t_min) / (schedule.t_max - schedule.t_min)
    assert stats.kstest(share.logit().numpy(), stats.norm(0.5, 0.8).cdf).pvalue > 1e-3


def test_dropped_measurements(plan: Recipe) -> None:
    """A network fine-tuned for one task would lose the prior (4 standard errors of 2,000 draws)."""
    mixture = replace(plan.tasks, shares={"inpaint": 1.0}, drop=0.1)
    rng = np.random.default_rng(0)
    names = [mixture.draw(1, 8, rng)[0] for _ in range(2000)]
    assert set(names) == {"none", "inpaint"}
    assert abs(names.count("none") / 2000 - 0.1) < 4 * (0.09 / 2000) ** 0.5


# -- what is shown ---------------------------------------------------------------------------------------------------


def test_what_a_run_shows_and_leaves(plan: Recipe, tmp_path: Path) -> None:
    """A run of days would be blind, or change by being watched: sheets of every task, the loss on fixed problems,
    milestones and a tracker, and the same weights as without them."""
    pytest.importorskip("tensorboard")
    np.save(Path(plan.data) / "held-out.npy", np.random.default_rng(5).integers(0, 256, (4, 16, 16, 3), np.uint8))
    from posteriori.data import PhotoSource

    watched = replace(
        plan, sheet_every=6, milestones=6, trackers=["tensorboard"], validation=[PhotoSource(array="held-out.npy")]
    )
    stream = io.StringIO()
    run = tmp_path / "run"
    train(watched, run, progress=Console(file=stream, width=100))
    train(plan, tmp_path / "plain", progress=False)
    assert all(torch.equal(weights(run)[k], v) for k, v in weights(tmp_path / "plain").items())
    sheets = sorted((run / "sheets").glob("*.png"))
    assert [s.name for s in sheets] == ["step-00000006.png", "step-00000012.png"]
    pictures = [np.asarray(Image.open(s)) for s in sheets]
    assert pictures[0].shape == pictures[1].shape
    assert (pictures[0] != pictures[1]).any()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "validation_loss" in r] == [6, 12]
    assert all(r["images_per_second"] > 0 for r in rows)
    assert po.load(run / "milestones" / "step-00000006").card["training"]["steps"] == 6
    assert list(run.rglob("events.out.tfevents*"))
    shown = stream.getvalue()
    for text in ("0 of 12 steps done, from random weights", "streamed shards", "step 12/12  loss", "images/s", "left"):
        assert text in shown, shown
    with pytest.raises(RecipeError, match="trackers: clearml cannot be used here"):
        train(replace(plan, trackers=["clearml"]), tmp_path / "other", progress=False)


def test_a_changed_recipe_is_noted(plan: Recipe, tmp_path: Path) -> None:
    """A run continued with another learning rate would not be the one its recipe describes, without a word."""
    train(replace(plan, steps=6), tmp_path / "run", progress=False)
    stream = io.StringIO()
    train(plan, tmp_path / "run", resume=True, progress=Console(file=stream, width=200))
    assert "the run began with steps = 6, it goes on with 12" in stream.getvalue()


def test_extends(tmp_path: Path) -> None:
    """A recipe would lose what it shares with another, mix two mixtures of tasks, or extend itself for ever."""
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({**CONTENT, "noise": {"mean": -2.0, "std": 1.0}}))
    (tmp_path / "b.yaml").write_text(
        "extends: a.yaml\nname: other\ntasks: {shares: {sr: 1}, group: 2}\nnoise: {std: 2.0}\n"
    )
    a, b = load_recipe(tmp_path / "a.yaml"), load_recipe(tmp_path / "b.yaml")
    assert b == replace(
        a, name="other", tasks=replace(a.tasks, shares={"sr": 1.0}, group=2), noise=replace(a.noise, std=2.0)
    )
    (tmp_path / "c.yaml").write_text("extends: c.yaml\n")
    with pytest.raises(RecipeError, match="extends itself"):
        load_recipe(tmp_path / "c.yaml")
    (tmp_path / "d.yaml").write_text("extends: nowhere.yaml\n")
    with pytest.raises(RecipeError, match=r"cannot read recipe .*nowhere"):
        load_recipe(tmp_path / "d.yaml")
