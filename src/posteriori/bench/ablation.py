r"""What a network is given matters: four preconditionings trained alike.

    python -m posteriori.bench.ablation PHOTOS --out runs/ablation [--figure ablation.png --table ablation.md]

For each task (random inpainting with 80 % missing, averages of 4x4 blocks; sigma_y = 0.05) a small network is trained
from scratch on crops of photos for every form of :mod:`posteriori.denoise`: ``paper`` (the pivot behind scalar
preconditioning, and the measurement as a channel), ``scalar``, ``spectral`` and ``palette`` (no pivot at all). Network,
crops, noise, loss, weight, steps and batch are equal; so is every random number of a seed. Measured on crops of other
photos: the loss on fixed draws during training, PSNR of the mean from one evaluation, CRPS and whitened residual of
samples, and the pooled MSE of the samples over that of the mean (2 is right).

Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from posteriori.backbones.photo import PhotoNet
from posteriori.bench.common import HalfPrecision, Results, markdown_table, say
from posteriori.data import Augmentation, Photos, PhotoSource
from posteriori.denoise import NetworkDenoiser, Preconditioning
from posteriori.metrics import crps, mse_ratios, psnr, residual
from posteriori.objective import NoiseLevels, Problem, eps_loss
from posteriori.operators import Downsampling, Inpainting, LinearOperator, Nothing
from posteriori.pivot import measure
from posteriori.posterior import ExactPosterior
from posteriori.sample import sample
from posteriori.schedule import VE
from posteriori.tasks import random_mask

__all__ = ["FORMS", "TASKS", "Setting", "main", "run"]

FORMS: tuple[Preconditioning, ...] = ("paper", "palette", "scalar", "spectral")
TASKS = {"inpaint": "80 % of the pixels missing", "sr": "4x4 averages"}
NAMES: dict[str, str] = {
    "paper": "paper: pivot with scalars, and y",
    "palette": "Palette: no pivot",
    "scalar": "linear estimate with scalars",
    "spectral": "c(Q) and the linear estimate",
}


@dataclass(frozen=True)
class Setting:
    """What all runs share."""

    steps: int = 800
    batch: int = 32
    size: int = 32
    sigma_y: float = 0.05
    channels: tuple[int, ...] = (32, 64, 96)
    blocks: tuple[int, ...] = (1, 1, 1)
    learning_rate: float = 1e-3
    ema: float = 0.995
    log_every: int = 75
    crops: int = 128  # for PSNR and samples
    loss_crops: int = 512  # for the loss on fixed draws
    samples: int = 8
    nfe: int = 20


def operator(task: str, count: int, size: int, rng: np.random.Generator) -> LinearOperator:
    """The operator for a batch; masks differ between its samples."""
    if task == "none":
        return Nothing()
    if task == "sr":
        return Downsampling(4)
    return Inpainting(torch.stack([random_mask((size, size), 0.8, rng) for _ in range(count)]))


class Average:
    """Exponential moving average of weights, with a shorter memory at the beginning."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.values = [p.detach().clone() for p in network.parameters()]

    def update(self, network: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.values, [p.detach() for p in network.parameters()], 1 - decay)

    def swap(self, network: nn.Module) -> None:
        """Exchange the averaged weights with the network's own."""
        for value, parameter in zip(self.values, network.parameters(), strict=True):
            own = parameter.detach().clone()
            parameter.data.copy_(value)
            value.copy_(own)


def validation_loss(denoiser: NetworkDenoiser, x_0: Tensor, task: str, setting: Setting) -> float:
    """Loss on fixed crops, masks and noise, the same for every form and every moment of training."""
    losses = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(12345)
        rng, generator = np.random.default_rng(12345), torch.Generator().manual_seed(12345)
        for x in x_0.split(128):
            A, sigma_y = operator(task, len(x), setting.size, rng), torch.full((len(x),), setting.sigma_y)
            losses.append(eps_loss(denoiser, [Problem(x, A, sigma_y)], NoiseLevels(), generator)[1])
    return float(torch.cat(losses).mean())


