"""diffusers' ``UNet2DModel`` as a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from posteriori.backbones.labels import class_labels, label_tensor
from posteriori.backbones.widening import enlarged
from posteriori.denoise import Conditioning

__all__ = ["UNetBackbone"]


class UNetBackbone(nn.Module):
    """A ``UNet2DModel`` that sees the linear estimate, its uncertainty and ``sigma_y`` as extra input channels.

    Args:
        image_channels: channels of the image.
        conditioned: whether the extra channels exist; without them the network is a plain unconditional one.
        smooth_input: show a conditioned network the estimate of :mod:`posteriori.smooth` too, and add it to the
            output, with a gain that the network says for every pixel.
        sign: -1 for a model whose output is the negative of what the scaling calls ``F``.
        labels: class labels of a class-conditional model, one number or one per measurement.
        config: arguments of ``UNet2DModel``; ``in_channels`` and ``out_channels`` are filled in.

    Shape:
        Sides must be multiples of ``2 ** (levels - 1)``, as the U-Net demands.
    """

    labels: Tensor | None

    def __init__(
        self,
        image_channels: int = 3,
        conditioned: bool = True,
        sign: int = 1,
        labels: int | Sequence[int] | None = None,
        smooth_input: bool = False,
        **config: Any,
    ) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.image_channels = image_channels
        self.conditioned = conditioned
        self.sign = sign
        self.smooth_input = smooth_input and conditioned
        inputs = (4 if smooth_input else 3) * image_channels + 1 if conditioned else image_channels
        outputs = image_channels + self.smooth_input
        self.network = UNet2DModel(**{**config, "in_channels": inputs, "out_channels": outputs})
        if self.network.class_embedding is not None:
            self.register_buffer("labels", label_tensor(labels, self.classes), persistent=False)
        elif labels is not None:
            raise ValueError("labels are given, but this UNet2DModel knows no classes: leave them out")

    @property
    def classes(self) -> range | None:
        """The labels that the network knows, where that can be told."""
        count = self.network.config.num_class_embeds
        return range(count) if count else None

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that make this network again, as a card states them."""
        own = {k: v for k, v in dict(self.network.config).items() if not k.startswith("_")}
        del own["in_channels"], own["out_channels"]
        given = getattr(self, "labels", None)
        labels = {} if given is None else {"labels": given.tolist()}
        sign = {} if self.sign == 1 else {"sign": self.sign}
        return {
            "kind": "unet2d",
            "image_channels": self.image_channels,
            "conditioned": self.conditioned,
            **sign,
            **labels,
            **({"smooth_input": True} if self.smooth_input else {}),
            **own,
        }

    @classmethod
    def from_pretrained(
        cls,
        network: nn.Module,
        conditioned: bool = True,
        sign: int = 1,
        labels: int | Sequence[int] | None = None,
        smooth_input: bool = False,
    ) -> UNetBackbone:
        """Add the extra channels, at zero weight, to an unconditional ``UNet2DModel``: its function is unchanged.

        Of a model with learned variances only the half of the output that is the mean is kept.

        Args:
            network: the model; it is not modified.
            conditioned, sign, labels, smooth_input: as in the class.

        Raises:
            ValueError: when its output is neither an image nor an image and its variance.
        """
        from diffusers import UNet2DModel

        assert isinstance(network, UNet2DModel)
        config = dict(network.config)
        channels, outputs = int(config["in_channels"]), int(config["out_channels"])
        if outputs not in (channels, 2 * channels):
            raise ValueError(
                f"this UNet2DModel maps {channels} to {outputs} channels: only models of plain images, with or without "
                "learned variance, can be extended"
            )
        keep = {k: v for k, v in config.items() if not k.startswith("_") and k not in ("in_channels", "out_channels")}
        extended = cls(channels, conditioned, sign, labels, smooth_input, **keep)
        state = dict(network.state_dict())
        for name in ("conv_out.weight", "conv_out.bias"):
            state[name] = state[name][:channels]
        extended.network.load_state_dict(enlarged(state, extended.network.state_dict()))
        return extended

    def widened(self) -> UNetBackbone:
        """This conditioned network with ``smooth_input``, what is new at zero weight: the same function."""
        config = {k: v for k, v in self.config.items() if k != "kind"}
        wide = UNetBackbone(**{**config, "smooth_input": True})
        state = enlarged(self.network.state_dict(), wide.network.state_dict())
        first, level = state["conv_in.weight"], 3 * self.image_channels  # the noise level stays the last
        first[:, -1], first[:, level] = first[:, level].clone(), 0
        wide.network.load_state_dict(state)
        return wide

    def inputs(self, inputs: Tensor, conditioning: Conditioning) -> Tensor:
        """What the first convolution sees: image, linear estimate, uncertainty, the smooth estimate where it is asked
        for, ``log(sigma_y)/4``."""
        if not self.conditioned:
            return inputs
        level = (conditioning.sigma_y.clamp_min(1e-4).log() / 4).to(inputs).reshape(-1, 1, 1, 1)
        level = level.expand(-1, 1, *inputs.shape[2:])
        return torch.cat([inputs, conditioning.channels().to(inputs), level], 1)

    def forward(self, inputs: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        network = self.network
        # the only embedding that is a table of whole steps
        c_noise = c_noise.round().long() if network.config.time_embedding_type == "learned" else c_noise
        knows_classes = network.class_embedding is not None
        classes = class_labels(self.labels, conditioning, inputs.shape[0]) if knows_classes else None
        output: Tensor = network(self.inputs(inputs, conditioning), c_noise, classes).sample
        output = output if self.sign == 1 else self.sign * output
        return conditioning.add_smooth(output) if self.smooth_input else output
