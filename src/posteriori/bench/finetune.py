r"""Is a pretrained model worth starting from, and in which form: fine-tuning against training from scratch.

    python -m posteriori.bench.finetune PHOTOS --out runs/finetune [--figure finetune.png --table finetune.md]

A diffusers ``UNet2DModel`` is first trained without measurements on crops of photos, with EDM's objective, and saved as
diffusers saves its models. Then, for each task (random inpainting with 80 % missing, averages of 4x4 blocks; sigma_y =
0.05), it is fine-tuned with the EPS objective in every form of :mod:`posteriori.denoise`, Palette's included, and with
the pivot alone behind scalars (no channel shows the measurement); the same network is trained from random weights for
as many steps. Crops, masks, noise, loss, weight, steps and batch of a seed are equal for all. What is measured is what
:mod:`posteriori.bench.ablation` measures. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posteriori.backbones.unet import UNetBackbone
from posteriori.bench.ablation import TASKS, Setting, figure, fit, operator, table, train_and_measure, validation_loss
from posteriori.bench.common import Results, say
from posteriori.data import Augmentation, Photos, PhotoSource
from posteriori.denoise import NetworkDenoiser, Preconditioning
from posteriori.objective import Problem
from posteriori.schedule import VE

__all__ = ["FORMS", "Form", "main", "pretrain"]

SCRATCH_RATE = 1e-3


@dataclass(frozen=True)
class Form:
    """One way to train.

    Attributes:
        preconditioning: see :class:`posteriori.NetworkDenoiser`.
        channels: whether the network sees the linear estimate (or that from ``y`` alone) and its uncertainty.
        pretrained: whether it starts from the unconditional model.
        title: in the table.
    """

    preconditioning: Preconditioning
    channels: bool = True
    pretrained: bool = True
    title: str = ""


FORMS = {
    "paper-pivot": Form("paper", channels=False, title="paper: pivot with scalars, without y"),
    "paper": Form("paper", title="paper: pivot with scalars, and y"),
    "palette": Form("palette", title="Palette: no pivot"),
    "scalar": Form("scalar", title="linear estimate with scalars"),
    "spectral": Form("spectral", title="c(Q) and the linear estimate"),
    "paper-scratch": Form("paper", pretrained=False, title="from scratch: paper, with y"),
    "palette-scratch": Form("palette", pretrained=False, title="from scratch: Palette"),
    "spectral-scratch": Form("spectral", pretrained=False, title="from scratch: c(Q) and the linear estimate"),
}
NAMES = {name: form.title for name, form in FORMS.items()}


def timestep(q: Tensor) -> Tensor:
    """Noise label of the network: 0 to 999 over EDM's range of noise, evenly in log, as ``UNet2DModel`` expects."""
    low, high = math.log(0.002), math.log(80.0)
    return (q.log() - low) / (high - low) * 999


