r"""Photos restored in five tasks: quality against classical estimates, and calibration of the samples.

    python -m posteriori.bench.photos PHOTOS --tune-on OTHER_PHOTOS --model photo --out runs/photos [--samples 8]

Tasks: random inpainting (70 % missing), a missing box of half the side, averages of 4x4 blocks, Gaussian blur (sigma 3,
61 taps, reflected borders), camera shake (61 taps, wrapped borders). Every photo has its own mask, kernel and noise,
drawn from its name. Columns: the measurement itself (missing pixels grey, small photos enlarged), the linear estimate
under ``N(0, 0.5^2)``, the piecewise smooth one (:mod:`posteriori.smooth`), converged total variation with
the weight that is best for the task on other photos, and the model: its first answer, from one evaluation, and its mean
(mmse), of a network that looks twice from two, of others the same; one sample, the mean of all samples.

Rows are kept in the output folder and not measured again; those of total variation outlive any model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from posteriori.bench.common import HalfPrecision, Results, markdown_table, photo_files, read_photo, say, seed_of
from posteriori.checkpoint import load, read_card, write_atomically
from posteriori.denoise import NetworkDenoiser
from posteriori.methods.tv import total_variation
from posteriori.metrics import crps, mse, psnr, residual_squares
from posteriori.operators import Blur, Downsampling, GaussianBlur, Inpainting, LinearOperator, motion_kernel
from posteriori.pivot import estimate_from_measurement, measure
from posteriori.posterior import ExactPosterior
from posteriori.sample import sample
from posteriori.smooth import smooth_estimate
from posteriori.tasks import box_mask, random_mask

__all__ = ["TASKS", "main", "measure_models", "operator_for", "tune"]

TASKS = ("random", "box", "sr", "gaussian", "motion")
# Where the search for the weight starts; it goes on until the best weight has a worse one on either side.
FIRST_WEIGHT = {"random": 0.02, "box": 0.02, "sr": 0.008, "gaussian": 0.008, "motion": 0.016}


def operator_for(task: str, size: int, seed: int) -> LinearOperator:
    """The operator of a task for one photo of ``size`` x ``size`` pixels."""
    rng = np.random.default_rng([TASKS.index(task), seed])
    if task == "random":
        return Inpainting(random_mask((size, size), 0.7, rng))
    if task == "box":
        return Inpainting(box_mask((size, size), (size // 2, size // 2), rng))
    if task == "sr":
        return Downsampling(4)
    if task == "gaussian":
        return GaussianBlur(3.0, 61)
    return Blur(motion_kernel(min(61, size - 1 + size % 2), 0.5, seed), "circular")


class Problem:
    """One photo measured in one task."""

    def __init__(self, path: Path, task: str, size: int, sigma_y: float) -> None:
        seed = seed_of(path.name)
        self.task, self.sigma_y, self.seed = task, sigma_y, seed
        self.x_0 = read_photo(path, size)
        self.A = operator_for(task, size, seed)
        self.y = measure(self.A, self.x_0, sigma_y, seed=seed)

    def input(self) -> Tensor:
        """The measurement as a picture of the photo's size."""
        if self.y.shape == self.x_0.shape:
            return self.y
        return functional.interpolate(self.y, self.x_0.shape[-2:], mode="nearest")

    def linear(self) -> Tensor:
        """Best linear estimate from ``y`` under the prior ``N(0, 0.5^2)``."""
        return estimate_from_measurement(self.y, self.A, self.x_0.shape, sigma_y=self.sigma_y, prior_std=0.5)

    def smooth(self) -> Tensor:
        """The piecewise smooth estimate of :mod:`posteriori.smooth`."""
        return smooth_estimate(self.y, self.A, self.x_0.shape, sigma_y=self.sigma_y, prior_std=0.5)


def tune(score: Callable[[float], float], first: float, ratio: float = 2.0, refinements: int = 1) -> float:
    """Maximise a score over positive weights: steps of ``ratio`` until the best is bracketed, then of its square root.

    Args:
        score: of a weight.
        first: where to start.
        ratio: first step, over 1.
        refinements: how often the step is halved (in the logarithm).
    """
    known: dict[int, float] = {}
    unit = ratio ** (1 / 2**refinements)

    def at(k: int) -> float:
        if k not in known:
            known[k] = score(float(f"{first * unit**k:.4g}"))
        return known[k]

    best, step = 0, 2**refinements
    while step >= 1:
        while True:
            better = max((best, best - step, best + step), key=at)
            if better == best or abs(better) > 40 * 2**refinements:
                break
            best = better
        step //= 2
    return float(f"{first * unit**best:.4g}")


