"""Denoisers from their cards, and cards of denoisers."""

from __future__ import annotations

from typing import Any

from torch import nn

from posteriori.backbones.module import Call, ModuleBackbone
from posteriori.backbones.peers import AzulaNetwork, make_deepinv
from posteriori.backbones.photo import PhotoNet
from posteriori.backbones.pipelines import PretrainedError
from posteriori.denoise import NetworkDenoiser, Scaling
from posteriori.scaling import NoiseLabel
from posteriori.schedule import Schedule, schedule_from_config

__all__ = ["build_denoiser", "build_network", "describe"]


def build_network(config: dict[str, Any], network: nn.Module | None = None) -> nn.Module:
    """A network from a card's ``{"kind": ..., ...}``.

    ``photo`` is :class:`PhotoNet`, ``unet2d`` diffusers' ``UNet2DModel``, ``deepinv`` a network of deepinv. Of others
    (``module``, ``azula``) the card knows all but the network itself, the second argument: a card names no code.
    """
    parameters = dict(config)
    kind = parameters.pop("kind", None)
    if kind == "photo":
        return PhotoNet(**parameters)
    if kind == "unet2d":
        from posteriori.backbones.unet import UNetBackbone

        return UNetBackbone(**parameters)
    if kind in ("deepinv", "module", "azula"):
        return _wrapped(config, network)
    raise ValueError(f"unknown network kind {kind!r}: choose 'photo', 'unet2d', 'deepinv', 'module' or 'azula'")


def build_denoiser(card: dict[str, Any], network: nn.Module | None = None) -> NetworkDenoiser:
    """An untrained denoiser as a card (or a recipe) describes it; ``network`` as in :func:`build_network`."""
    levels, clip = card["sigma_y_range"], card.get("clip")
    schedule = schedule_from_config(card["schedule"])
    return NetworkDenoiser(
        build_network(card["network"], network),
        schedule,
        Scaling(**card["scaling"]),
        card["preconditioning"],
        _label(card["c_noise"], schedule) if "c_noise" in card else None,
        None if levels is None else (float(levels[0]), float(levels[1])),
        None if clip is None else float(clip),
        bool(card.get("blind_mean", False)),
    )


def _label(config: dict[str, Any], schedule: Schedule) -> NoiseLabel:
    own = schedule_from_config(config["schedule"]) if "schedule" in config else schedule
    return NoiseLabel(**{**config, "schedule": own})


def describe(denoiser: NetworkDenoiser, network: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a card says so that :func:`build_denoiser` makes this denoiser again, but for its weights.

    Args:
        denoiser: what to describe.
        network: what is said of its network, which describes itself when this is left out.

    Raises:
        ValueError: when the noise label is a function, or the network does not say how it is made.
    """
    label, network = denoiser.c_noise, network or getattr(denoiser.backbone, "config", None)
    if not isinstance(label, NoiseLabel):
        raise ValueError("a card cannot state a function as c_noise: use a posteriori.scaling.NoiseLabel")
    if not isinstance(network, dict):
        raise ValueError(f"{type(denoiser.backbone).__name__} has no config: a card could not make it again")
    levels = denoiser.sigma_y_range
    own = label.schedule is None or label.schedule == denoiser.schedule
    other = {} if own or label.schedule is None else {"schedule": label.schedule.config()}  # sampled on another
    return {
        "network": {"kind": "photo", **network},  # PhotoNet's own config states no kind
        "schedule": denoiser.schedule.config(),
        "scaling": {"kind": denoiser.scaling.kind, "data_std": denoiser.scaling.data_std},
        "preconditioning": denoiser.preconditioning,
        "sigma_y_range": None if levels is None else list(levels),
        **({} if label == NoiseLabel() else {"c_noise": {**label.config(), **other}}),
        **({} if denoiser.clip is None else {"clip": denoiser.clip}),
        **({"blind_mean": True} if denoiser.blind_mean else {}),
    }


def _wrapped(config: dict[str, Any], network: nn.Module | None) -> ModuleBackbone:
    """The :class:`ModuleBackbone` whose ``config`` this is."""
    rest = dict(config)
    identity: dict[str, Any] = {name: rest.pop(name) for name in ("kind", "class", "config") if name in rest}
    call = rest.pop("call")
    if identity["kind"] == "deepinv":
        network = make_deepinv(identity["class"], identity["config"]) if network is None else network
    elif network is None:
        raise PretrainedError(
            f"the card describes all but the network itself, a {identity['class']}: load(..., network=...) with one of "
            "that class"
        )
    elif identity["kind"] == "azula":
        network = AzulaNetwork(network)
    call = Call(**{**call, "value_range": (call["value_range"][0], call["value_range"][1])})
    return ModuleBackbone(network, call, identity, **rest)