def evaluate(denoiser: NetworkDenoiser, x_0: Tensor, task: str, setting: Setting) -> dict[str, float]:
    """Figures of a trained network on validation crops."""
    A = operator(task, len(x_0), setting.size, np.random.default_rng(777))
    y = measure(A, x_0, setting.sigma_y, seed=777)
    posterior = ExactPosterior(denoiser, A, y, setting.sigma_y)
    mean = posterior.mean()
    samples = sample(posterior, n=setting.samples, nfe=setting.nfe, seed=777, batch_size=4 * len(x_0))
    ratios = mse_ratios(samples, mean, x_0)
    return {
        "psnr_mmse": float(psnr(mean, x_0).mean()),
        "psnr_sample": float(torch.stack([psnr(x, x_0) for x in samples]).mean()),
        "psnr_mean": float(psnr(samples.mean(0), x_0).mean()),
        "crps": float(crps(samples, x_0).mean()),
        "residual": residual(A, samples, y, setting.sigma_y),
        "ratio_sample": ratios.one,
        "ratio_mean": ratios.mean,
    }


def fit(
    denoiser: NetworkDenoiser,
    problem: Callable[[np.random.Generator], Problem],
    validate: Callable[[], float],
    setting: Setting,
    seed: int,
    log: Path,
) -> float:
    """Train a network; ``log`` gets a line with both losses every ``log_every`` steps.

    Args:
        denoiser: its backbone is trained in bfloat16 and ends with averaged weights.
        problem: a batch, from a generator that is seeded by the step: all forms see the same crops, masks and noise.
        validate: loss on fixed draws, called with averaged weights.

    Returns:
        Seconds of training, validation left out.
    """
    network = denoiser.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    denoiser.backbone = HalfPrecision(network)
    optimizer = torch.optim.AdamW(network.parameters(), setting.learning_rate, betas=(0.9, 0.99), fused=True)
    average = Average(network, setting.ema)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    losses: list[float] = []
    seconds = 0.0
    for step in range(setting.steps):
        began = time.perf_counter()
        warm, falling = (step + 1) / 100, (setting.steps - step) / (0.3 * setting.steps)
        optimizer.param_groups[0]["lr"] = setting.learning_rate * min(1.0, warm, falling)
        torch.manual_seed(seed * 1_000_003 + step)
        loss, _ = eps_loss(denoiser, [problem(np.random.default_rng([seed, step]))], NoiseLevels())
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(network)
        losses.append(float(loss.detach()))
        seconds += time.perf_counter() - began
        if (step + 1) % setting.log_every == 0 or step + 1 == setting.steps:
            average.swap(network)
            row = {"step": step + 1, "loss": float(np.mean(losses)), "validation_loss": validate()}
            average.swap(network)
            with log.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
            losses.clear()
    average.swap(network)
    return seconds


def run(
    train: Photos, x_0: Tensor, task: str, form: Preconditioning, seed: int, setting: Setting, log: Path
) -> dict[str, Any]:
    """Train and measure one network."""
    torch.manual_seed(seed)
    network = PhotoNet(3, setting.channels, setting.blocks, 128)
    return train_and_measure(NetworkDenoiser(network, VE(), preconditioning=form), train, x_0, task, seed, setting, log)


def problems(train: Photos, task: str, setting: Setting) -> Callable[[np.random.Generator], Problem]:
    """Batches of a task on crops of ``train``."""

    def draw(rng: np.random.Generator) -> Problem:
        x = train.crops(setting.batch, setting.size, rng)
        return Problem(x, operator(task, len(x), setting.size, rng), torch.full((len(x),), setting.sigma_y))

    return draw


def train_and_measure(
    denoiser: NetworkDenoiser, train: Photos, x_0: Tensor, task: str, seed: int, setting: Setting, log: Path
) -> dict[str, Any]:
    """Train a denoiser for one task and measure it on the crops ``x_0``."""

    def validate() -> float:
        return validation_loss(denoiser, x_0[: setting.loss_crops], task, setting)

    began = time.perf_counter()
    seconds = fit(denoiser, problems(train, task, setting), validate, setting, seed, log)
    return {
        "validation_loss": validate(),
        **evaluate(denoiser.eval(), x_0[: setting.crops], task, setting),
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "seconds_training": round(seconds, 1),
        "seconds": round(time.perf_counter() - began, 1),
    }