def tuned_weights(out: Path, folder: str, match: str, count: int, tasks: Sequence[str], args: Any) -> dict[str, float]:
    """Weight of total variation for every task, from photos that are not measured; kept in ``tv-weights.json``."""
    path = out / "tv-weights.json"
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    setting = {"size": args.size, "sigma_y": args.sigma_y, "match": match, "photos": count}
    rows = Results(out / "tv-tuning.jsonl", ("task", "photo", "weight", "size", "sigma_y"))
    for task in tasks:
        if task in stored and all(stored[task][k] == v for k, v in setting.items()):
            continue
        files = photo_files(folder, match, count)

        def score(weight: float, task: str = task, files: list[Path] = files) -> float:
            values = [tv_row(rows, path, task, weight, args)["psnr"] for path in files]
            say(f"tuning {task}: weight {weight:.5f} gives {np.mean(values):.3f} dB on {len(files)} photos")
            return float(np.mean(values))

        stored[task] = {"weight": tune(score, FIRST_WEIGHT[task]), **setting}
        write_atomically(path, json.dumps(stored, indent=1).encode())
    return {task: float(stored[task]["weight"]) for task in tasks}


def tv_row(rows: Results, path: Path, task: str, weight: float, args: Any, tolerance: float = 1e-5) -> dict[str, Any]:
    """PSNR of converged total variation on one photo, from the file where it is there."""

    def compute() -> dict[str, Any]:
        problem = Problem(path, task, args.size, args.sigma_y)
        began = time.perf_counter()
        found = total_variation(problem.A, problem.y, weight, max_iterations=4000)
        seconds = time.perf_counter() - began
        return {
            "psnr": float(psnr(found.x, problem.x_0)),
            "iterations": found.iterations,
            "change": float(found.change),
            "seconds": round(seconds, 2),
        }

    key = {"task": task, "photo": path.name, "weight": weight, "size": args.size, "sigma_y": args.sigma_y}
    return rows.get(compute, **key)


def model_row(denoiser: NetworkDenoiser, problem: Problem, samples: int, nfe: int) -> dict[str, Any]:
    """Everything measured of a model on one photo; squares are kept so that they can be pooled."""
    x_0 = problem.x_0
    posterior = ExactPosterior(denoiser, problem.A, problem.y, problem.sigma_y)
    began = time.perf_counter()
    mean = posterior.mean()
    row: dict[str, Any] = {
        "mmse": float(psnr(mean, x_0)),
        "first": float(psnr(posterior.mean(looks=1), x_0)),
        "mse_mmse": float(mse(mean, x_0)),
        "seconds_mmse": round(time.perf_counter() - began, 3),
    }
    if samples:
        began = time.perf_counter()
        drawn = sample(posterior, n=samples, nfe=nfe, seed=problem.seed)
        row["seconds_sample"] = round((time.perf_counter() - began) / samples, 3)
        squares = [float(residual_squares(problem.A, x, problem.y, problem.sigma_y)) for x in drawn]
        row |= {
            "sample": float(np.mean([float(psnr(x, x_0)) for x in drawn])),
            "mean_of_samples": float(psnr(drawn.mean(0), x_0)),
            "mse_sample": float(np.mean([float(mse(x, x_0)) for x in drawn])),
            "mse_mean": float(mse(drawn.mean(0), x_0)),
            "residual_squares": float(np.mean(squares)),
            "measurements": float(problem.A.measurement_count(problem.y)),
            "crps": float(crps(drawn, x_0)) if samples > 1 else None,
        }
    return row


def classical_row(problem: Problem) -> dict[str, Any]:
    """PSNR of the measurement as it is and of linear estimates."""
    found = {"input": problem.input(), "linear": problem.linear(), "smooth": problem.smooth()}
    return {k: float(psnr(v, problem.x_0)) for k, v in found.items()}


def summarize(rows: Sequence[dict[str, Any]], samples: int) -> dict[str, float]:
    """Figures of one task from the rows of its photos: PSNR averaged over photos, the rest pooled."""

    def over(name: str, pool: Callable[[list[float]], float]) -> dict[str, float]:
        values = [r[name] for r in rows if r.get(name) is not None]
        return {name: round(float(pool(values)), 4)} if len(values) == len(rows) else {}

    def average(v: list[float]) -> float:
        return float(np.mean(v))

    result: dict[str, float] = {"photos": len(rows)}
    for name in ("input", "linear", "tv", "smooth", "first", "mmse", "sample", "mean_of_samples", "crps"):
        result |= over(name, average)
    for name in ("seconds_tv", "seconds_mmse", "seconds_sample"):
        result |= over(name, lambda v: float(np.median(v)))
    if samples and rows and all("mse_sample" in r for r in rows):
        total = {k: sum(r[k] for r in rows) for k in ("mse_mmse", "mse_sample", "mse_mean")}
        squares, count = sum(r["residual_squares"] for r in rows), sum(r["measurements"] for r in rows)
        result["residual"] = round((squares / count) ** 0.5, 4)
        result["ratio_sample"] = round(total["mse_sample"] / total["mse_mmse"], 4)
        result["ratio_mean"] = round(total["mse_mean"] / total["mse_mmse"], 4)
    return result


