r"""Magnetic resonance and tomography with the best prior that two moments of the data give.

    python -m posteriori.bench.science SLICES.npz --out runs/science [--limit 8] [--size 240]

The prior is Gaussian and stationary, ``x ~ N(m, C)``, ``C = F^* diag(P) F``: constant mean and power spectrum of the
even-numbered slices. Odd-numbered slices are measured. Everything is then known exactly but for a solve with the
posterior's precision ``M = C^-1 + A^T A / sigma_y^2``:

    mean      m + M^-1 A^T (y - A m) / sigma_y^2                      the linear estimate
    a sample  mean + M^-1 (C^-1/2 z + A^T z' / sigma_y),      z, z' ~ N(0, I)

Conjugate gradients solve it in the coordinates of ``D = (1/P + d/sigma_y^2)^-1``, where ``d`` is the diagonal of
``F A^T A F^*``: exact for a single coil, close for the rest. Columns: what users have without a prior (zero-filled
k-space, filtered back-projection), the linear estimate, one posterior sample; whitened residuals
``|y - A x| / (sigma_y sqrt(m))``, which are 1 for true samples, over 1 for a prior that is wrong.

Two files are written: ``science.json`` with every figure and ``science.png`` with one slice.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from posteriori.bench.common import markdown_table, say
from posteriori.checkpoint import write_atomically
from posteriori.metrics import mse, psnr, residual_squares
from posteriori.operators import MRI, LinearOperator, MultiCoilMRI, Radon, birdcage_maps, cartesian_mask, radial_mask
from posteriori.pivot import measure, seeded_noise
from posteriori.solve import Solution, conjugate_gradients

__all__ = ["StationaryPrior", "main", "read_slices", "tasks"]


def read_slices(path: str | Path, size: int | None = None) -> Tensor:
    """Slices ``(n, 1, size, size)`` in [-1, 1], float64, cut from the middle of the array ``images`` of bytes.

    Raises:
        ValueError: when the file holds no such array, or slices are smaller than ``size``.
    """
    with np.load(path, allow_pickle=False) as stored:
        if "images" not in stored or stored["images"].ndim != 3 or stored["images"].dtype != np.uint8:
            raise ValueError(f"{Path(path).name} holds no array `images` of bytes (n, H, W)")
        slices = torch.from_numpy(stored["images"])
    side = size or min(slices.shape[1:])
    if side > min(slices.shape[1:]):
        raise ValueError(f"slices of {tuple(slices.shape[1:])} are smaller than {side}: lower --size")
    top, left = ((n - side) // 2 for n in slices.shape[1:])
    return slices[:, None, top : top + side, left : left + side].double() / 127.5 - 1


@dataclass(frozen=True)
class Task:
    """An operator, its noise, and its classical reconstruction."""

    A: LinearOperator
    sigma_y: float

    def classical(self, y: Tensor) -> Tensor:
        """Zero-filled k-space, coils combined; or filtered back-projection, of an image that is 0 outside."""
        if not isinstance(self.A, Radon):
            return self.A.adjoint(y)
        # a detector sees nothing beside the image, but -1 is black: shift so that it is the same
        black = torch.full((1, 1, *self.A.image_size(y.shape[-1])), -1.0).to(y)
        return self.A.filtered_backprojection(y - self.A(black)) - 1


def tasks(size: int, sigma_k: float = 0.05, sigma_ct: float = 1.0) -> dict[str, Task]:
    """What is measured of slices of ``size`` pixels.

    Args:
        size: side of the slices.
        sigma_k: noise of k-space (orthonormal transform: that of an image's pixel).
        sigma_ct: noise of a line integral, in pixels times the image's units.
    """
    square = (size, size)
    maps = birdcage_maps(8, square)

    def angles(first: float, last: float, count: int) -> Tensor:
        return first + (last - first) * torch.arange(count, dtype=torch.float64) / count

    return {
        "MRI, 4x Cartesian": Task(MRI(cartesian_mask(square, 4, 0.08), real=True), sigma_k),
        "MRI, 8x Cartesian": Task(MRI(cartesian_mask(square, 8, 0.04), real=True), sigma_k),
        f"MRI, {size // 6} spokes": Task(MRI(radial_mask(square, size // 6), real=True), sigma_k),
        "MRI, 8 coils, 4x": Task(MultiCoilMRI(cartesian_mask(square, 4, 0.08), maps, real=True), sigma_k),
        "MRI, 8 coils, 8x": Task(MultiCoilMRI(cartesian_mask(square, 8, 0.04), maps, real=True), sigma_k),
        f"CT, {size // 4} views": Task(Radon(angles(0, 180, size // 4), size), sigma_ct),
        f"CT, {size // 12} views": Task(Radon(angles(0, 180, size // 12), size), sigma_ct),
        f"CT, {size // 4} views of 120 degrees": Task(Radon(angles(-60, 60, size // 4), size), sigma_ct),
    }


class StationaryPrior:
    """``x ~ N(m, F^* diag(P) F)`` for images ``(B, 1, H, W)``.

    Args:
        slices: ``(n, 1, H, W)`` that mean and power spectrum are taken from.
        floor: smallest power, of the largest: a spectrum of few slices has holes by chance.
    """

    def __init__(self, slices: Tensor, floor: float = 1e-8) -> None:
        self.mean = float(slices.mean())
        power = torch.fft.fft2(slices - self.mean, norm="ortho").abs().square().mean((0, 1))
        self.power = power.clamp_min(floor * float(power.max()))

    def filtered(self, gain: Tensor, x: Tensor) -> Tensor:
        """``F^* diag(gain) F x`` for a real, even gain."""
        return torch.fft.ifft2(gain * torch.fft.fft2(x)).real

    def fourier_diagonal(self, A: LinearOperator, like: Tensor, probes: int = 4) -> Tensor:
        """Diagonal of ``F A^T A F^*``, ``(H, W)``, from random images: exact when ``A^T A`` is a convolution."""
        z = seeded_noise(torch.Size((probes, *like.shape[1:])), 0, like)
        f, g = torch.fft.fft2(z), torch.fft.fft2(A.adjoint(A(z)))
        both = torch.stack([(f.conj() * g).real, f.abs().square()]).sum((1, 2))
        both = both + both.flip((1, 2)).roll((1, 1), (1, 2))  # the spectrum of real images is even
        return (both[0] / both[1]).clamp_min(0)

    def solve(self, A: LinearOperator, sigma_y: float, h: Tensor, tolerance: float = 1e-3) -> Solution:
        """``M^-1 h`` with its iterations, to the whitened error ``sqrt(e^T M e / n)``."""
        precision = 1 / self.power
        root = (precision + self.fourier_diagonal(A, h) / sigma_y**2).rsqrt()
        # M >= C^-1, so in the coordinates of D no eigenvalue is below this.
        least = (root.square() * precision).min().reshape(1, 1, 1, 1)

        def rest(u: Tensor) -> Tensor:
            x = self.filtered(root, u)
            return self.filtered(root, self.filtered(precision, x) + A.adjoint(A(x)) / sigma_y**2) - least * u

        one = torch.ones_like(least)
        found = conjugate_gradients(
            rest, self.filtered(root, h), least, one, unit=one, tolerance=tolerance, max_iterations=2000
        )
        return Solution(self.filtered(root, found.x), found.iterations, found.bound, found.converged)

    def estimate(self, A: LinearOperator, y: Tensor, sigma_y: float) -> Solution:
        """``E[x | y]``."""
        shape = (y.shape[0], *A.signal_shape(y.shape[1:]))
        h = A.adjoint(y - A(torch.full(shape, self.mean).to(y))) / sigma_y**2
        found = self.solve(A, sigma_y, h)
        return Solution(self.mean + found.x, found.iterations, found.bound, found.converged)

    def sample(self, A: LinearOperator, mean: Tensor, y: Tensor, sigma_y: float, seed: int = 0) -> Tensor:
        """A sample of ``x | y`` around its mean, exact up to the solve's tolerance."""
        z, n = seeded_noise(mean.shape, seed, mean), seeded_noise(y.shape, seed + 1, y)
        observed = A.observed(y)
        n = n if observed is None else n * observed
        return mean + self.solve(A, sigma_y, self.filtered(self.power.rsqrt(), z) + A.adjoint(n) / sigma_y).x


def measure_task(task: Task, prior: StationaryPrior, x_0: Tensor) -> tuple[dict[str, Any], list[Tensor]]:
    """Figures of one task over all slices, and its pictures: classical, linear, sample."""
    A, s = task.A, task.sigma_y
    y = measure(A, x_0, s, seed=0)
    began = time.perf_counter()
    linear = prior.estimate(A, y, s)
    seconds = time.perf_counter() - began
    drawn = prior.sample(A, linear.x, y, s, seed=1)
    classical = task.classical(y)
    count = float(A.measurement_count(y).sum())

    def whitened(x: Tensor) -> float:
        return float((residual_squares(A, x, y, s).sum() / count).sqrt())

    pictures = [classical, linear.x, drawn]
    row: dict[str, Any] = {"sigma_y": s, "slices": len(x_0), "solver": A.solver}
    for name, x in zip(("classical", "linear", "sample"), pictures, strict=True):
        row[f"psnr_{name}"] = float(psnr(x, x_0).mean())
        row[f"residual_{name}"] = whitened(x)
    row["residual_truth"] = whitened(x_0)
    row["mse_ratio_sample"] = float(mse(drawn, x_0).mean() / mse(linear.x, x_0).mean())
    row |= {"iterations": linear.iterations, "bound": float(linear.bound.max())}
    row["seconds_per_slice"] = seconds / len(x_0)
    return row, pictures


def sheet(rows: Sequence[Sequence[Tensor]]) -> Image.Image:
    """Grey pictures ``(H, W)`` in [-1, 1] side by side, in 32 levels: noise compresses badly."""
    tiles = torch.stack([torch.stack([t.clamp(-1, 1) for t in row]) for row in rows])
    levels = ((tiles + 1) / 2 * 31).round() / 31 * 255
    picture = levels.permute(0, 2, 1, 3).flatten(2).flatten(0, 1).byte().numpy()
    return Image.fromarray(picture).quantize(32)


def table(report: dict[str, dict[str, Any]]) -> str:
    """The report as a Markdown table."""
    columns = {
        "psnr_classical": "classical (dB)", "psnr_linear": "linear", "psnr_sample": "sample",
        "residual_classical": "residual: classical", "residual_linear": "linear", "residual_sample": "sample",
        "mse_ratio_sample": "MSE sample / linear", "iterations": "iterations", "seconds_per_slice": "s per slice",
    }  # fmt: skip
    return markdown_table(["task", *columns.values()], [[name, *[r[c] for c in columns]] for name, r in report.items()])


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m posteriori.bench.science", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("slices", help=".npz with an array `images`: bytes (n, H, W)")
    parser.add_argument("--out", required=True, type=Path, help="folder for results")
    parser.add_argument("--size", type=int, help="side of the square cut from the middle; the whole when left out")
    parser.add_argument("--limit", type=int, default=8, help="this many odd-numbered slices, evenly spread")
    parser.add_argument("--tasks", default="", help="only those whose name contains this")
    parser.add_argument(
        "--picture", default="", help="tasks in the picture: names that contain one of these, split at semicolons"
    )
    args = parser.parse_args(arguments)
    slices = read_slices(args.slices, args.size)
    odd = slices[1::2]
    chosen = odd[[i * len(odd) // args.limit for i in range(args.limit)]] if args.limit < len(odd) else odd
    prior = StationaryPrior(slices[::2])
    report, pictures = {}, []
    for name, task in tasks(slices.shape[-1]).items():
        if args.tasks not in name:
            continue
        report[name], found = measure_task(task, prior, chosen)
        say(f"{name}: {json.dumps(report[name])}")
        if any(part in name for part in args.picture.split(";")):
            middle = len(chosen) // 2
            pictures.append([x[middle, 0] for x in (*found, chosen)])
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out / "science.json", json.dumps(report, indent=1).encode())
    if pictures:
        sheet(pictures).save(args.out / "science.png", optimize=True)
    say("\n" + table(report))


if __name__ == "__main__":
    main()