SHOWN = {
    "validation_loss": ("loss", 3), "psnr_mmse": ("mean (1 NFE), dB", 2), "psnr_sample": ("sample, dB", 2),
    "crps": ("CRPS x100", 2), "residual": ("residual", 3), "ratio_sample": ("MSE sample / mean", 2),
    "ratio_mean": ("MSE mean of samples / mean", 3),
}  # fmt: skip


def table(rows: Sequence[dict[str, Any]], names: Mapping[str, str] = NAMES) -> str:
    """Results as Markdown, averaged over seeds, with half the spread between seeds behind the sign."""
    lines = []
    for task in TASKS:
        for form, name in names.items():
            found = [r for r in rows if (r["task"], r["form"]) == (task, form)]
            if not found:
                continue
            cells = []
            for key, (_, digits) in SHOWN.items():
                values = np.array([r[key] for r in found]) * (100 if key == "crps" else 1)
                spread = f" ± {np.ptp(values) / 2:.{digits}f}" if len(values) > 1 else ""
                cells.append(f"{values.mean():.{digits}f}{spread}")
            lines.append([task, name, *cells])
    return markdown_table(["task", "form", *[title for title, _ in SHOWN.values()]], lines, names=2)


def document(rows: Sequence[dict[str, Any]], setting: Setting, seeds: int, picture: str | None) -> str:
    """The table with what a reader has to know of it, in Markdown."""
    parameters = rows[0]["parameters"] / 1e6
    return f"""# What the network is given: an ablation

A network of {parameters:.1f} M parameters is trained from scratch for each form, {setting.steps} steps of {setting.batch} crops of
{setting.size}x{setting.size} pixels, sigma_y = {setting.sigma_y:g}; the same crops, masks, noise and weight of the loss for all, {seeds} seeds (mean ± half
the spread between them). Measured on {setting.crops} crops of other photos: the loss on fixed draws, PSNR of the posterior mean
from one evaluation, of single samples ({setting.nfe} evaluations), the fair CRPS of {setting.samples} samples, their pooled whitened residual (1 is
right), and their pooled squared error over that of the mean (2 is right for one sample, {1 + 1 / setting.samples:g} for the mean of {setting.samples}).

- *paper*: `c_skip(q) mu* + c_out(q) F([c_in(q) mu*, x_y/s, diagonal])`, the pivot behind the backbone's scalars
- *Palette*: `c_skip(q) u + c_out(q) F([c_in(q) u, x_y/s, diagonal])`, no pivot
- *linear estimate with scalars*: `x_lin + c_out(q) F([c_in(q) u, x_lin/s, diagonal])`, one solve
- *c(Q) and the linear estimate*: `c_skip(Q) mu* + c_out(Q) F([c_in(Q) mu*, x_lin/s, diagonal])`, the default

{table(rows)}
{f"{chr(10)}![Validation loss during training]({picture}){chr(10)}" if picture else ""}
    python -m posteriori.bench.ablation PHOTOS --out runs/ablation
"""  # noqa: E501 - lines of the document, not of the code