def measure_models(args: Any) -> dict[str, Any]:
    """Run the measurement that the command line describes; returns what is written to ``photos.json``."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    files = photo_files(args.photos, args.match, args.limit)
    tasks = args.tasks.split(",")
    weights = tuned_weights(out, args.tune_on, args.tune_match, args.tune_count, tasks, args) if args.tune_on else {}
    tv_rows = Results(out / "tv.jsonl", ("task", "photo", "weight", "size", "sigma_y"))
    denoiser = load(args.model) if args.model else None
    key = ("task", "photo", "size", "sigma_y", "samples", "nfe", "bf16")
    version = str(read_card(args.model)["sha256"])[:12] if args.model else "none"
    model_rows = Results(out / f"model-{version}.jsonl", key)
    if denoiser is not None and args.bf16:
        denoiser.backbone = HalfPrecision(denoiser.backbone)
    report: dict[str, Any] = {"setting": {k: v for k, v in vars(args).items() if k not in ("photos", "tune_on", "out")}}
    report["tasks"] = {}
    for task in tasks:
        rows = []
        for path in files:
            problem = Problem(path, task, args.size, args.sigma_y)
            row = classical_row(problem)
            if task in weights:
                found = tv_row(tv_rows, path, task, weights[task], args)
                row |= {"tv": found["psnr"], "seconds_tv": found["seconds"]}
            if denoiser is not None:
                row |= model_rows.get(
                    partial(model_row, denoiser, problem, args.samples, args.nfe),
                    task=task, photo=path.name, size=args.size, sigma_y=args.sigma_y,
                    samples=args.samples, nfe=args.nfe if args.samples else 0, bf16=args.bf16,
                )  # fmt: skip
            rows.append(row)
        report["tasks"][task] = summarize(rows, args.samples)
        if task in weights:
            report["tasks"][task]["tv_weight"] = weights[task]
        say(f"{task}: {json.dumps(report['tasks'][task])}")
    write_atomically(out / "photos.json", json.dumps(report, indent=1).encode())
    return report


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    columns = {
        "input": "input", "linear": "linear", "tv": "TV", "smooth": "smooth", "first": "first look", "mmse": "mean",
        "sample": "sample", "mean_of_samples": "mean of samples", "crps": "CRPS", "residual": "residual",
        "ratio_sample": "MSE sample / mean", "ratio_mean": "MSE mean of samples / mean",
        "seconds_mmse": "s (mean)", "seconds_sample": "s per sample",
    }  # fmt: skip
    kept = [c for c in columns if any(c in row for row in report["tasks"].values())]
    rows = [
        [task, *[row[c] if c != "crps" else f"{row[c]:.4f}" for c in kept if c in row]]
        for task, row in report["tasks"].items()
    ]
    return markdown_table(["task", *[columns[c] for c in kept]], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m posteriori.bench.photos", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("photos", help="folder with the photos to measure on")
    parser.add_argument("--out", required=True, help="folder for results; a run continues what it finds there")
    parser.add_argument("--model", help="bundled name or folder; without it only the classical estimates are measured")
    parser.add_argument("--samples", type=int, default=0, help="posterior samples per photo, for the calibration")
    parser.add_argument("--nfe", type=int, default=8, help="network evaluations per sample")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated")
    parser.add_argument("--match", default=".*", help="regular expression that names of photos match in full")
    parser.add_argument("--limit", type=int, help="this many photos, evenly spread")
    parser.add_argument("--size", type=int, default=256, help="side of the centre crop")
    parser.add_argument("--sigma-y", type=float, default=0.05, help="measurement noise; photos are in [-1, 1]")
    parser.add_argument("--tune-on", help="folder of photos on which the weight of total variation is chosen")
    parser.add_argument("--tune-match", default=".*", help="regular expression that their names match in full")
    parser.add_argument("--tune-count", type=int, default=12)
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--bf16", action="store_true", help="network in bfloat16")
    report = measure_models(parser.parse_args(arguments))
    say("\n" + table(report))


if __name__ == "__main__":
    main()
