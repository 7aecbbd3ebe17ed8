r"""Bounded memory for large images: the network, and nothing else, runs on overlapping tiles.

A convolutional network without statistics over space gives the same answer on a tile as on the whole wherever the cut
edge is further away than its receptive radius. Tiles start at multiples of the network's stride, so that its grids
agree; where two tiles overlap their answers are blended,

    F(z) = sum_k w_k F(z restricted to tile k),      sum_k w_k = 1,

with ``w_k = 0`` within ``halo`` of a cut edge of tile ``k`` and a linear ramp of ``blend`` pixels beyond. With
``halo >= receptive_radius`` the result is that of the whole image up to rounding; a smaller halo is an approximation
whose error falls as quickly as the network's *effective* field of view. The pivot, the operator and the sampler
always see the whole image: there are no seams to hide.

Overlaps are computed twice and more, so tiles are as large as memory allows: a quarter of what is free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from posteriori.conditioning import Conditioning
from posteriori.memory import free_memory

__all__ = ["TiledBackbone", "tile_axis"]

# Sides of a tile's own part, few: a little more or less of free memory should not change a picture.
CORES = (256, 384, 512, 768, 1024, 1536)
SHARE = 0.25  # of the free memory


@dataclass(frozen=True)
class _Tile:
    """One axis of a tile: ``[start, stop)`` of the image, and the weight of its pixels, ``(stop - start,)``."""

    start: int
    stop: int
    weight: Tensor


def tile_axis(size: int, core: int, halo: int, blend: int, stride: int) -> list[_Tile]:
    """Tiles that cover an axis of ``size`` pixels; their weights sum to 1 everywhere.

    Args:
        size: pixels of the axis.
        core: pixels that a tile adds, rounded up to a multiple of ``stride``.
        halo: pixels beside a cut edge that are computed and thrown away.
        blend: pixels over which neighbours are blended.
        stride: tiles start at multiples of it.
    """
    core = -(-core // stride) * stride
    margin = -(-(halo + (blend + 1) // 2) // stride) * stride
    if size <= core + 2 * margin:
        return [_Tile(0, size, torch.ones(size))]
    position = torch.arange(size, dtype=torch.float64) + 0.5
    cuts = list(range(core, size - core // 2, core))  # the last tile has at least half a core of its own
    # Share of everything right of each cut: 0 before it, 1 behind it, a ramp of `blend` pixels across it.
    ramps = [((position - cut) / max(blend, 1) + 0.5).clamp(0, 1) for cut in cuts]
    ramps = [torch.ones_like(position), *ramps, torch.zeros_like(position)]
    edges = [0, *cuts, size]
    tiles = []
    for k in range(len(edges) - 1):
        start, stop = max(0, edges[k] - margin), min(size, edges[k + 1] + margin)
        tiles.append(_Tile(start, stop, (ramps[k] - ramps[k + 1])[start:stop].float()))
    return tiles


class TiledBackbone(nn.Module):
    """A backbone with the memory of one tile, whatever the image.

    Args:
        backbone: ``F(inputs, c_noise, conditioning)``, convolutional, with a ``stride`` attribute.
        core: pixels a side that each tile adds; images up to ``core`` plus twice the margin are not tiled. By default
            the whole image where it takes a quarter of the free memory or less, else the largest of :data:`CORES`
            that does, and never less than 256.
        halo: see the module's head.
        blend: width of the ramps.

    Raises:
        ValueError: when the backbone has no ``stride``: it may look at the whole image at once, and tiles of it would
            not agree.
    """

    def __init__(self, backbone: nn.Module, core: int | None = None, halo: int = 128, blend: int = 32) -> None:
        super().__init__()
        if not isinstance(getattr(backbone, "stride", None), int):
            raise ValueError(f"{type(backbone).__name__} states no stride: only convolutional networks can be tiled")
        if (core is not None and core < 1) or halo < 0 or blend < 0:
            raise ValueError(f"need core >= 1, halo >= 0 and blend >= 0, got {core}, {halo} and {blend}")
        self.backbone, self.core, self.halo, self.blend = backbone, core, halo, blend

    @property
    def stride(self) -> int:
        return int(self.backbone.stride)  # type: ignore[arg-type]

    def largest_core(self, inputs: Tensor) -> int:
        """What ``core=None`` means for a batch of images."""
        height, width = inputs.shape[-2:]
        margin = self.halo + self.blend // 2 + self.stride
        if max(height, width) <= CORES[0] + 2 * margin:
            return max(height, width)  # one tile at least is needed, and what is free is not asked for every thumbnail
        pixels = SHARE * free_memory(inputs.device) / (self._bytes_per_pixel() * inputs.shape[0])
        if height * width <= pixels:
            return max(height, width)
        fitting = [core for core in CORES if core + 2 * margin <= math.sqrt(pixels)]
        return max(fitting, default=CORES[0])

    def _bytes_per_pixel(self) -> int:
        stated = getattr(self.backbone, "bytes_per_pixel", None)
        return int(stated()) if stated is not None else 1024

    def forward(self, inputs: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        core = self.core or self.largest_core(inputs)
        rows, columns = (tile_axis(n, core, self.halo, self.blend, self.stride) for n in inputs.shape[-2:])
        if len(rows) == len(columns) == 1:
            whole: Tensor = self.backbone(inputs, c_noise, conditioning)
            return whole
        result = torch.zeros_like(inputs)
        for row in rows:
            for column in columns:
                area = (..., slice(row.start, row.stop), slice(column.start, column.stop))
                weight = (row.weight[:, None] * column.weight).to(inputs)
                result[area] += weight * self.backbone(inputs[area], c_noise, conditioning.crop(area))
        return result
