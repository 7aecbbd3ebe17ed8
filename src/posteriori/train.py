r"""Training: the EPS objective with accelerate, EMA, atomic checkpoints and exact resume.

All randomness of a step is drawn from generators seeded with ``(seed, step, process)``. A checkpoint therefore needs
weights, EMA, optimizer moments and the step, nothing else, and a resumed run continues bit for bit.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from posteriori.checkpoint import build_denoiser, save
from posteriori.data import Augmentation, Photos, PhotoSource
from posteriori.denoise import NetworkDenoiser
from posteriori.objective import NoiseLevels, Problem, eps_loss
from posteriori.tasks import TaskMixture

__all__ = ["CropSize", "Recipe", "RecipeError", "load_recipe", "train"]


class RecipeError(ValueError):
    """A recipe that cannot be used: which key, and what is allowed."""


@dataclass(frozen=True)
class CropSize:
    """A kind of batch: ``batch`` crops of side ``size``, drawn for a ``share`` of the steps."""

    size: int
    batch: int
    share: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """Everything a training run depends on. Noise levels are in the units of images in [-1, 1].

    Attributes:
        name: of the model.
        data: root folder that the folders of ``sources`` are relative to.
        sources: folders of photos.
        training_data: what the card says of the data: a name, a licence, an attribution.
        network: see :func:`posteriori.checkpoint.build_network`.
        schedule, scaling, preconditioning: see :class:`posteriori.NetworkDenoiser`.
        tasks: operators and measurement noise.
        noise: distribution of the diffusion noise.
        crops: kinds of batches.
        augmentation: of the crops.
        steps: length of the run; the learning rate falls to 0 over the last ``decay`` share of it.
        learning_rate, warmup, weight_decay, clip: of AdamW; ``warmup`` in steps, ``clip`` of the gradient's norm.
        ema: decay of the exponential moving average of the weights.
        mixed_precision: ``"bf16"`` or ``"no"``.
        save_every, log_every: in steps.
        seed: of everything.
    """

    name: str
    sources: list[PhotoSource]
    network: dict[str, Any]
    crops: list[CropSize]
    data: str = ""
    training_data: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=lambda: {"kind": "VE", "sigma_min": 0.002, "sigma_max": 80.0})
    scaling: dict[str, Any] = field(default_factory=lambda: {"kind": "edm", "data_std": 0.5})
    preconditioning: str = "spectral"
    tasks: TaskMixture = field(default_factory=TaskMixture)
    noise: NoiseLevels = field(default_factory=NoiseLevels)
    augmentation: Augmentation = field(default_factory=Augmentation)
    steps: int = 1000
    decay: float = 0.25
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    mixed_precision: str = "bf16"
    save_every: int = 500
    log_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.mixed_precision not in ("bf16", "no"):
            raise RecipeError(f"mixed_precision must be 'bf16' or 'no', got {self.mixed_precision!r}")
        if not self.crops or not self.sources:
            raise RecipeError("a recipe needs at least one entry in sources and in crops")

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, constant, linear decay to 0: ``steps`` may be changed while the rate is constant."""
        start = self.steps * (1 - self.decay)
        falling = (self.steps - step) / max(self.steps - start, 1)
        return self.learning_rate * min((step + 1) / max(self.warmup, 1), 1.0, falling)


