"""diffusers' ``UNet2DModel`` as a backbone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from posteriori.denoise import Conditioning

__all__ = ["UNetBackbone"]


class UNetBackbone(nn.Module):
    """A ``UNet2DModel`` that sees the linear estimate, its uncertainty and ``sigma_y`` as extra input channels.

    Args:
        image_channels: channels of the image.
        conditioned: whether the extra channels exist; without them the network is a plain unconditional one.
        config: arguments of ``UNet2DModel``; ``in_channels`` and ``out_channels`` are filled in.

    Shape:
        Sides must be multiples of ``2 ** (levels - 1)``, as the U-Net demands.
    """

    def __init__(self, image_channels: int = 3, conditioned: bool = True, **config: Any) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.image_channels = image_channels
        self.conditioned = conditioned
        inputs = 3 * image_channels + 1 if conditioned else image_channels
        self.network = UNet2DModel(**{**config, "in_channels": inputs, "out_channels": image_channels})

    @classmethod
    def from_pretrained(cls, network: nn.Module) -> UNetBackbone:
        """Add the extra channels, at zero weight, to an unconditional ``UNet2DModel``: its function is unchanged.

        Args:
            network: the model; it is not modified.

        Raises:
            ValueError: when its input and output channels differ (learned variances, or a conditional model).
        """
        from diffusers import UNet2DModel

        assert isinstance(network, UNet2DModel)
        config = dict(network.config)
        channels = int(config["in_channels"])
        if int(config["out_channels"]) != channels:
            raise ValueError(
                f"this UNet2DModel maps {channels} to {config['out_channels']} channels: only unconditional models "
                "without learned variance can be extended"
            )
        keep = {k: v for k, v in config.items() if not k.startswith("_") and k not in ("in_channels", "out_channels")}
        extended = cls(channels, True, **keep)
        state = dict(network.state_dict())
        first = state["conv_in.weight"]
        widened = torch.zeros(first.shape[0], 3 * channels + 1, *first.shape[2:], dtype=first.dtype)
        widened[:, :channels] = first
        state["conv_in.weight"] = widened
        extended.network.load_state_dict(state)
        return extended

    def forward(self, inputs: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        x = inputs
        if self.conditioned:
            level = (conditioning.sigma_y.clamp_min(1e-4).log() / 4).to(inputs).reshape(-1, 1, 1, 1)
            level = level.expand(-1, 1, *inputs.shape[2:])
            x = torch.cat([inputs, conditioning.channels().to(inputs), level], 1)
        output: Tensor = self.network(x, c_noise).sample
        return output
