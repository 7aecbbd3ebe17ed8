r"""New inputs for a network that does not know of them.

    layer(x)   becomes   layer(x) + extra(told),      extra = 0 at first

The first convolution is told the conditioning's channels, which is the same as widening it; a layer of the noise
embedding may be told its scalars. What is told goes past the network's own code, in :class:`Told`: that code may
pad, scale or skip its input, and need not know of the rest. A network serves one evaluation at a time (distributed
training has one per process; the threads of ``torch.nn.DataParallel`` would share it).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from posteriori.denoise import Conditioning

__all__ = ["Told", "Widened", "enlarged", "find_layer", "first_layer", "widen"]

_OCTAVES = 4
_CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def enlarged(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in the shapes of a network with more inputs and outputs after those there are: what is new is 0."""
    result = {}
    for name, value in state.items():
        result[name] = value.new_zeros(like[name].shape)
        result[name][tuple(slice(n) for n in value.shape)] = value
    return result


class Told:
    """What the widened layers of one network are told in the evaluation that is running."""

    channels: Tensor
    scalars: Tensor

    def update(self, conditioning: Conditioning, like: Tensor) -> None:
        """Take over a conditioning; ``like`` is the network's input."""
        levels = conditioning.labels(conditioning.sigma_y)[:, 1:].to(like)  # without the first, the label of the noise
        maps = levels.reshape(*levels.shape, *[1] * (like.ndim - 2)).expand(*levels.shape, *like.shape[2:])
        self.channels = torch.cat([conditioning.channels().to(like), maps], 1)
        angles = (levels[:, :, None] * (math.pi * 2.0 ** torch.arange(_OCTAVES, device=like.device))).flatten(1)
        self.scalars = torch.cat([levels, angles.sin(), angles.cos()], 1)


class Widened(nn.Module):
    """A layer and its zero-initialised extra inputs.

    Args:
        layer: the layer as it was.
        extra: what acts on the new inputs.
        told: where they are found, under the name ``part``.
    """

    def __init__(self, layer: nn.Module, extra: nn.Module, told: Told, part: str) -> None:
        super().__init__()
        self.layer, self.extra, self.told, self.part = layer, extra, told, part
        for parameter in extra.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        y: Tensor = self.layer(x, *arguments)
        more: Tensor = self.extra(getattr(self.told, self.part))
        if more.shape != y.shape:
            raise ValueError(
                f"the network's first layer makes {tuple(y.shape)} of the image where the measurement's channels give "
                f"{tuple(more.shape)}: use sides that the network need not pad, or name another layer"
            )
        return y + more.to(y.dtype)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # the network's own code may ask its layer for its sizes
            if "layer" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self._modules["layer"], name)


def first_layer(network: nn.Module) -> str:
    """Name of the first convolution, in the order of registration.

    Raises:
        ValueError: when there is none.
    """
    for name, module in network.named_modules():
        weight = getattr(module, "weight", None)
        if name and isinstance(weight, nn.Parameter) and weight.ndim >= 3:
            return name
    raise ValueError(f"{type(network).__name__} has no convolution: name the layer that sees the signal (layer='...')")


def find_layer(network: nn.Module, name: str) -> tuple[nn.Module, nn.Parameter]:
    """A convolution or linear layer by name, and its weight.

    Raises:
        ValueError: when there is no such layer, or it is of another kind.
    """
    try:
        layer = network.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"{type(network).__name__} has no layer {name!r}: give a name of its named_modules(), as in layer='conv_in'"
        ) from None
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim < 2:
        raise ValueError(f"{name!r} is a {type(layer).__name__}: name a convolution or a linear layer")
    return layer, weight


def widen(network: nn.Module, layer: str, image_channels: int, embedding: str | None = None) -> Told:
    """Widen layers of a network, in place.

    Args:
        network: the network.
        layer: name of the convolution (or linear layer, for vectors) that sees the noisy signal.
        image_channels: channels of the signal; entries, for vectors.
        embedding: name of a linear layer of its noise embedding.

    Raises:
        ValueError: when there is no such layer, or it is of another kind.
    """
    told = Told()
    _wrap(network, layer, told, "channels", 2 * image_channels + 2)
    if embedding is not None:
        _wrap(network, embedding, told, "scalars", 2 + 2 * 2 * _OCTAVES)
    return told


def _wrap(network: nn.Module, name: str, told: Told, part: str, inputs: int) -> None:
    layer, weight = find_layer(network, name)
    outputs = weight.shape[0]
    extra: nn.Module
    if weight.ndim == 2:
        extra = nn.Linear(inputs, outputs, bias=False)
    else:  # also for a convolution of the network's own make, which then must keep the size
        kind = _CONVOLUTIONS[weight.ndim - 3]
        kernel = tuple(weight.shape[2:])
        extra = kind(
            inputs, outputs, kernel, getattr(layer, "stride", 1),
            getattr(layer, "padding", tuple(k // 2 for k in kernel)), getattr(layer, "dilation", 1), bias=False,
            padding_mode=getattr(layer, "padding_mode", "zeros"),
        )  # fmt: skip
    parent, _, child = name.rpartition(".")
    network.get_submodule(parent)._modules[child] = Widened(layer, extra.to(weight), told, part)
