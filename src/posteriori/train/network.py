"""The network that is trained: where it starts, which of its parameters move, and the model that comes out."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from posteriori.backbones.photo import PhotoNet
from posteriori.backbones.unet import UNetBackbone
from posteriori.checkpoint import build_denoiser, load
from posteriori.denoise import NetworkDenoiser
from posteriori.recipe import Recipe, RecipeError

__all__ = ["build", "card_of", "channels_of", "choose_trained", "merged"]


def card_of(recipe: Recipe, step: int, denoiser: NetworkDenoiser | None = None) -> dict[str, Any]:
    """The card of a model trained by a recipe; ``denoiser`` is the one it started from, where that has a card."""
    base = dict(getattr(denoiser, "card", None) or {}) if recipe.base else {}
    return {
        "network": recipe.network,
        "schedule": recipe.schedule,
        "scaling": recipe.scaling,
        **{k: v for k, v in base.items() if k not in ("sha256", "figures", "format")},
        "name": recipe.name,
        "preconditioning": recipe.preconditioning,
        "sigma_y_range": list(recipe.tasks.sigma_y),
        "blind_mean": recipe.noise.blind_share > 0,
        "value_range": [-1, 1],
        "tasks": recipe.tasks.shares,
        "training_data": recipe.training_data,
        "training": {
            "steps": step,
            "crops": [asdict(c) for c in recipe.crops],
            "microbatches": recipe.microbatches,
            "learning_rate": recipe.learning_rate,
            "ema": recipe.ema,
            "noise": asdict(recipe.noise),
            "weight": recipe.weight,
            "seed": recipe.seed,
            **({"init": recipe.init} if recipe.init else {}),
            **({"base": {**recipe.base, "training_data": base.get("training_data")}} if recipe.base else {}),
            **({"lora": recipe.lora} if recipe.lora else {}),
            **({"trainable": recipe.trainable} if recipe.trainable else {}),
        },
    }


def build(recipe: Recipe) -> NetworkDenoiser:
    """The denoiser that a run starts from.

    Raises:
        RecipeError: when it cannot be built or loaded.
    """
    if recipe.base:
        return _from_base(recipe)
    try:
        denoiser = build_denoiser(card_of(recipe, 0))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"network, schedule, scaling or preconditioning: {error}") from None
    if denoiser.refines and not recipe.noise.top_share * recipe.noise.blind_share:
        raise RecipeError(
            "network.refine: both looks are learned from samples that see no x_t, of which there are none: "
            "set noise.top_share and noise.blind_share, for example to 0.3 and 0.6"
        )
    if recipe.init:
        try:
            denoiser.backbone.load_state_dict(_widened(load(recipe.init).backbone, denoiser.backbone).state_dict())
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise RecipeError(
                f"init: cannot start from {recipe.init!r} ({reason}): give a model with this network"
            ) from None
    return denoiser


def _widened(start: nn.Module, target: nn.Module) -> nn.Module:
    """The network with the inputs and outputs that only the target has at zero weight, and with as many blocks."""
    if isinstance(start, UNetBackbone) and isinstance(target, UNetBackbone) and target.conditioned > start.conditioned:
        return UNetBackbone.from_pretrained(start.network, sign=start.sign, smooth_input=target.smooth_input)
    if (
        isinstance(start, UNetBackbone)
        and isinstance(target, UNetBackbone)
        and target.smooth_input > start.smooth_input
    ):
        return start.widened()
    if isinstance(start, PhotoNet) and isinstance(target, PhotoNet):
        wide = start.widened(target.refine) if target.width_of_view > start.width_of_view else start
        return wide if wide.blocks == target.blocks else wide.deepened(*target.blocks)
    return start


def _from_base(recipe: Recipe) -> NetworkDenoiser:
    from posteriori.backbones import load_pretrained

    try:
        denoiser = load_pretrained(recipe.base["source"], **{k: v for k, v in recipe.base.items() if k != "source"})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"base: {error}") from None
    denoiser.preconditioning = recipe.preconditioning
    denoiser.sigma_y_range = recipe.tasks.sigma_y
    denoiser.blind_mean = recipe.noise.blind_share > 0
    return denoiser.train()


def channels_of(recipe: Recipe, denoiser: NetworkDenoiser) -> int:
    """Channels of the images the network takes."""
    network = recipe.network or (getattr(denoiser, "card", None) or {}).get("network", {})
    return int(network.get("image_channels", 3))


def choose_trained(network: nn.Module, recipe: Recipe) -> dict[str, nn.Parameter]:
    """Add adapters where the recipe asks for them, freeze what is not trained, and return what is.

    Raises:
        RecipeError: when nothing is left to train, a pattern finds nothing, or peft is not installed.
    """
    patterns = [re.compile(p) for p in recipe.trainable]
    for pattern in patterns:
        if not any(pattern.search(name) for name, _ in network.named_parameters()):
            raise RecipeError(f"trainable: no parameter's name has {pattern.pattern!r} in it")
    chosen = {n for n, _ in network.named_parameters() if any(p.search(n) for p in patterns)}
    if recipe.lora:
        _add_adapters(network, recipe.lora, chosen)
    if recipe.lora or patterns:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in chosen or ".lora_" in name)
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def _add_adapters(network: nn.Module, rank: int, whole: set[str]) -> None:
    """Low-rank adapters (Hu et al. 2022) on every layer that is not trained as a whole; zero at first."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError:
        raise RecipeError("lora needs peft: pip install 'posteriori[lora]'") from None
    layers = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and getattr(module, "groups", 1) == 1
        and f"{name}.weight" not in whole
    ]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), network)


def merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the network without adapters that does the same: ``W + B A``."""
    result = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        prefix = name.removesuffix("base_layer.weight")
        if prefix != name and f"{prefix}lora_A.default.weight" in state:
            down, up = (state[f"{prefix}lora_{x}.default.weight"].flatten(1) for x in "AB")
            value = value + (up @ down).reshape(value.shape)
        result[name.replace(".base_layer.", ".")] = value
    return result
