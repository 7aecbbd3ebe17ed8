r"""What candidates for the photo network cost per pixel, to compare architectures at an equal budget.

    python -m posteriori.bench.photo_cost recipes/photo.yaml recipes/photo-variants/*.yaml --front-ends

For the network of every recipe: parameters, reach (the receptive radius), microseconds of one core per pixel for one
evaluation in bfloat16 and in float32, and for a step forward and back in bfloat16 on the first recipe's smallest crops.
``--front-ends`` adds networks that begin at another resolution, which no recipe can describe. 4x4 blocks as channels: a
network of 12 colours on pictures that were unshuffled before does the same work. Full resolution: a network with one
more level on pictures of twice the side, which does a little more (its first layer has four times the inputs). Times
are those of the process, the least of some repetitions: other programs on the machine can only add to them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posteriori.backbones.cards import build_network
from posteriori.backbones.photo import PhotoNet
from posteriori.bench.common import markdown_table, say
from posteriori.denoise import Conditioning
from posteriori.recipe import load_recipe

__all__ = ["FRONT_ENDS", "cost", "main", "table"]

#: Networks that begin at another resolution: name -> pixels along a side of what they take for one, and their shape.
FRONT_ENDS: dict[str, tuple[float, dict[str, Any]]] = {
    "4x4 blocks": (2, {"image_channels": 12, "channels": [128, 152, 176], "blocks": [2, 2, 2]}),
    "4x4 blocks, deeper": (2, {"image_channels": 12, "channels": [96, 112, 144], "blocks": [4, 4, 4]}),
    "full resolution": (0.5, {"channels": [16, 64, 96, 128, 160], "blocks": [1, 2, 2, 2, 2]}),
}


def least(repeat: Callable[[], object], repetitions: int) -> float:
    """Seconds of process time of the fastest of some repetitions, after one that warms up."""
    repeat()
    times = []
    for _ in range(repetitions):
        began = time.process_time()
        repeat()
        times.append(time.process_time() - began)
    return min(times)


def cost(
    network: nn.Module, side: int, crop: int, batch: int, repetitions: int = 3, block: float = 1
) -> dict[str, Any]:
    """Microseconds per pixel of a photo network.

    Args:
        network: of ``image_channels`` colours.
        side: of the picture of an evaluation.
        crop, batch: of a training step.
        repetitions: of each.
        block: pixels along a side of what the network takes for one pixel.

    Returns:
        ``parameters``, ``reach`` in pixels, and ``evaluation``, ``evaluation_float32`` and ``step``.
    """
    colours = int(network.config["image_channels"])  # type: ignore[index]

    def inputs(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
        x = torch.randn(count, colours, round(size / block), round(size / block))
        smooth = x if getattr(network, "smooth_input", False) else None
        told = Conditioning(x, x.abs().clamp(0, 1), torch.full((count,), 0.05), smooth=smooth)
        return x, torch.zeros(count), told

    def evaluate(precise: bool) -> None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            network(*one)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            output = network(*many)
        output.float().square().mean().backward()

    one, many = inputs(1, side), inputs(batch, crop)
    scale = 1e6 / side**2
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "reach": round(int(network.receptive_radius) * block),  # type: ignore[arg-type]
        "evaluation": scale * least(lambda: evaluate(False), repetitions),
        "evaluation_float32": scale * least(lambda: evaluate(True), repetitions),
        "step": 1e6 / (batch * crop**2) * least(step, repetitions),
    }


def table(rows: Sequence[tuple[str, dict[str, Any], dict[str, Any]]]) -> str:
    """Name, network and cost in Markdown; costs also over those of the first row."""
    first = rows[0][2]
    lines = []
    for name, network, found in rows:
        sizes = ["-".join(map(str, network.get(k, ()))) for k in ("channels", "blocks", "up_blocks")]
        shape = f"{sizes[0]}; {sizes[1]}" + (f", up {sizes[2]}" if sizes[2] else "")
        times = [f"{found[k]:.2f} ({found[k] / first[k]:.2f})" for k in ("evaluation", "evaluation_float32", "step")]
        lines.append([name, shape, f"{found['parameters'] / 1e6:.1f}", found["reach"], *times])
    header = ["network", "widths; blocks", "parameters, M", "reach, pixels", "evaluation, bfloat16",
              "evaluation, float32", "training step"]  # fmt: skip
    return markdown_table(header, lines, 2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m posteriori.bench.photo_cost", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("recipes", nargs="+", type=Path, help="recipes of photo networks; ratios are to the first")
    parser.add_argument("--front-ends", action="store_true", help="and networks that begin at another resolution")
    parser.add_argument("--side", type=int, default=256, help="of the picture of an evaluation")
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    recipes = [(path, load_recipe(path)) for path in args.recipes]
    crop = min(recipes[0][1].crops, key=lambda c: c.size)
    for path, recipe in recipes:
        network = build_network(recipe.network)
        if not isinstance(network, PhotoNet):
            raise SystemExit(f"{path} is of another kind of network: give recipes of photo networks")
        rows.append((recipe.name, network.config, cost(network, args.side, crop.size, crop.batch, args.repetitions)))
        say(f"{recipe.name}: {rows[-1][2]}")
    for name, (block, config) in FRONT_ENDS.items() if args.front_ends else ():
        front = PhotoNet(**config)
        rows.append((name, config, cost(front, args.side, crop.size, crop.batch, args.repetitions, block)))
        say(f"{name}: {rows[-1][2]}")
    say("\n" + table(rows))


if __name__ == "__main__":
    main()
