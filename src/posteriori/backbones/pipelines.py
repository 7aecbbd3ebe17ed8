r"""diffusers' unconditional pixel models: a ``UNet2DModel`` and the scheduler that says what its output means.

    scheduler                            schedule        c_noise           output
    with alphas_cumprod (DDPM, DDIM...)  DiscreteVP      step i = N t - 1  noise, x_0 or v
    EDMEuler, EDMDPMSolverMultistep      VE              log(q)/4          F, or -F ("v_prediction")
    FlowMatchEuler, FlowMatchHeun        RectifiedFlow   N t               noise - x_0

Between two steps the table and the label go on together. Of what a sampler does to the means, ``clip_sample`` is kept;
dynamic thresholding, which no posterior mean needs, is not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posteriori.backbones.unet import UNetBackbone
from posteriori.denoise import NetworkDenoiser
from posteriori.scaling import NoiseLabel, Parametrization, Scaling
from posteriori.schedule import VE, DiscreteVP, RectifiedFlow, Schedule

__all__ = ["PretrainedError", "discrete_schedule", "from_diffusers", "is_diffusers_folder", "read_json", "read_weights"]

PREDICTIONS: dict[str, Parametrization] = {"epsilon": "epsilon", "sample": "x_0", "v_prediction": "v"}

#: Sampling starts where the noise is this many times the signal, though a table of steps may go on to thousands.
LARGEST_RATIO = 200.0


class PretrainedError(ValueError):
    """A pretrained model that cannot be taken over: what is wrong, and what to try."""


def from_diffusers(
    source: Any,
    *,
    scheduler: Any = None,
    labels: Any = None,
    data_std: float = 0.5,
    clip: float | bool = True,
    conditioned: bool = True,
) -> NetworkDenoiser:
    """An unconditional pipeline of diffusers, or its ``UNet2DModel`` alone.

    Args:
        source: a pipeline, a ``UNet2DModel``, or a folder that ``save_pretrained`` of either wrote.
        scheduler: a scheduler or a folder of one, where the source has none or another is meant.
        labels: of a class-conditional model, one number or one per measurement.
        data_std: standard deviation of the data about 0; an EDM scheduler states it.
        clip: whether means are cut as the scheduler's ``clip_sample`` says, or a bound of your own.
        conditioned: add the channels for the measurement (at zero weight).

    Raises:
        PretrainedError: when there is no such model, or its scheduler follows no convention known here.
    """
    if isinstance(source, str | Path):
        network, found = _read(Path(source), need_scheduler=scheduler is None)
    else:
        network, found = getattr(source, "unet", source), getattr(source, "scheduler", None)
    if type(network).__name__ != "UNet2DModel":
        raise PretrainedError(
            f"{type(network).__name__} is not a UNet2DModel: only unconditional models of pixels can be taken over "
            "from diffusers; wrap another network with kind='network'"
        )
    if isinstance(scheduler, str | Path):
        scheduler = _read_scheduler(Path(scheduler))
    scheduler = found if scheduler is None else scheduler
    if scheduler is None:
        raise PretrainedError("a UNet2DModel alone does not say what its output means: give scheduler=DDPMScheduler()")
    schedule, label, scaling, sign, bound = conventions(scheduler, data_std)
    try:
        backbone = UNetBackbone.from_pretrained(network, conditioned, sign, labels)
    except ValueError as error:
        raise PretrainedError(str(error)) from None
    bound = bound if clip is True else (None if clip is False else float(clip))
    return NetworkDenoiser(backbone, schedule, scaling, c_noise=label, clip=bound)


def conventions(scheduler: Any, data_std: float) -> tuple[Schedule, NoiseLabel, Scaling, int, float | None]:
    """What a scheduler says of its model: schedule, noise label, scaling, sign of the output, bound of the means.

    Raises:
        PretrainedError: for a scheduler of another family, or a prediction that this family does not have.
    """
    config = scheduler.config
    name, prediction = type(scheduler).__name__, config.get("prediction_type", "epsilon")
    if name.startswith("EDM"):
        if prediction not in ("epsilon", "v_prediction"):
            raise PretrainedError(f"{name} has no prediction_type {prediction!r}: choose epsilon or v_prediction")
        schedule: Schedule = VE(float(config.sigma_min), float(config.sigma_max))
        sign = 1 if prediction == "epsilon" else -1
        return schedule, NoiseLabel(), Scaling("edm", float(config.sigma_data)), sign, None
    steps = config.get("num_train_timesteps")
    if name.startswith("FlowMatch"):
        schedule = RectifiedFlow()
        return schedule, NoiseLabel("time", float(steps), 0.0, schedule), Scaling("flow", data_std), 1, None
    if not isinstance(getattr(scheduler, "alphas_cumprod", None), torch.Tensor) or name.startswith("CMStochastic"):
        raise PretrainedError(
            f"{name} is not supported: give the model with a scheduler of the DDPM family, an EDM or a FlowMatch one"
        )
    if prediction not in PREDICTIONS:
        raise PretrainedError(f"{name}'s prediction_type {prediction!r} is unknown: {', '.join(PREDICTIONS)} are known")
    table = tuple(float(a) for a in scheduler.alphas_cumprod.double() if a > 0)  # the last may be 0: no signal left
    schedule = discrete_schedule(table)
    label = NoiseLabel("time", float(len(table)), -1.0, schedule)
    bound = float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample") else None
    return schedule, label, Scaling(PREDICTIONS[prediction], data_std), 1, bound


def discrete_schedule(alphas_cumprod: tuple[float, ...]) -> DiscreteVP:
    """The schedule of a table of steps, stopped at :data:`LARGEST_RATIO`.

    Raises:
        PretrainedError: when the table is not one of a diffusion model.
    """
    try:
        whole = DiscreteVP(alphas_cumprod)
    except ValueError as error:
        raise PretrainedError(str(error)) from None
    stop = float(whole.time(torch.tensor(LARGEST_RATIO, dtype=torch.float64)))
    return DiscreteVP(alphas_cumprod, min(stop, 1.0))


def is_diffusers_folder(folder: Path) -> bool:
    """Whether ``save_pretrained`` of a pipeline or of a ``UNet2DModel`` wrote this folder."""
    parts = (folder / "model_index.json", folder / "config.json", folder / "unet" / "config.json")
    return any("_class_name" in read_json(part) for part in parts)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is none."""
    try:
        read = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def read_weights(place: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, or of the only one in a folder.

    Raises:
        PretrainedError: when there is none, or it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    if len(files) != 1 or files[0].suffix != ".safetensors":
        raise PretrainedError(
            f"{place} is not one safetensors file: `posteriori convert` makes one of a pickled checkpoint"
        )
    try:
        return load_file(files[0])
    except (OSError, SafetensorError) as error:
        raise PretrainedError(f"{files[0]} cannot be read ({error}): copy it again") from None


def _read(folder: Path, need_scheduler: bool) -> tuple[nn.Module, Any]:
    """The network and the scheduler of a folder. The parts are read one by one: a pipeline's own code is not run."""
    from diffusers import UNet2DModel

    part = folder / "unet" if (folder / "unet").is_dir() else folder
    kind = read_json(part / "config.json").get("_class_name")
    if kind != "UNet2DModel":
        raise PretrainedError(
            f"{part} holds {kind or 'no model of diffusers'}: give a folder with a UNet2DModel's config.json, or a "
            "pipeline's with unet/ and scheduler/"
        )
    try:
        network = UNet2DModel.from_pretrained(part, use_safetensors=True, low_cpu_mem_usage=False)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PretrainedError(
            f"the weights in {part} cannot be read ({reason}): they must be safetensors that fit config.json; "
            "`posteriori convert` makes them of pickled ones"
        ) from None
    place = next((p for p in (folder / "scheduler", folder) if (p / "scheduler_config.json").is_file()), None)
    return network, _read_scheduler(place) if place and need_scheduler else None


def _read_scheduler(folder: Path) -> Any:
    import diffusers
    from diffusers import SchedulerMixin

    config = read_json(folder / "scheduler_config.json")
    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    if isinstance(kind, type) and issubclass(kind, SchedulerMixin):
        scheduler: Any = kind
        return scheduler.from_config(config)
    raise PretrainedError(f"{folder} holds no scheduler of diffusers: give scheduler=DDPMScheduler(...)")
