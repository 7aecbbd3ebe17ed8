"""Networks that the user has in memory: they predict, or denoise, or are shaped like guided-diffusion's."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from posteriori.backbones.module import Call, ModuleBackbone
from posteriori.backbones.pipelines import PretrainedError, discrete_schedule
from posteriori.denoise import NetworkDenoiser
from posteriori.scaling import NoiseLabel, Parametrization, Scaling
from posteriori.schedule import VE, DiscreteVP, Schedule

__all__ = ["from_denoiser", "from_guided_diffusion", "from_network", "wrap"]

_CALL = frozenset(Call.__dataclass_fields__)


def wrap(
    network: Any,
    schedule: Schedule,
    label: NoiseLabel,
    scaling: Scaling,
    identity: dict[str, Any] | None = None,
    clip: float | None = None,
    **options: Any,
) -> NetworkDenoiser:
    """A denoiser of a network; options are those of :class:`Call` and of :class:`ModuleBackbone`."""
    if not isinstance(network, nn.Module):
        raise PretrainedError(
            f"{network!s:.200} is a {type(network).__name__}, not a network: make the network, load its weights into "
            "it, and give the module itself"
        )
    call = {name: options.pop(name) for name in list(options) if name in _CALL}
    identity = identity or {"kind": "module", "class": f"{type(network).__module__}.{type(network).__qualname__}"}
    try:
        backbone = ModuleBackbone(network, Call(**call), identity, **options)
    except ValueError as error:
        raise PretrainedError(str(error)) from None
    return NetworkDenoiser(backbone, schedule, scaling, c_noise=label, clip=clip)


def from_denoiser(
    source: Any, *, schedule: Schedule | None = None, data_std: float = 0.5, **options: Any
) -> NetworkDenoiser:
    """A network ``net(x, sigma)`` that returns the image, as EDM's does with its preconditioning.

    Args:
        source: the network; ``x = x_0 + sigma noise``, ``sigma`` of shape ``(B,)``.
        schedule: where it is sampled, ``VE()`` when left out; give the range of noise it was trained for.
        data_std: standard deviation of the data about 0.
        options: ``value_range`` of its images (-1, 1), ``classes``, ``one_hot``, ``labels``, ``arguments``, ``method``
            (:class:`Call`), ``layer``, ``embedding``, ``image_channels``, ``conditioned`` (:class:`ModuleBackbone`),
            and ``clip``, a bound of the means.
    """
    label = NoiseLabel("ratio", 1.0)
    return wrap(
        source, schedule or VE(), label, Scaling("edm", data_std), denoises=True, data_std=data_std, **options
    )  # fmt: skip


def from_network(
    source: Any,
    *,
    prediction: Parametrization,
    schedule: Schedule,
    label: NoiseLabel | None = None,
    data_std: float = 0.5,
    **options: Any,
) -> NetworkDenoiser:
    """A network ``net(c_in u, c_noise)`` that predicts ``F`` of :mod:`posteriori.scaling`.

    With variance preserving schedules and flows ``c_in u`` is ``x_t``.

    Args:
        source: the network.
        prediction: what it predicts.
        schedule: where it is sampled.
        label: what it is told of the noise; when left out, the step of a ``DiscreteVP``, else ``log(q)/4``.
        data_std: standard deviation of the data about 0.
        options: as in :func:`from_denoiser`; ``sign=-1`` when the output is the negative of ``F``.
    """
    if label is None and isinstance(schedule, DiscreteVP):
        label = NoiseLabel("time", float(len(schedule.alphas_cumprod)), -1.0, schedule)
    return wrap(source, schedule, label or NoiseLabel(), Scaling(prediction, data_std), **options)


def from_guided_diffusion(
    source: Any,
    *,
    noise_schedule: str = "linear",
    diffusion_steps: int = 1000,
    rescale_timesteps: bool = False,
    predict_xstart: bool = False,
    data_std: float = 0.5,
    clip: float | None = 1.0,
    **options: Any,
) -> NetworkDenoiser:
    """A ``UNetModel`` of guided-diffusion (ADM) or improved-diffusion: ``net(x_t, step, y=classes)``.

    Args:
        source: the network, with its weights.
        noise_schedule, diffusion_steps, rescale_timesteps, predict_xstart: that repository's own options.
        data_std: standard deviation of the data about 0.
        clip: bound of the means (its samplers' ``clip_denoised``).
        options: as in :func:`from_denoiser`.
    """
    table = guided_diffusion_table(noise_schedule, diffusion_steps)
    schedule = discrete_schedule(table)
    scale = 1000 / diffusion_steps if rescale_timesteps else 1.0
    label = NoiseLabel("time", scale * len(table), -scale, schedule)
    if getattr(source, "num_classes", None) is not None:
        options.setdefault("classes", "y")
    options.setdefault("embedding", "time_embed.0")
    scaling = Scaling("x_0" if predict_xstart else "epsilon", data_std)
    return wrap(source, schedule, label, scaling, clip=clip, **options)


def guided_diffusion_table(noise_schedule: str, steps: int) -> tuple[float, ...]:
    """``alphas_cumprod`` of ``get_named_beta_schedule`` (Nichol & Dhariwal 2021)."""
    if noise_schedule == "linear":
        betas = torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)
    elif noise_schedule == "cosine":
        bars = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        betas = torch.tensor([min(1 - b / a, 0.999) for a, b in pairwise(bars)], dtype=torch.float64)
    else:
        raise PretrainedError(f"unknown noise_schedule {noise_schedule!r}: choose linear or cosine")
    return tuple((1 - betas).cumprod(0).tolist())