def figure(folder: Path, path: Path, seeds: Sequence[int], names: Mapping[str, str] = NAMES) -> None:
    """Loss on fixed validation draws against steps: one panel per task, one line per seed.

    A form has a colour; where ``names`` holds it a second time as ``FORM-scratch``, that is dashed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    forms = list(dict.fromkeys(form.removesuffix("-scratch") for form in names))
    figure, panels = plt.subplots(1, len(TASKS), figsize=(10, 4), constrained_layout=True)
    for panel, (task, title) in zip(panels, TASKS.items(), strict=True):
        for form, name in names.items():
            for k, seed in enumerate(seeds):
                log = folder / f"{task}-{form}-{seed}" / "metrics.jsonl"
                rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
                panel.plot(
                    [r["step"] for r in rows],
                    [r["validation_loss"] for r in rows],
                    color=f"C{forms.index(form.removesuffix('-scratch'))}",
                    linestyle="--" if form.endswith("-scratch") else "-",
                    alpha=0.9 - 0.35 * (k > 0),
                    label=name if k == 0 else None,
                )
        panel.set_title(title)
        panel.set_xlabel("training step")
        panel.set_yscale("log")
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("validation loss")
    panels[0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parser_of(name: str, doc: str | None, forms: Iterable[str], steps: int, crops: int) -> argparse.ArgumentParser:
    """The command line of a comparison of forms; ``steps`` and ``crops`` are its defaults."""
    parser = argparse.ArgumentParser(f"python -m posteriori.bench.{name}", description=(doc or "").split("\n")[0])
    parser.add_argument("photos", help="folder of photos")
    parser.add_argument("--out", required=True, type=Path, help="folder for results; finished runs are kept")
    parser.add_argument("--train-match", default=r"[0-9a-f]{16}\.jpg", help="names of the photos to train on")
    parser.add_argument("--validate-match", default=r"(?![0-9a-f]{16}\.).*\.jpg", help="names of those to measure on")
    parser.add_argument("--forms", default=",".join(forms))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds")
    parser.add_argument("--steps", type=int, default=steps, help="of every run")
    parser.add_argument("--batch", type=int, default=Setting.batch)
    parser.add_argument("--crops", type=int, default=crops, help="of other photos, to measure on")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--figure", type=Path, help="PNG with the loss curves")
    parser.add_argument("--table", type=Path, help="Markdown file with the table")
    return parser


def open_crops(args: argparse.Namespace, setting: Setting) -> tuple[Photos, Tensor]:
    """The photos to train on, and crops of others to measure on."""
    if args.threads:
        torch.set_num_threads(args.threads)
    # Shrunk photos: crops of 32 pixels at full resolution hold little to restore.
    augmentation = Augmentation(native_share=0.25, scale=(0.25, 1.0))
    train = Photos([PhotoSource(args.photos, args.train_match)], augmentation)
    validation = Photos([PhotoSource(args.photos, args.validate_match)], augmentation)
    say(f"{len(train)} photos to train on, {len(validation)} to measure on")
    return train, validation.crops(setting.loss_crops, setting.size, np.random.default_rng(99))


def compare(
    args: argparse.Namespace,
    names: Mapping[str, str],
    settings: Callable[[str], dict[str, Any]],
    compute: Callable[[str, str, int, Path], dict[str, Any]],
    document: Callable[[list[dict[str, Any]], str | None], str],
) -> None:
    """Every run that is not there yet, then table and figure.

    Args:
        args: of :func:`parser_of`.
        names: titles of the forms.
        settings: what a form's result depends on beside task and seed.
        compute: of task, form, seed and the file for its losses.
        document: of all rows and the figure's place.
    """
    results = Results(args.out / "results.jsonl", ("task", "form", "seed", "setting"))
    rows = []
    for seed in range(args.seeds):
        for task in args.tasks.split(","):
            for form in args.forms.split(","):
                log = args.out / f"{task}-{form}-{seed}" / "metrics.jsonl"
                made = partial(compute, task, form, seed, log)
                row = results.get(made, task=task, form=form, seed=seed, setting=json.dumps(settings(form)))
                rows.append(row)
                say(json.dumps({k: v for k, v in row.items() if k != "setting"}))
    say("\n" + table(rows, names))
    if args.table:
        args.table.parent.mkdir(parents=True, exist_ok=True)
        picture = os.path.relpath(args.figure, args.table.parent) if args.figure else None
        args.table.write_text(document(rows, picture))
    if args.figure:
        figure(args.out, args.figure, range(args.seeds), names)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parser_of("ablation", __doc__, FORMS, Setting.steps, Setting.crops).parse_args(arguments)
    setting = Setting(steps=args.steps, batch=args.batch, crops=args.crops, loss_crops=4 * args.crops)
    train, x_0 = open_crops(args, setting)
    compare(
        args,
        NAMES,
        lambda form: asdict(setting),
        lambda task, form, seed, log: run(train, x_0, task, cast("Preconditioning", form), seed, setting, log),
        lambda rows, picture: document(rows, setting, args.seeds, picture),
    )


if __name__ == "__main__":
    main()
