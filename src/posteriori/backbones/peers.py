"""Denoisers of deepinv and azula. Neither is imported here: their objects are recognised and called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posteriori.backbones.pipelines import PretrainedError, read_json, read_weights
from posteriori.backbones.wrapped import from_denoiser, from_guided_diffusion, wrap
from posteriori.denoise import NetworkDenoiser
from posteriori.scaling import NoiseLabel, Scaling
from posteriori.schedule import VE, Schedule

__all__ = ["AzulaNetwork", "from_azula", "from_deepinv", "from_edm", "make_deepinv"]

#: Networks of deepinv that can be made from their name and arguments.
DEEPINV = ("ADMUNet", "DiffUNet", "NCSNpp")


def make_deepinv(name: str, config: dict[str, Any]) -> nn.Module:
    """A network of deepinv by name, untrained.

    Raises:
        PretrainedError: when deepinv cannot be imported or has no such network, or the arguments do not fit.
    """
    if name not in DEEPINV:
        raise PretrainedError(f"no network {name!r} of deepinv is known here: choose one of {', '.join(DEEPINV)}")
    try:
        import deepinv
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises a RuntimeError
        raise PretrainedError(
            f"this model is a network of deepinv, which cannot be imported ({error}): pip install "
            "'posteriori[deepinv]' and the torchvision of this torch"
        ) from None
    try:
        network: nn.Module = getattr(deepinv.models, name)(**{**config, "pretrained": None})
    except (TypeError, ValueError) as error:
        raise PretrainedError(f"deepinv's {name} cannot be made of its config: {error}") from None
    return network


def from_deepinv(
    source: Any, *, config: dict[str, Any] | None = None, schedule: Schedule | None = None, **options: Any
) -> NetworkDenoiser:
    """A denoiser of deepinv.

    ``NCSNpp`` and ``ADMUNet`` with EDM's scalars are asked for their prediction, ``DiffUNet`` for its noise at a step;
    every other denoiser for its image, in [0, 1].

    Args:
        source: the network.
        config: the arguments it was made with; a checkpoint can then make it again by itself.
        schedule: where it is sampled, ``VE()`` when left out; give the range of noise it was trained for.
        options: as in :func:`from_denoiser`.
    """
    name = type(source).__name__
    identity = None
    if config is not None and name in DEEPINV:
        identity = {"kind": "deepinv", "class": name, "config": {k: v for k, v in config.items() if k != "pretrained"}}
    if name == "DiffUNet":
        options = {"layer": "input_blocks.0.0", "arguments": {"type_t": "timestep"}, **options}
        return from_guided_diffusion(source, identity=identity, **options)
    if name in ("NCSNpp", "ADMUNet"):
        options = {"embedding": "map_layer0", "layer": _first(source), **options}
        classes = getattr(source, "map_label", None)
        if classes is not None:
            options = {"classes": "class_labels", "one_hot": int(classes.in_features), **options}
        if source._was_trained_on_minus_one_one and getattr(source, "precondition_type", "edm") == "edm":
            scaling = Scaling("edm", float(source.pixel_std))
            return wrap(
                source, schedule or VE(), NoiseLabel(), scaling, identity, method="forward_unet", **options
            )  # fmt: skip
    options = {"value_range": (0.0, 1.0), **options}
    return from_denoiser(source, schedule=schedule, identity=identity, **options)


def _first(network: nn.Module) -> str:
    """The first entry of the encoder, named after the resolution."""
    return f"enc.{next(name for name, _ in network.get_submodule('enc').named_children())}"


def edm_config(card: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The network of deepinv, and its arguments, for one of EDM's that ``posteriori convert`` describes.

    What EDM's card leaves out has the default of EDM's own classes, which deepinv's are not.
    """
    about = {**card["network"].get("attributes", {}), **card["network"].get("arguments", {})}
    song = about.get("model_type", "DhariwalUNet") == "SongUNet"
    defaults: dict[str, Any] = {"channel_mult_emb": 4, "dropout": 0.1, "label_dropout": 0, "augment_dim": 0}
    if song:
        defaults |= {"model_channels": 128, "channel_mult": [1, 2, 2, 2], "num_blocks": 4, "attn_resolutions": [16]}
        plus = about.get("embedding_type", "positional") == "fourier"
        defaults["model_type"] = "ncsn" if plus else "ddpm"
    else:
        defaults |= {
            "model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3, "attn_resolutions": [32, 16, 8],
        }  # fmt: skip
    config = {k: about[k] if k in about and k != "model_type" else v for k, v in defaults.items()}
    channels = about.get("img_channels", 3)
    config |= {"img_resolution": about["img_resolution"], "in_channels": channels, "out_channels": channels}
    config |= {"label_dim": about.get("label_dim") or 0, "pixel_std": about.get("sigma_data", 0.5)}
    return ("NCSNpp" if song else "ADMUNet"), {**config, "_was_trained_on_minus_one_one": True}


