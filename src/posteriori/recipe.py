"""Training recipes: typed YAML, where an unknown key or a wrong type is an error that names the key."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from posteriori.data import Augmentation, PhotoSource
from posteriori.objective import NoiseLevels
from posteriori.tasks import TaskMixture

__all__ = ["CropSize", "Recipe", "RecipeError", "load_recipe"]


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


@dataclass(frozen=True)
class Recipe:
    """Everything a training run depends on. Noise levels are in the units of images in [-1, 1].

    Attributes:
        name: of the model.
        init: a model whose weights the run starts from (bundled name, folder or hub id); its network must be this
            recipe's.
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
        learned_scale: divide every loss by its learned level, see :class:`posteriori.objective.LossScale`.
        ema: decay of the exponential moving average of the weights.
        mixed_precision: ``"bf16"`` or ``"no"``.
        save_every, log_every: in steps.
        workers: processes that draw crops and operators ahead of the network; 0 draws them in between. The crops
            are the same either way.
        compile: compile the network with ``torch.compile``; the crop sizes are then compiled one by one.
        seed: of everything.
    """

    name: str
    sources: list[PhotoSource]
    network: dict[str, Any]
    crops: list[CropSize]
    data: str = ""
    init: str = ""
    training_data: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=lambda: {"kind": "VE", "sigma_min": 0.002, "sigma_max": 80.0})
    scaling: dict[str, Any] = field(default_factory=lambda: {"kind": "edm", "data_std": 0.5})
    preconditioning: str = "spectral"
    tasks: TaskMixture = field(default_factory=TaskMixture)
    noise: NoiseLevels = field(default_factory=NoiseLevels)
    augmentation: Augmentation = field(default_factory=Augmentation)
    steps: int = 1000
    decay: float = 0.7
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.01
    clip: float = 1.0
    learned_scale: bool = True
    ema: float = 0.999
    mixed_precision: str = "bf16"
    save_every: int = 500
    log_every: int = 50
    workers: int = 0
    compile: bool = False
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
            raise RecipeError(f"{where.rstrip('.') or 'the recipe'} must be a mapping, got {value!r}")
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
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from None
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
    recipe: Recipe = _build(Recipe, content, "")
    return recipe
