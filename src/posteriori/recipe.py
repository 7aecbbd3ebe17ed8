"""Training recipes: typed YAML, where an unknown key or a wrong type is an error that names the key."""

from __future__ import annotations

import types
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from posteriori.data import Augmentation, PhotoSource
from posteriori.denoise import Preconditioning
from posteriori.objective import NoiseLevels, Weight
from posteriori.tasks import TaskMixture

T = TypeVar("T")

__all__ = ["CropSize", "Recipe", "RecipeError", "build", "load_recipe", "read_recipe"]


class RecipeError(ValueError):
    """A recipe that cannot be used: which key, and what is allowed."""


@dataclass(frozen=True)
class CropSize:
    """A kind of batch: ``batch`` crops of side ``size``.

    Every step takes one kind from each ``slot``, with a probability in proportion to its ``share``: small and large
    crops then meet in every gradient.
    """

    size: int
    batch: int
    share: float = 1.0
    slot: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.batch < 1 or not self.share > 0:
            raise ValueError(f"size, batch and share must be positive, got {self}")


@dataclass(frozen=True)
class Recipe:
    """Everything a training run depends on. Noise levels are in the units of images in [-1, 1].

    Attributes:
        name: of the model.
        data: root folder, or beginning of a URL, that ``sources`` are relative to.
        sources: where images come from, see :class:`posteriori.data.PhotoSource`.
        training_data: what the card says of the data: a name, a licence, an attribution.
        corrupt: share of samples that may be unreadable; they are skipped and counted, and above it the run stops.

        network: see :func:`posteriori.checkpoint.build_network`.
        base: somebody's pretrained model to start from instead of ``network``: ``source`` and options of
            :func:`posteriori.backbones.load_pretrained`.
        init: a model of posteriori whose weights the run starts from (bundled name, folder or hub id); its network must
            be this recipe's, but for blocks and inputs that are added.
        trainable: regular expressions; only parameters whose names one of them finds are trained. Empty: all.
        lora: rank of low-rank adapters on every convolution and linear layer; the layers themselves stay, but for
            what ``trainable`` finds. 0: none.
        schedule, scaling, preconditioning: see :class:`posteriori.NetworkDenoiser`; with ``base`` the model's own
            schedule and scaling are kept.

        tasks: operators and measurement noise.
        noise: distribution of the diffusion noise.
        weight: of the loss, see :mod:`posteriori.objective`: ``"expected"`` or ``"backbone"``.
        learned_scale: divide every loss by its learned level, see :class:`posteriori.objective.LossScale`.
        crops: kinds of batches.
        augmentation: of the crops.

        steps: length of the run; the learning rate falls to 0 over the last ``decay`` share of it.
        learning_rate, warmup, weight_decay, clip: of AdamW; ``warmup`` in steps, ``clip`` of the gradient's norm (0:
            none).
        microbatches: a step is this many batches of ``crops``, evaluated one after another (gradient accumulation) or
            divided between processes. The run is the same either way.
        ema, ema_power: the average of the weights decays by ``min(ema, 1 - (1 + step)^-ema_power)`` a step; a power of
            0 is the constant ``ema``.
        mixed_precision: ``"bf16"``, ``"no"``, or ``"auto"``: the former where the device is quicker in it (emulated it
            is many times slower than float32, and on some processors with arithmetic for it twice as slow).
        compile: compile the network with ``torch.compile``; the crop sizes are then compiled one by one.
        seed: of everything.

        save_every, log_every: in steps.
        sheet_every: steps between sheets of samples for fixed problems, and their loss; 0: none.
        validation: sources of those problems; left out, training images.
        keep: how many of the latest states are kept.
        milestones: steps between models that are kept for good; 0: none.
        trackers: ``tensorboard``, ``wandb``, or another of accelerate's.
        workers: processes that draw crops and operators ahead of the network; 0 draws them in between. The crops
            are the same either way.
        lanes: independent sequences that shards are divided into, a multiple of ``workers``. It decides the order.
    """

    name: str
    sources: list[PhotoSource] = field(default_factory=list)
    network: dict[str, Any] = field(default_factory=dict)
    crops: list[CropSize] = field(default_factory=list)
    data: str = ""
    training_data: dict[str, Any] = field(default_factory=dict)
    corrupt: float = 0.01
    base: dict[str, Any] = field(default_factory=dict)
    init: str = ""
    trainable: list[str] = field(default_factory=list)
    lora: int = 0
    schedule: dict[str, Any] = field(default_factory=lambda: {"kind": "VE", "sigma_min": 0.002, "sigma_max": 80.0})
    scaling: dict[str, Any] = field(default_factory=lambda: {"kind": "edm", "data_std": 0.5})
    preconditioning: Preconditioning = "spectral"
    tasks: TaskMixture = field(default_factory=TaskMixture)
    noise: NoiseLevels = field(default_factory=NoiseLevels)
    weight: Weight = "expected"
    learned_scale: bool = True
    augmentation: Augmentation = field(default_factory=Augmentation)
    steps: int = 1000
    decay: float = 0.7
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.01
    clip: float = 1.0
    microbatches: int = 1
    ema: float = 0.999
    ema_power: float = 0.75
    mixed_precision: Literal["auto", "bf16", "no"] = "auto"
    compile: bool = False
    seed: int = 0
    save_every: int = 500
    log_every: int = 50
    sheet_every: int = 1000
    validation: list[PhotoSource] = field(default_factory=list)
    keep: int = 1
    milestones: int = 0
    trackers: list[str] = field(default_factory=list)
    workers: int = 0
    lanes: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "save_every", "log_every", "microbatches", "keep", "lanes"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("sheet_every", "milestones", "workers", "lora", "warmup", "clip", "weight_decay"):
            if getattr(self, name) < 0:
                raise RecipeError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("corrupt", "decay", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not self.crops or not self.sources:
            raise RecipeError("a recipe needs at least one entry in sources and in crops")
        if bool(self.network) == bool(self.base):
            raise RecipeError("a recipe needs either network or base, the model it starts from")
        if self.base and self.init:
            raise RecipeError("base and init are two models to start from: give one of them")
        if self.base and not isinstance(self.base.get("source"), str):
            raise RecipeError("base.source must name a model: a folder, a file or a hub id")
        if self.workers and self.lanes % self.workers and any(s.shards for s in self.sources):
            raise RecipeError(
                f"lanes is {self.lanes}, which {self.workers} workers cannot share equally: make it a multiple"
            )

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, constant, linear decay to 0: ``steps`` may be changed while the rate is constant."""
        start = self.steps * (1 - self.decay)
        falling = (self.steps - step) / max(self.steps - start, 1)
        return self.learning_rate * min((step + 1) / max(self.warmup, 1), 1.0, falling)


def _build(kind: Any, value: Any, where: str) -> Any:
    """Typed construction of nested dataclasses, with errors that name the key."""
    if is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise RecipeError(f"{where.rstrip('.') or 'the recipe'} must be a mapping, got {value!r}")
        hints = get_type_hints(kind)
        known = {f.name for f in fields(kind)}
        for key in value:
            if key not in known:
                raise RecipeError(f"unknown key {where + str(key)!r}: choose among {', '.join(sorted(known))}")
        try:
            return kind(**{k: _build(hints[k], v, f"{where}{k}.") for k, v in value.items()})
        except (TypeError, ValueError) as error:
            raise error if isinstance(error, RecipeError) else RecipeError(f"{where.rstrip('.')}: {error}") from None
    name = where.rstrip(".")
    origin = get_origin(kind)
    if origin in (types.UnionType, Union):  # "X | None"
        return None if value is None else _build(get_args(kind)[0], value, where)
    if origin is Literal:
        value = "no" if value is False and "no" in get_args(kind) else value  # what YAML makes of an unquoted no
        if value not in get_args(kind):
            raise RecipeError(f"{name} must be {' or '.join(map(repr, get_args(kind)))}, got {value!r}")
        return value
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
    if origin is dict:
        return {k: _build(get_args(kind)[1], v, f"{name}.{k}.") for k, v in value.items()}
    return value


def build(kind: type[T], content: Any) -> T:
    """A dataclass from plain content, its nested ones too; errors name the key.

    Raises:
        RecipeError: on an unknown key or a value of the wrong type.
    """
    made: T = _build(kind, content, "")
    return made


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a training recipe, see :func:`read_recipe`.

    Raises:
        RecipeError: when the file is missing or not YAML, a key is unknown, or a value has the wrong type.
    """
    return build(Recipe, read_recipe(path, overrides))


def read_recipe(path: str | Path, overrides: list[str] | None = None) -> Any:
    """The plain content of a YAML recipe.

    A recipe may begin with ``extends: other.yaml``, a path beside it, or a list of them, the later over the earlier: it
    then holds only what differs. Mappings are merged key by key; a list, a value, and what belongs together (a network,
    a base, a schedule, a scaling, the shares of tasks) is replaced as a whole.

    Args:
        path: the file.
        overrides: ``key=value`` pairs, dotted keys for nested ones, values in YAML.

    Raises:
        RecipeError: when the file is missing or not YAML, or an override does not fit.
    """
    import yaml

    content = _read(Path(path), ())
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator:
            raise RecipeError(f"--set takes key=value, got {override!r}")
        *parents, last = key.split(".")
        target = content
        for parent in parents:
            target = target.setdefault(parent, {}) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            raise RecipeError(f"--set {override}: {'.'.join(parents) or 'the recipe'} is not a mapping")
        try:
            target[last] = yaml.safe_load(text) if text else ""
        except yaml.YAMLError:
            raise RecipeError(f"--set {override}: {text!r} is not valid YAML") from None
    return content


def _read(path: Path, above: tuple[Path, ...]) -> Any:
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecipeError(f"cannot read recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or "extends" not in content:
        return content
    others = content.pop("extends")
    others = others if isinstance(others, list) else [others]
    merged: Any = {}
    for other in others:
        if not isinstance(other, str):
            raise RecipeError(f"{path}: extends must be the path of a recipe, got {other!r}")
        target = (path.parent / other).resolve()
        if target in (*above, path.resolve()):
            raise RecipeError(f"{path} extends itself by way of {other}")
        merged = _merge(merged, _read(target, (*above, path.resolve())))
    if "base" in content:  # instead of a network
        merged = {k: v for k, v in merged.items() if k != "network"}
    return _merge(merged, content)


# What has several parts that make sense only together.
_WHOLE = ("shares", "network", "base", "schedule", "scaling")


def _merge(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    whole = {key: value for key, value in above.items() if key in _WHOLE}
    return {**below, **{k: _merge(below.get(k), v) for k, v in above.items()}, **whole}