def unet() -> dict[str, Any]:
    """Configuration of the network: 0.6 M parameters, attention at the coarsest of three levels."""
    return {
        "sample_size": 32, "block_out_channels": (24, 48, 48), "layers_per_block": 1, "norm_num_groups": 8,
        "attention_head_dim": 24, "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    }  # fmt: skip


def pretrain(train: Photos, x_0: Tensor, setting: Setting, folder: Path) -> Path:
    """Train the unconditional model and keep it with diffusers' ``save_pretrained``; an existing one is kept."""
    place = folder / "unet"
    if place.exists():
        return place
    torch.manual_seed(0)
    backbone = UNetBackbone(3, conditioned=False, **unet())
    denoiser = NetworkDenoiser(backbone, VE(), preconditioning="spectral", c_noise=timestep)

    def problem(rng: np.random.Generator) -> Problem:
        x = train.crops(setting.batch, setting.size, rng)
        return Problem(x, operator("none", len(x), setting.size, rng), torch.full((len(x),), setting.sigma_y))

    fit(
        denoiser, problem, lambda: validation_loss(denoiser, x_0[: setting.loss_crops], "none", setting), setting,
        seed=1000, log=folder / "metrics.jsonl",
    )  # fmt: skip
    temporary = folder / "unet.tmp"
    backbone.network.to(memory_format=torch.contiguous_format).save_pretrained(temporary)
    temporary.rename(place)
    return place


def denoiser_for(form: Form, base: Path, seed: int) -> NetworkDenoiser:
    """The network to train: the base with new channels at zero weight, or random weights."""
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    backbone: UNetBackbone
    if not form.pretrained:
        backbone = UNetBackbone(3, form.channels, **unet())
    elif form.channels:
        backbone = UNetBackbone.from_pretrained(UNet2DModel.from_pretrained(base))
    else:
        backbone = UNetBackbone(3, False, **unet())
        backbone.network.load_state_dict(UNet2DModel.from_pretrained(base).state_dict())
    return NetworkDenoiser(backbone, VE(), preconditioning=form.preconditioning, c_noise=timestep)


def document(rows: Sequence[dict[str, Any]], base: Setting, setting: Setting, seeds: int, picture: str | None) -> str:
    """The table with what a reader has to know of it, in Markdown."""
    parameters = max(r["parameters"] for r in rows) / 1e6
    return f"""# Fine-tuning a pretrained model against training from scratch

An unconditional diffusers `UNet2DModel` of {parameters:.1f} M parameters, trained {base.steps:,} steps of {base.batch} crops of {base.size}x{base.size} pixels
with EDM's objective, is fine-tuned for {setting.steps} steps at a learning rate of {setting.learning_rate:g}, sigma_y = {setting.sigma_y:g}. "From scratch" is the same network
from random weights, for as many steps, at {SCRATCH_RATE:g}. The same crops, masks, noise and weight of the loss for all, {seeds} seeds (mean ± half the
spread between them); measured on {setting.crops} crops of other photos, {setting.samples} samples of {setting.nfe} evaluations each. The loss is that on fixed draws;
residual 1, a pooled squared error of one sample over that of the mean of 2, and {1 + 1 / setting.samples:g} for the mean of samples are right.

- *paper*: `c_skip(q) mu* + c_out(q) F([c_in(q) mu*, x_y/s, diagonal])`, with the extra channels or without
- *Palette*: `c_skip(q) u + c_out(q) F([c_in(q) u, x_y/s, diagonal])`, no pivot
- *linear estimate with scalars*: `x_lin + c_out(q) F([c_in(q) u, x_lin/s, diagonal])`, one solve
- *c(Q) and the linear estimate*: `c_skip(Q) mu* + c_out(Q) F([c_in(Q) mu*, x_lin/s, diagonal])`, the default

{table(rows, NAMES)}
{f"{chr(10)}![Validation loss during training]({picture}){chr(10)}" if picture else ""}
    python -m posteriori.bench.finetune PHOTOS --out runs/finetune
"""  # noqa: E501 - lines of the document, not of the code


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser("python -m posteriori.bench.finetune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("photos", help="folder of photos")
    parser.add_argument("--out", required=True, type=Path, help="folder for results; finished runs are kept")
    parser.add_argument("--train-match", default=r"[0-9a-f]{16}\.jpg", help="names of the photos to train on")
    parser.add_argument("--validate-match", default=r"(?![0-9a-f]{16}\.).*\.jpg", help="names of those to measure on")
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds")
    parser.add_argument("--base-steps", type=int, default=2500, help="of the unconditional model")
    parser.add_argument("--steps", type=int, default=300, help="of every run")
    parser.add_argument("--batch", type=int, default=Setting.batch)
    parser.add_argument("--crops", type=int, default=64, help="of other photos, to measure on")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--figure", type=Path, help="PNG with the loss curves")
    parser.add_argument("--table", type=Path, help="Markdown file with the table")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    tuned = Setting(
        steps=args.steps, batch=args.batch, crops=args.crops, loss_crops=4 * args.crops, samples=4, ema=0.99,
        learning_rate=4e-4, log_every=50,
    )  # fmt: skip
    base_setting = replace(tuned, steps=args.base_steps, learning_rate=1e-3, ema=0.999, log_every=500)
    augmentation = Augmentation(native_share=0.25, scale=(0.25, 1.0))
    train = Photos([PhotoSource(args.photos, args.train_match)], augmentation)
    validation = Photos([PhotoSource(args.photos, args.validate_match)], augmentation)
    x_0 = validation.crops(tuned.loss_crops, tuned.size, np.random.default_rng(99))
    say(f"{len(train)} photos to train on, {len(validation)} to measure on")
    base = pretrain(train, x_0, base_setting, args.out / "base")
    results = Results(args.out / "results.jsonl", ("task", "form", "seed", "setting"))
    rows = []
    for seed in range(args.seeds):
        for task in args.tasks.split(","):
            for name in args.forms.split(","):
                form = FORMS[name]
                setting = tuned if form.pretrained else replace(tuned, learning_rate=SCRATCH_RATE)

                def compute(
                    task: str = task, name: str = name, seed: int = seed, form: Form = form, setting: Setting = setting
                ) -> dict[str, Any]:
                    log = args.out / f"{task}-{name}-{seed}" / "metrics.jsonl"
                    return train_and_measure(denoiser_for(form, base, seed), train, x_0, task, seed, setting, log)

                key = json.dumps({**asdict(setting), "base_steps": args.base_steps})
                rows.append(results.get(compute, task=task, form=name, seed=seed, setting=key))
                say(json.dumps({k: v for k, v in rows[-1].items() if k != "setting"}))
    say("\n" + table(rows, NAMES))
    if args.table:
        args.table.parent.mkdir(parents=True, exist_ok=True)
        picture = os.path.relpath(args.figure, args.table.parent) if args.figure else None
        args.table.write_text(document(rows, base_setting, tuned, args.seeds, picture))
    if args.figure:
        figure(args.out, args.figure, range(args.seeds), NAMES)


if __name__ == "__main__":
    main()