def _build(kind: Any, value: Any, where: str) -> Any:
    """Typed construction of nested dataclasses, with errors that name the key."""
    if is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise RecipeError(f"{where or 'the recipe'} must be a mapping, got {value!r}")
        hints = get_type_hints(kind)
        known = {f.name for f in fields(kind)}
        for key in value:
            if key not in known:
                raise RecipeError(f"unknown key {where + key!r}: choose among {', '.join(sorted(known))}")
        try:
            return kind(**{k: _build(hints[k], v, f"{where}{k}.") for k, v in value.items()})
        except (TypeError, ValueError) as error:
            raise error if isinstance(error, RecipeError) else RecipeError(f"{where.rstrip('.')}: {error}") from None
    name = where.rstrip(".")
    origin = getattr(kind, "__origin__", None)
    if origin is list:
        if not isinstance(value, list):
            raise RecipeError(f"{name} must be a list, got {value!r}")
        return [_build(kind.__args__[0], v, f"{name}[{i}].") for i, v in enumerate(value)]
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(kind.__args__):
            raise RecipeError(f"{name} must be a list of {len(kind.__args__)} values, got {value!r}")
        return tuple(_build(k, v, f"{name}.") for k, v in zip(kind.__args__, value, strict=True))
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind in (int, str, bool) and type(value) is not kind:
        raise RecipeError(f"{name} must be of type {kind.__name__}, got {value!r}")
    if kind is float or (origin is dict and not isinstance(value, dict)):
        raise RecipeError(f"{name} must be {'a number' if kind is float else 'a mapping'}, got {value!r}")
    return value


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe.

    Args:
        path: the file.
        overrides: ``key=value`` pairs, dotted keys for nested ones, values in YAML.

    Raises:
        RecipeError: when the file is missing or not YAML, a key is unknown, or a value has the wrong type.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise RecipeError(f"cannot read recipe {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from None
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator:
            raise RecipeError(f"--set takes key=value, got {override!r}")
        *parents, last = key.split(".")
        target = content
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = yaml.safe_load(text) if text else ""
    recipe: Recipe = _build(Recipe, content, "")
    return recipe


class _RunState:
    """Weights, EMA, optimizer moments and step as one safetensors file, written atomically."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, network: nn.Module, ema: list[Tensor], optimizer: torch.optim.Optimizer, step: int) -> None:
        tensors: dict[str, Tensor] = {}
        for (name, parameter), average in zip(network.named_parameters(), ema, strict=True):
            tensors[f"weights.{name}"] = parameter.detach()
            tensors[f"ema.{name}"] = average
            for key, value in optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
        # clone: parameters may share or stride their storage (channels_last), which safetensors refuses
        tensors = {k: v.cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
        temporary = self.path.with_name(f".{self.path.name}.partial")
        save_file(tensors, temporary, metadata={"step": str(step)})
        temporary.replace(self.path)

    def read(self, network: nn.Module, ema: list[Tensor], optimizer: torch.optim.Optimizer) -> int:
        from safetensors import safe_open

        tensors = load_file(self.path)
        with safe_open(self.path, "pt") as opened:
            step = int(opened.metadata()["step"])
        with torch.no_grad():
            for (name, parameter), average in zip(network.named_parameters(), ema, strict=True):
                parameter.copy_(tensors[f"weights.{name}"])
                average.copy_(tensors[f"ema.{name}"])
                state = {}
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    value = tensors[f"optimizer.{key}.{name}"].to(parameter.device if key != "step" else "cpu")
                    state[key] = value if key == "step" else torch.empty_like(parameter).copy_(value)
                optimizer.state[parameter] = state
        return step


def draw_problems(recipe: Recipe, photos: Photos, step: int, process: int = 0) -> list[Problem]:
    """The training problems of a step: a function of the recipe, the step and the process alone."""
    rng = np.random.default_rng([recipe.seed, step, process])
    shares = np.array([c.share for c in recipe.crops])
    kind = recipe.crops[int(rng.choice(len(shares), p=shares / shares.sum()))]
    problems = []
    for count in recipe.tasks.groups(kind.batch):
        x_0 = photos.crops(count, kind.size, rng)
        _, operator, sigma_y = recipe.tasks.draw(count, kind.size, rng)
        problems.append(Problem(x_0, operator, sigma_y))
    return problems


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
        RecipeError: when the folder holds a run and ``resume`` is not set.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from diffusers.training_utils import EMAModel

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = _RunState(folder / "state.safetensors")
    if state.path.exists() and not resume:
        raise RecipeError(f"{folder} already holds a run: add --resume to continue it, or choose another folder")
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision)
    root = Path(recipe.data)
    sources = [PhotoSource(str(root / s.folder), s.match, s.weight) for s in recipe.sources]
    photos = Photos(sources, recipe.augmentation)
    set_seed(recipe.seed)
    denoiser = build_denoiser(card_of(recipe, 0)).to(accelerator.device)
    network = denoiser.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        network.parameters(), recipe.learning_rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay, fused=True
    )
    ema = EMAModel(network.parameters(), decay=recipe.ema, use_ema_warmup=True, power=0.75)
    step = state.read(network, ema.shadow_params, optimizer) if state.path.exists() else 0
    ema.optimization_step = step
    denoiser.backbone, optimizer = accelerator.prepare(network, optimizer)

    def export(at: int) -> None:
        ema.store(network.parameters())
        ema.copy_to(network.parameters())
        saved, denoiser.backbone = denoiser.backbone, network
        save(denoiser, folder / "model", card_of(recipe, at), torch.bfloat16)
        denoiser.backbone = saved
        ema.restore(network.parameters())

    metrics = folder / "metrics.jsonl"
    _drop_lines_after(metrics, step)
    losses: list[float] = []
    began = time.monotonic()
    bar = _Bar(recipe.steps, step, progress and accelerator.is_main_process)
    with bar:
        while step < recipe.steps:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate_at(step)
            torch.manual_seed(int(np.random.SeedSequence([recipe.seed, step, accelerator.process_index])
                                  .generate_state(1, np.uint64)[0] >> 1))  # fmt: skip
            problems = draw_problems(recipe, photos, step, accelerator.process_index)
            loss, _ = eps_loss(denoiser, problems, recipe.noise)
            if not math.isfinite(float(loss.detach())):
                raise RuntimeError(f"the loss is not finite at step {step}: lower learning_rate")
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(network.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(network.parameters())
            step += 1
            losses.append(float(loss.detach()))
            bar.update(step, losses[-1])
            if on_step:
                on_step(step, losses[-1])
            if accelerator.is_main_process:
                if step % recipe.log_every == 0 or step == recipe.steps:
                    row = {"step": step, "loss": float(np.mean(losses)), "lr": group["lr"],
                           "seconds": round(time.monotonic() - began, 2)}  # fmt: skip
                    with metrics.open("a") as stream:
                        stream.write(json.dumps(row) + "\n")
                    losses.clear()
                if step % recipe.save_every == 0 or step == recipe.steps:
                    state.write(network, ema.shadow_params, optimizer, step)
                    export(step)
    ema.copy_to(network.parameters())
    denoiser.backbone = network
    return denoiser.eval()


def _drop_lines_after(path: Path, step: int) -> None:
    """A killed run may have logged steps past its last checkpoint; they are about to be logged again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if line and json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in kept))


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