def from_edm(source: Any, *, schedule: Schedule | None = None, **options: Any) -> NetworkDenoiser:
    """One of EDM's networks, converted by ``posteriori convert``, in deepinv's implementation of it.

    Args:
        source: the folder that ``convert`` wrote.
        schedule: where it is sampled, ``VE()`` when left out, which is EDM's.
        options: as in :func:`from_denoiser`.
    """
    try:
        folder = Path(source) if Path(source).is_dir() else Path(source).parent
        name, config = edm_config(read_json(folder / "weights.json"))
    except (KeyError, TypeError, AttributeError) as error:
        raise PretrainedError(
            f"{source} has no weights.json that describes a network of EDM ({error}): give the folder that "
            "`posteriori convert` made of its pickle"
        ) from None
    network = make_deepinv(name, config)
    state = {k.removeprefix("model."): v for k, v in read_weights(Path(source)).items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise PretrainedError(f"the weights in {source} do not fit deepinv's {name} ({reason})") from None
    return from_deepinv(network, config=config, schedule=schedule, **options)


class AzulaNetwork(nn.Module):
    """``net(u, q)`` of an azula denoiser, which is asked for the mean at its own time."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def time(self, q: Tensor) -> Tensor:
        """Time of its schedule with ``sigma_t/alpha_t = q``, by bisection in [0, 1] (float64)."""
        low, high = torch.zeros_like(q, dtype=torch.float64), torch.ones_like(q, dtype=torch.float64)
        for _ in range(60):
            middle = (low + high) / 2
            alpha, sigma = self.denoiser.schedule(middle)  # type: ignore[operator]
            below = sigma / alpha < q
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def forward(self, u: Tensor, q: Tensor, **arguments: Any) -> Tensor:
        t = self.time(q)
        alpha = self.denoiser.schedule(t)[0]  # type: ignore[operator]
        x_t = alpha.to(u).reshape(-1, *[1] * (u.ndim - 1)) * u
        mean: Tensor = self.denoiser(x_t, t.to(u), **arguments).mean
        return mean


def from_azula(source: Any, *, schedule: Schedule | None = None, **options: Any) -> NetworkDenoiser:
    """A denoiser of azula: ``denoiser(x_t, t).mean`` on its own schedule.

    Args:
        source: the denoiser.
        schedule: where it is sampled; ``VE`` between the noise levels of its own schedule when left out.
        options: as in :func:`from_denoiser`; ``classes="label"`` for class-conditional ones.
    """
    if not isinstance(source, nn.Module) or not hasattr(source, "schedule"):
        raise PretrainedError(f"{source!s:.200} is no denoiser of azula: give the denoiser itself")
    if schedule is None:
        alpha, sigma = source.schedule(torch.tensor([0.0, 1.0], dtype=torch.float64))  # type: ignore[operator]
        low, high = (sigma / alpha).tolist()
        schedule = VE(max(low, 1e-3), min(high, 200.0))
    identity = {"kind": "azula", "class": f"{type(source).__module__}.{type(source).__qualname__}"}
    return from_denoiser(AzulaNetwork(source), schedule=schedule, identity=identity, **options)
