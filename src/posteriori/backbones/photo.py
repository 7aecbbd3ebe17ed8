r"""The any-size photo network: a fully convolutional U-Net without attention and without statistics over space.

What a pixel becomes depends on its neighbourhood alone, so any image size works and tiles agree with the whole. The
image enters at half resolution with its 2x2 blocks as channels (pixel unshuffle): most work is done where it is cheap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from posteriori.backbones.widening import enlarged
from posteriori.denoise import Conditioning

__all__ = ["PhotoNet"]


def _silu(x: Tensor) -> Tensor:
    """SiLU of a tensor that nothing else needs."""
    return functional.silu(x, inplace=not torch.is_grad_enabled())


def _add(x: Tensor, other: Tensor) -> Tensor:
    """The sum, in the memory of ``x``, which nothing else needs."""
    return x + other if torch.is_grad_enabled() else x.add_(other)


def _zero(layer: nn.Conv2d | nn.Linear) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class _ChannelNorm(nn.Module):
    """Layer norm over the channels of every pixel by itself, as one fused kernel on the channels-last layout."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)


class _Modulation(nn.Module):
    """Scale and shift of every channel by the embedding; the identity at first."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.linear = nn.Linear(embedding, 2 * channels)
        _zero(self.linear)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.linear(embedding)[:, :, None, None].chunk(2, 1)
        return torch.addcmul(shift.to(x.dtype), x, (1 + scale).to(x.dtype))


class _Block(nn.Module):
    """Residual block: norm, convolution, modulation, SiLU, convolution."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.norm = _ChannelNorm(channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulation = _Modulation(channels, embedding)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        _zero(self.second)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.modulation(self.first(_silu(self.norm(x))), embedding)
        return _add(self.second(_silu(h)), x)


