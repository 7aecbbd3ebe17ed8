r"""What a step of training costs, beside the loop that diffusers users know.

    python -m posteriori.bench.train_speed [--steps 10] [--rounds 4] [--threads 1]

The same ``UNet2DModel`` and batch, the same images in memory, AdamW, clipping and an average of the weights on both
sides. ``diffusers``: the loop of its ``train_unconditional`` example (noise, DDPM steps, squared error of epsilon,
``EMAModel``). ``posteriori``: :func:`posteriori.train.train` with the EPS recipe's mixture of tasks, and with no
measurement at all. The three take turns, ``steps`` steps each, for some rounds; reported are seconds of a step as
process time (other programs on the machine do not count), their median, and the ratio of the medians with the lowest
and highest ratio of a round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posteriori.bench.common import markdown_table, say
from posteriori.data import Augmentation, PhotoSource
from posteriori.recipe import CropSize, Recipe
from posteriori.tasks import TaskMixture
from posteriori.train import train

__all__ = ["main"]

Network = dict[str, Any]


def network_config(size: int, channels: tuple[int, ...]) -> Network:
    """A ``UNet2DModel`` with attention at its lowest resolution."""
    levels = len(channels)
    return {
        "sample_size": size,
        "block_out_channels": list(channels),
        "layers_per_block": 1,
        "norm_num_groups": 16,
        "attention_head_dim": channels[0],
        "down_block_types": ["DownBlock2D"] * (levels - 1) + ["AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D"] + ["UpBlock2D"] * (levels - 1),
    }


def diffusers_loop(images: np.ndarray, config: Network, batch: int, steps: int) -> Callable[[], float]:
    """The plain loop; the result runs ``steps`` steps and returns process seconds per step."""
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel
    from torch.utils.data import DataLoader, TensorDataset

    accelerator = Accelerator(mixed_precision="no")
    model = UNet2DModel(**config, in_channels=3, out_channels=3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, betas=(0.9, 0.99), fused=True)
    average = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    scheduler = DDPMScheduler()
    data = DataLoader(TensorDataset(torch.from_numpy(images)), batch, shuffle=True, drop_last=True)
    prepared, optimizer, data = accelerator.prepare(model, optimizer, data)

    def run() -> float:
        done, began = 0, time.process_time()
        while done < steps:
            for (pixels,) in data:
                clean = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
                clean = torch.where(torch.rand(len(clean), 1, 1, 1) < 0.5, clean.flip(3), clean)
                noise = torch.randn_like(clean)
                at = torch.randint(0, 1000, (len(clean),)).long()
                with accelerator.accumulate(prepared):
                    output = prepared(scheduler.add_noise(clean, noise, at), at).sample
                    loss = torch.nn.functional.mse_loss(output.float(), noise.float())
                    accelerator.backward(loss)
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                average.step(model.parameters())
                loss.detach().item()
                done += 1
                if done == steps:
                    break
        return (time.process_time() - began) / steps

    return run


def own_loop(recipe: Recipe, steps: int) -> Callable[[], float]:
    """The same for :func:`train`: the steps after the first, which includes the start."""

    def run() -> float:
        times: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            plan = replace(recipe, steps=steps + 1)
            train(
                plan, Path(folder) / "run", progress=False, on_step=lambda step, loss: times.append(time.process_time())
            )
        return (times[-2] - times[0]) / (steps - 1)  # the last step includes the final save

    return run


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description="A step of training beside diffusers' loop.")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--channels", type=int, nargs="+", default=[48, 96, 144])
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (500, options.size, options.size, 3), dtype=np.uint8)
    config = network_config(options.size, tuple(options.channels))
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "images.npy", images)
        own = Recipe(
            "speed", [PhotoSource(array="images.npy")], {"kind": "unet2d", **config},
            [CropSize(options.size, options.batch)], data=folder, augmentation=Augmentation(1.0, flip=0.5, turn=0.0),
            mixed_precision="no", sheet_every=0, save_every=10**9, log_every=10**6,
        )  # fmt: skip
        prior = replace(own, network={**own.network, "conditioned": False}, tasks=TaskMixture({"none": 1.0}))
        loops = {
            "diffusers' loop": diffusers_loop(images, config, options.batch, options.steps),
            "posteriori, no measurement": own_loop(prior, options.steps),
            "posteriori, EPS with seven tasks": own_loop(own, options.steps),
        }
        for run in loops.values():
            run()  # warm up: caches of operators, allocator, threads
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        for number in range(options.rounds):
            for name, run in loops.items():
                seconds[name].append(run())
                say(f"round {number + 1}: {name} {seconds[name][-1]:.3f} s a step")
    first = seconds["diffusers' loop"]
    rows = []
    for name, values in seconds.items():
        ratios = [v / f for v, f in zip(values, first, strict=True)]
        middle = statistics.median(values)
        spread = f"{statistics.median(values) / statistics.median(first):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        rows.append([name, f"{middle:.3f}", f"{options.batch / middle:.1f}", spread])
    say(markdown_table(["loop", "s a step", "images/s", "ratio (lowest to highest)"], rows))


if __name__ == "__main__":
    main()
