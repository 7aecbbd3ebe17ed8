r"""Training: the EPS objective with accelerate, EMA, atomic checkpoints and exact resume.

All randomness of a step is drawn from generators seeded with ``(seed, step, process)``. A checkpoint therefore needs
weights, EMA, optimizer moments and the step, nothing else, and a resumed run continues bit for bit.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from posteriori.checkpoint import CheckpointError, build_denoiser, load, save
from posteriori.data import Photos, PhotoSource
from posteriori.denoise import NetworkDenoiser
from posteriori.objective import LossScale, Problem, eps_loss
from posteriori.recipe import CropSize, Recipe, RecipeError, load_recipe

__all__ = ["CropSize", "Recipe", "RecipeError", "load_recipe", "train"]


class _RunState:
    """Weights (with those of the loss's scale), EMA, optimizer moments and step as one safetensors file, written
    atomically."""

    def __init__(self, path: Path, network: nn.Module, scale: nn.Module, ema: list[Tensor]) -> None:
        self.path = path
        self.parameters = dict(network.named_parameters())
        self.averages = dict(zip(self.parameters, ema, strict=True))
        self.parameters |= {f"loss_scale.{name}": p for name, p in scale.named_parameters()}

    def write(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        tensors = {f"ema.{name}": average for name, average in self.averages.items()}
        for name, parameter in self.parameters.items():
            tensors[f"weights.{name}"] = parameter.detach()
            for key, value in optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
        # clone: parameters may share or stride their storage (channels_last), which safetensors refuses
        tensors = {k: v.cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
        temporary = self.path.with_name(f".{self.path.name}.partial")
        save_file(tensors, temporary, metadata={"step": str(step)})
        temporary.replace(self.path)

    def read(self, optimizer: torch.optim.Optimizer) -> int:
        from safetensors import safe_open

        tensors = load_file(self.path)
        with safe_open(self.path, "pt") as opened:
            step = int(opened.metadata()["step"])
        if {k for k in tensors if k.startswith("weights.")} != {f"weights.{name}" for name in self.parameters}:
            raise KeyError("other parameters")
        with torch.no_grad():
            for name, average in self.averages.items():
                average.copy_(tensors[f"ema.{name}"])
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weights.{name}"])
                state = {}
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    value = tensors[f"optimizer.{key}.{name}"].to(parameter.device if key != "step" else "cpu")
                    state[key] = value if key == "step" else torch.empty_like(parameter).copy_(value)
                optimizer.state[parameter] = state
        return step


def draw_problems(recipe: Recipe, photos: Photos, step: int, process: int = 0) -> list[Problem]:
    """The training problems of a step: a function of the recipe, the step and the process alone."""
    rng = np.random.default_rng([recipe.seed, step, process])
    problems = []
    for slot in sorted({c.slot for c in recipe.crops}):
        kinds = [c for c in recipe.crops if c.slot == slot]
        shares = np.array([c.share for c in kinds])
        kind = kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))]
        for count in recipe.tasks.groups(kind.batch):
            x_0 = photos.crops(count, kind.size, rng)
            _, operator, sigma_y = recipe.tasks.draw(count, kind.size, rng)
            problems.append(Problem(x_0, operator, sigma_y))
    return problems


def by_shape(problems: list[Problem]) -> list[list[Problem]]:
    """Problems that can share one network evaluation."""
    groups: dict[tuple[int, ...], list[Problem]] = {}
    for p in problems:
        groups.setdefault(tuple(p.x_0.shape[1:]), []).append(p)
    return list(groups.values())


class _Steps(Dataset[list[Problem]]):
    """The problems of step ``i`` as item ``i``, so that a ``DataLoader`` can draw them ahead in other processes."""

    def __init__(self, recipe: Recipe, photos: Photos, process: int) -> None:
        self.recipe, self.photos, self.process = recipe, photos, process

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, step: int) -> list[Problem]:
        return draw_problems(self.recipe, self.photos, step, self.process)


def _batches(recipe: Recipe, photos: Photos, start: int, process: int) -> Iterator[list[Problem]]:
    steps = _Steps(recipe, photos, process)
    context = "forkserver" if recipe.workers else None  # a fork of a process that runs threads may hang
    loader = DataLoader(
        steps, batch_size=None, sampler=range(start, recipe.steps), num_workers=recipe.workers,
        multiprocessing_context=context,
    )  # fmt: skip
    return iter(loader)


def card_of(recipe: Recipe, step: int) -> dict[str, Any]:
    """The card of a model trained by a recipe."""
    return {
        "name": recipe.name,
        "network": recipe.network,
        "schedule": recipe.schedule,
        "scaling": recipe.scaling,
        "preconditioning": recipe.preconditioning,
        "sigma_y_range": list(recipe.tasks.sigma_y),
        "value_range": [-1, 1],
        "tasks": recipe.tasks.shares,
        "training_data": recipe.training_data,
        "training": {
            "steps": step,
            "crops": [asdict(c) for c in recipe.crops],
            "learning_rate": recipe.learning_rate,
            "ema": recipe.ema,
            "noise": asdict(recipe.noise),
            "seed": recipe.seed,
            **({"init": recipe.init} if recipe.init else {}),
        },
    }


def train(
    recipe: Recipe,
    folder: str | Path,
    *,
    resume: bool = False,
    progress: bool = True,
    on_step: Callable[[int, float], None] | None = None,
) -> NetworkDenoiser:
    """Run a recipe to its end.

    Writes ``state.safetensors`` (to resume), ``metrics.jsonl`` (one line per ``log_every`` steps), and at the end and
    at every save the EMA weights as a loadable model in ``model/``.

    Args:
        recipe: what to do.
        folder: where to write.
        resume: continue from ``state.safetensors`` when there is one.
        progress: show a progress bar.
        on_step: called with the step and its loss after every step.

    Returns:
        The trained denoiser with EMA weights.

    Raises:
        RecipeError: when the network cannot be built, the folder holds a run and ``resume`` is not set, or it holds
            the run of another recipe.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import set_seed
    from diffusers.training_utils import EMAModel

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state_path = folder / "state.safetensors"
    if state_path.exists() and not resume:
        raise RecipeError(f"{folder} already holds a run: add --resume to continue it, or choose another folder")
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision)
    root = Path(recipe.data)
    sources = [PhotoSource(str(root / s.folder), s.match, s.weight) for s in recipe.sources]
    photos = Photos(sources, recipe.augmentation)
    set_seed(recipe.seed)
    try:
        denoiser = build_denoiser(card_of(recipe, 0)).to(accelerator.device)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"network, schedule, scaling or preconditioning: {error}") from None
    if recipe.init:
        _start_from(recipe.init, denoiser)
    network = denoiser.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    scale = LossScale().to(accelerator.device)
    trained = [{"params": list(network.parameters()), "factor": 1.0}]
    if recipe.learned_scale:  # small and on the heels of the network, so ten times faster
        trained.append({"params": list(scale.parameters()), "factor": 10.0})
    optimizer = torch.optim.AdamW(
        trained, recipe.learning_rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay, fused=True
    )
    ema = EMAModel(network.parameters(), decay=recipe.ema, use_ema_warmup=True, power=0.75)
    learned = scale if recipe.learned_scale else None
    state = _RunState(state_path, network, learned or nn.Module(), ema.shadow_params)
    try:
        step = state.read(optimizer) if state.path.exists() else 0
    except (KeyError, RuntimeError, SafetensorError):
        raise RecipeError(f"{state.path} is not a run of this recipe: choose another folder") from None
    ema.optimization_step = step
    prepared, optimizer = accelerator.prepare(network, optimizer)
    learned = accelerator.prepare(learned) if learned else None
    denoiser.backbone = cast("nn.Module", torch.compile(prepared)) if recipe.compile else prepared

    def export(at: int) -> None:
        ema.store(network.parameters())
        ema.copy_to(network.parameters())
        saved, denoiser.backbone = denoiser.backbone, network
        save(denoiser, folder / "model", card_of(recipe, at), torch.bfloat16)
        denoiser.backbone = saved
        ema.restore(network.parameters())

    metrics = folder / "metrics.jsonl"
    _drop_lines_after(metrics, step)
    batches = _batches(recipe, photos, step, accelerator.process_index)
    losses: list[float] = []
    began = time.monotonic()
    bar = _Bar(recipe.steps, step, progress and accelerator.is_main_process)
    with bar:
        while step < recipe.steps:
            rate = recipe.learning_rate_at(step)
            for parameters in optimizer.param_groups:
                parameters["lr"] = rate * parameters["factor"]
            torch.manual_seed(int(np.random.SeedSequence([recipe.seed, step, accelerator.process_index])
                                  .generate_state(1, np.uint64)[0] >> 1))  # fmt: skip
            problems = [replace(p, x_0=p.x_0.to(accelerator.device)) for p in next(batches)]
            count = sum(p.x_0.shape[0] for p in problems)
            total = 0.0
            for group in by_shape(problems):
                loss, each = eps_loss(denoiser, group, recipe.noise, scale=learned)
                accelerator.backward(loss * (len(each) / count))
                total += float(each.sum()) / count
            if not math.isfinite(total):
                raise RuntimeError(f"the loss is not finite at step {step}: lower learning_rate")
            accelerator.clip_grad_norm_(network.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(network.parameters())
            step += 1
            losses.append(total)
            bar.update(step, losses[-1])
            if on_step:
                on_step(step, losses[-1])
            if accelerator.is_main_process:
                if step % recipe.log_every == 0 or step == recipe.steps:
                    row = {"step": step, "loss": float(np.mean(losses)), "lr": rate,
                           "seconds": round(time.monotonic() - began, 2)}  # fmt: skip
                    with metrics.open("a") as stream:
                        stream.write(json.dumps(row) + "\n")
                    losses.clear()
                if step % recipe.save_every == 0 or step == recipe.steps:
                    state.write(optimizer, step)
                    export(step)
    ema.copy_to(network.parameters())
    denoiser.backbone = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    return denoiser.eval()


def _start_from(model: str, denoiser: NetworkDenoiser) -> None:
    try:
        weights = load(model).backbone.state_dict()
        denoiser.backbone.load_state_dict(weights)
    except (CheckpointError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RecipeError(f"init: cannot start from {model!r} ({reason}): give a model with this network") from None


def _drop_lines_after(path: Path, step: int) -> None:
    """A killed run may have logged steps past its last checkpoint; they are about to be logged again."""
    if path.exists():
        rows = [
            line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")
        ]  # the last may be torn
        path.write_text("".join(row for row in rows if json.loads(row)["step"] <= step))


class _Bar:
    """Progress with loss, rate and time left."""

    def __init__(self, steps: int, start: int, show: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[rate]:.2f} steps/s"), TimeRemainingColumn(), disable=not show,
        )  # fmt: skip
        self._task = self._progress.add_task("training", total=steps, completed=start, loss=float("nan"), rate=0.0)
        self._start, self._began = start, time.monotonic()

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, step: int, loss: float) -> None:
        rate = (step - self._start) / max(time.monotonic() - self._began, 1e-9)
        self._progress.update(self._task, completed=step, loss=loss, rate=rate)