class PhotoNet(nn.Module):
    """``F(inputs, c_noise, conditioning)`` for images of any size from 1x1 on.

    Args:
        image_channels: channels of the image.
        channels: width at 1/2, 1/4, 1/8, ... of the resolution.
        blocks: residual blocks at every level, on the way down and again on the way up.
        up_blocks: of the way up, where they are others.
        embedding: width of the embedding of the noise levels and of how much is known.
        smooth_input: show the network the estimate of :mod:`posteriori.smooth` too, and add it to the output, with a
            gain that the network says for every pixel.
        refine: look twice, see :class:`posteriori.denoise.NetworkDenoiser`; with ``smooth_input``.

    Raises:
        ValueError: on settings that do not fit each other.

    Shape:
        ``inputs`` and all parts of the conditioning ``(B, image_channels, H, W)``, ``c_noise`` ``(B,)``; the output is
        like ``inputs``. Sides that are not multiples of ``stride`` are padded by replication and cropped again.
    """

    #: Measured on photos: bfloat16 costs 0.01 dB of a mean, and 0.02 dB of a sample (docs/speed.md).
    reduced_precision = torch.bfloat16

    frequencies: Tensor
    down: nn.ModuleList
    up: nn.ModuleList

    def __init__(
        self,
        image_channels: int = 3,
        channels: Sequence[int] = (64, 96, 128, 160),
        blocks: Sequence[int] = (2, 2, 2, 2),
        embedding: int = 256,
        smooth_input: bool = False,
        refine: bool = False,
        up_blocks: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        up_blocks = blocks if up_blocks is None else up_blocks
        if not len(channels) == len(blocks) == len(up_blocks) or not channels:
            raise ValueError("channels, blocks and up_blocks need one entry per level")
        if refine and not smooth_input:
            raise ValueError("refine replaces the smooth estimate by the first answer: it needs smooth_input too")
        self.config = {
            "image_channels": image_channels,
            "channels": list(channels),
            "blocks": list(blocks),
            "embedding": embedding,
            **({"smooth_input": True} if smooth_input else {}),
            **({"refine": True} if refine else {}),
            **({"up_blocks": list(up_blocks)} if list(up_blocks) != list(blocks) else {}),
        }
        self.smooth_input, self.refine = smooth_input, refine
        self.widths = tuple(channels)
        self.blocks = tuple(blocks), tuple(up_blocks)
        self.register_buffer("frequencies", torch.exp(torch.linspace(math.log(0.25), math.log(16.0), 16)))
        self.embed = nn.Sequential(nn.Linear(96, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU())
        # what the embedding is told of the looks before
        self.looks = nn.Embedding(3, embedding) if refine else None
        if self.looks is not None:
            nn.init.zeros_(self.looks.weight)
        self.stem = nn.Conv2d((4 if smooth_input else 3) * image_channels * 4, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        self.shrink = nn.ModuleList()
        self.grow = nn.ModuleList()
        for level, width in enumerate(channels):
            for stages, counts in ((self.down, blocks), (self.up, up_blocks)):
                stages.append(nn.ModuleList(_Block(width, embedding) for _ in range(counts[level])))
            if level + 1 < len(channels):
                self.shrink.append(nn.Conv2d(width, channels[level + 1], 2, stride=2))
                self.grow.append(nn.Conv2d(channels[level + 1], width * 4, 1))
        # The residual stream carries the noise of the input past every block, so its two ends are modulated too.
        self.stem_modulation = _Modulation(channels[0], embedding)
        self.head_norm = _ChannelNorm(channels[0])
        self.head_modulation = _Modulation(channels[0], embedding)
        outputs = (image_channels + smooth_input) * 4
        self.head = nn.Conv2d(channels[0], outputs, 3, padding=1)
        _zero(self.head)
        # The norm before the head loses every pixel's amplitude; a linear readout of the stream keeps it.
        self.readout_modulation = _Modulation(channels[0], embedding)
        self.readout = nn.Conv2d(channels[0], outputs, 1)
        _zero(self.readout)

    def widened(self, refine: bool = False) -> PhotoNet:
        """This network with ``smooth_input``, and ``refine`` if asked for, what is new at zero weight: it answers as
        before until it is trained, and with ``refine`` takes its own answer for a smooth estimate."""
        return self._enlarged({"smooth_input": True, **({"refine": True} if refine else {})})

    def deepened(self, blocks: Sequence[int], up_blocks: Sequence[int] | None = None) -> PhotoNet:
        """This network with more blocks, after those of every level: it answers as before until it is trained, because
        a new block adds nothing.

        Raises:
            ValueError: when a level would have fewer blocks than it has.
        """
        up_blocks = blocks if up_blocks is None else up_blocks
        for own, counts in zip(self.blocks, (blocks, up_blocks), strict=True):
            if len(counts) != len(own) or any(n < k for n, k in zip(counts, own, strict=True)):
                raise ValueError(f"blocks are at least {list(own)}, level by level, got {list(counts)}")
        return self._enlarged({"blocks": list(blocks), "up_blocks": list(up_blocks)})

    def _enlarged(self, changes: dict[str, Any]) -> PhotoNet:
        """A larger network that begins as this one: what is new has the values of a new network."""
        larger = PhotoNet(**{**self.config, **changes})
        new = larger.state_dict()
        larger.load_state_dict(new | enlarged(self.state_dict(), new))
        return larger

    @property
    def width_of_view(self) -> int:
        """Ways in which it is shown the measurement beside its linear estimate; those of more are widened ones."""
        return self.smooth_input + self.refine

    @property
    def stride(self) -> int:
        """Sides that are multiples of this need no padding; shifts by multiples of it commute with the network."""
        return int(2 ** len(self.down))

    @property
    def receptive_radius(self) -> int:
        """Pixels further away than this (in either axis) cannot influence an output pixel."""
        radius, scale = 1 * 2 + 2, 2  # stem and its unshuffle
        for level, (down, up) in enumerate(zip(*self.blocks, strict=True)):
            radius += 2 * (down + up) * scale  # two 3x3 convolutions a block
            if level + 1 < len(self.down):
                radius += 2 * scale
            scale *= 2
        return radius + 2

    def bytes_per_pixel(self, entry: int = 4) -> int:
        """Memory that an evaluation without gradients takes, from above, for each pixel of its input.

        Args:
            entry: bytes of an activation, 4 in float32 and 2 in bfloat16.
        """
        widest = max(width / 4 ** (level + 1) for level, width in enumerate(self.widths))
        inputs = 4 * self.stem.in_channels // 4  # in float32: together, as channels-last, as blocks
        return math.ceil(4 * widest * entry + 2 * inputs)

    def forward(self, inputs: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        h, w = inputs.shape[-2:]
        x = torch.cat([inputs, conditioning.channels().to(inputs)], 1)
        bottom, right = -h % self.stride, -w % self.stride
        x = functional.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x
        if inputs.is_cpu or inputs.is_cuda:
            x = x.contiguous(memory_format=torch.channels_last)
        labels = conditioning.labels(c_noise)
        angles = (labels[:, :, None] * self.frequencies * math.pi).flatten(1)
        embedding = self.embed(torch.cat([angles.cos(), angles.sin()], 1))
        if self.looks is not None and conditioning.looks is not None:
            embedding = embedding + self.looks(conditioning.looks.long()).to(embedding)

        x = self.stem_modulation(self.stem(functional.pixel_unshuffle(x, 2)), embedding)
        skips = []
        for level, blocks in enumerate(self.down):
            for block in blocks.children():
                x = block(x, embedding)
            if level + 1 < len(self.down):
                skips.append(x)
                x = self.shrink[level](x)
        for level in reversed(range(len(self.up))):
            if level + 1 < len(self.up):
                x = _add(functional.pixel_shuffle(self.grow[level](x), 2), skips.pop())
            for block in self.up[level].children():
                x = block(x, embedding)
        bounded = _silu(self.head_modulation(self.head_norm(x), embedding))
        x = _add(self.head(bounded), self.readout(self.readout_modulation(x, embedding)))
        x = functional.pixel_shuffle(x, 2)[..., :h, :w]
        return conditioning.add_smooth(x) if self.smooth_input else x
