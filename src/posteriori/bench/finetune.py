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

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posteriori.backbones.unet import UNetBackbone
from posteriori.bench.ablation import (
    Setting,
    compare,
    fit,
    open_crops,
    parser_of,
    problems,
    table,
    train_and_measure,
    validation_loss,
)
from posteriori.data import Photos
from posteriori.denoise import NetworkDenoiser, Preconditioning
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

    def validate() -> float:
        return validation_loss(denoiser, x_0[: setting.loss_crops], "none", setting)

    fit(denoiser, problems(train, "none", setting), validate, setting, seed=1000, log=folder / "metrics.jsonl")
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
    parser = parser_of("finetune", __doc__, FORMS, steps=300, crops=64)
    parser.add_argument("--base-steps", type=int, default=2500, help="of the unconditional model")
    args = parser.parse_args(arguments)
    tuned = Setting(
        steps=args.steps, batch=args.batch, crops=args.crops, loss_crops=4 * args.crops, samples=4, ema=0.99,
        learning_rate=4e-4, log_every=50,
    )  # fmt: skip
    scratch = replace(tuned, learning_rate=SCRATCH_RATE)
    base_setting = replace(tuned, steps=args.base_steps, learning_rate=1e-3, ema=0.999, log_every=500)
    train, x_0 = open_crops(args, tuned)
    base = pretrain(train, x_0, base_setting, args.out / "base")

    def setting(name: str) -> Setting:
        return tuned if FORMS[name].pretrained else scratch

    compare(
        args,
        NAMES,
        lambda name: {**asdict(setting(name)), "base_steps": args.base_steps},
        lambda task, name, seed, log: train_and_measure(
            denoiser_for(FORMS[name], base, seed), train, x_0, task, seed, setting(name), log
        ),
        lambda rows, picture: document(rows, base_setting, tuned, args.seeds, picture),
    )


if __name__ == "__main__":
    main()
