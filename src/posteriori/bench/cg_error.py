r"""Iterative solves beside the truth: whitened error of the pivot, the bound that was returned, and what it cost.

    python -m posteriori.bench.cg_error --out FILE [--size 64] [--operators NAME]

The truth is a dense eigendecomposition ``A^T A = V diag(lam) V^T`` in float64, with which everything is a sum:

    |e|^2 whitened = sum_i (a + b lam_i) (V^T e)_i^2 / (unit n),      a = sigma_y^2,  b = sigma_t^2,  unit = a b

For every pair of noise levels: the error of the pivot and its bound. Then what iterations alone need, ``A`` not being
taken apart: without a preconditioner, with the operator's surrogate, and with the linear estimate as a guess, as the
denoiser does it. Then, at sigma_y = 0.05, one
evaluation of a denoiser (without its network) with ``spectral`` and with ``scalar`` preconditioning: seconds, and the
dimension, the estimated and the true error of the Lanczos processes. Add an operator to :func:`operators`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posteriori.bench.common import markdown_table, say
from posteriori.checkpoint import write_atomically
from posteriori.denoise import NetworkDenoiser, Preconditioning
from posteriori.operators import (
    KrylovOperator,
    MultiCoilMRI,
    PaddedConvolution,
    Radon,
    birdcage_maps,
    cartesian_mask,
    motion_kernel,
)
from posteriori.operators.base import SpectralFunction
from posteriori.pivot import linear_estimate, measure, noise_variance
from posteriori.priors import dense_matrix
from posteriori.scaling import Scaling
from posteriori.schedule import VE

__all__ = ["SIGMA_T", "SIGMA_Y", "errors", "evaluations", "main", "operators"]

SIGMA_Y = (1e-3, 1e-2, 0.05, 0.5)
SIGMA_T = (0.002, 0.1, 1.0, 10.0, 80.0)
F64 = torch.float64

#: Whitened error of the truth itself at the hardest levels: eps |A^T A| |x_t| sigma_t / sigma_y^2.
ROUNDING = 1e-5


def operators(size: int) -> dict[str, tuple[Callable[[], KrylovOperator], tuple[int, ...]]]:
    """Makers of iterative operators with the shape of their signals; the dense truth is cubic in its size."""
    half = size // 2
    return {
        f"motion blur {size // 2 - 1} taps, reflect, {size}x{size}": (
            lambda: PaddedConvolution(motion_kernel(size // 2 - 1, 0.5, 0).double()),
            (1, size, size),
        ),
        f"CT, 30 angles, {half}x{half}": (lambda: Radon(torch.arange(30) * 6.0, half), (1, half, half)),
        f"MRI, 4 coils, x4, {half}x{half}": (
            lambda: MultiCoilMRI(cartesian_mask(half, 4), birdcage_maps(4, half)),
            (2, half, half),
        ),
    }


class Truth:
    """``A^T A`` taken apart."""

    def __init__(self, A: KrylovOperator, shape: tuple[int, ...]) -> None:
        matrix = dense_matrix(A, shape, 1, torch.zeros(1, dtype=F64))[0]
        lam, self.vectors = torch.linalg.eigh(matrix.T @ matrix)
        self.lam, self.matrix = lam.clamp_min(0), matrix

    def solve(self, a: float, b: float, rhs: Tensor) -> Tensor:
        return self.vectors @ ((self.vectors.T @ rhs.flatten()) / (a + b * self.lam))

    def whitened(self, e: Tensor, a: float, b: float) -> float:
        c = self.vectors.T @ e.flatten()
        return float(((a + b * self.lam) * c.square()).sum().div(a * b * c.numel()).sqrt())

    def function(self, f: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        shaped = self.lam.reshape(1, -1, *[1] * (v.ndim - 2))
        return (self.vectors @ (f(shaped).flatten() * (self.vectors.T @ v.flatten()))).reshape(v.shape)


def signal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """A smooth random signal about in [-1, 1], ``(1, *shape)``."""
    noise = torch.rand(1, shape[0], shape[1] + 4, shape[2] + 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.avg_pool2d(noise.double(), 5, 1) * 6 - 3


def errors(
    make: Callable[[], KrylovOperator], shape: tuple[int, ...], truth: Truth, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Error, bound and iterations of the pivot in float64, for every pair of noise levels."""
    A, plain, iterative = make(), make(), make()
    plain.surrogate = lambda like: None  # type: ignore[method-assign]
    plain.dense_entries = iterative.dense_entries = 0
    generator = torch.Generator().manual_seed(seed)
    x_0 = signal(shape, seed)
    for sigma_y in SIGMA_Y:
        y = measure(A, x_0, sigma_y, seed=seed)
        for sigma_t in SIGMA_T:
            x_t = x_0 + sigma_t * torch.randn(x_0.shape, generator=generator, dtype=F64)
            a, b = sigma_y**2, sigma_t**2
            system = (a, b, a * x_t, b * y)
            began = time.perf_counter()
            found = A.solve(*system, unit=a * b)
            seconds = time.perf_counter() - began
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                guess = linear_estimate(x_t, y, A, alpha_t=1.0, sigma_t=sigma_t, sigma_y=sigma_y, prior_std=0.5)
            exact = truth.solve(a, b, a * x_t.flatten() + b * truth.matrix.T @ y.flatten())
            yield {
                "sigma_y": sigma_y, "sigma_t": sigma_t,
                "error": truth.whitened(found.x.flatten() - exact, a, b), "bound": float(found.bound),
                "iterations": found.iterations, "seconds": seconds,
                "plain": plain.solve(*system, unit=a * b).iterations,
                "surrogate": iterative.solve(*system, unit=a * b).iterations,
                "guess": iterative.solve(*system, unit=a * b, guess=guess).iterations,
            }  # fmt: skip


class _Silent(nn.Module):
    """A network that costs nothing."""

    def forward(self, inputs: Tensor, c_noise: Tensor, conditioning: object) -> Tensor:
        return inputs


def evaluations(
    A: KrylovOperator, shape: tuple[int, ...], truth: Truth, sigma_y: float = 0.05, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Cost of one evaluation of a denoiser without its network, by either preconditioning."""
    x_0, scaling = signal(shape, seed), Scaling()
    y = measure(A, x_0, sigma_y, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for sigma_t in SIGMA_T:
        noise = torch.randn(x_0.shape, generator=generator, dtype=F64)
        row: dict[str, Any] = {"sigma_y": sigma_y, "sigma_t": sigma_t}
        names: tuple[Preconditioning, ...] = ("scalar", "spectral")
        for name in names:
            denoiser = NetworkDenoiser(_Silent(), VE(), scaling, name)
            began = time.perf_counter()
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                denoiser(x_0 + sigma_t * noise, sigma_t, A, y, sigma_y)
            row[f"{name}_seconds"] = time.perf_counter() - began
        variance = noise_variance(A, x_0, alpha_t=1.0, sigma_t=sigma_t, sigma_y=sigma_y)

        def of_noise(function: Callable[[Tensor], Tensor], variance: SpectralFunction = variance) -> SpectralFunction:
            return lambda lam: function(variance(lam).sqrt())

        mu = x_0 + truth.function(of_noise(lambda q: q), noise)
        for part, f, v in (("in", of_noise(scaling.input), mu), ("out", of_noise(scaling.out), noise)):
            found, exact = A.evaluate(f, v), truth.function(f, v)
            row[f"{part}_dimension"], row[f"{part}_estimate"] = found.dimension, float(found.error)
            row[f"{part}_error"] = float((found.value - exact).norm() / exact.norm())
        yield row


def _shown(error: float, bound: float) -> str:
    return f"{error:.0e} / {bound:.0e}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for every operator and sigma_y: ``error / bound (iterations)`` for every sigma_t."""
    lines = [
        [name, f"{sigma_y:g}", *[f"{_shown(r['error'], r['bound'])} ({r['iterations']})" for r in rows
                                 if (r["operator"], r["sigma_y"]) == (name, sigma_y)]]
        for name in dict.fromkeys(r["operator"] for r in rows) for sigma_y in SIGMA_Y
    ]  # fmt: skip
    return markdown_table(["operator", "sigma_y", *[f"sigma_t = {s:g}" for s in SIGMA_T]], lines, 2)


def cost_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for every operator and sigma_t."""
    header = ["operator", "sigma_t", "scalar, s", "spectral, s", "c_in: dimension", "true / estimated error",
              "c_out: dimension", "true / estimated error"]  # fmt: skip
    lines = [
        [r["operator"], f"{r['sigma_t']:g}", f"{r['scalar_seconds']:.2f}", f"{r['spectral_seconds']:.2f}",
         r["in_dimension"], _shown(r["in_error"], r["in_estimate"]),
         r["out_dimension"], _shown(r["out_error"], r["out_estimate"])]
        for r in rows
    ]  # fmt: skip
    return markdown_table(header, lines, 2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 1 when an error exceeds its bound by more than one per cent and what rounding leaves of the
    truth."""
    parser = argparse.ArgumentParser("python -m posteriori.bench.cg_error", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=int, default=64, help="side of the blurred images; the others are half as large")
    parser.add_argument("--operators", default="", help="only those whose name contains this")
    parser.add_argument("--out", type=Path, help="JSON lines with every figure")
    args = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
    for name, (make, shape) in operators(args.size).items():
        if args.operators not in name:
            continue
        began = time.perf_counter()
        truth = Truth(make(), shape)
        rows += [{"operator": name, **row} for row in errors(make, shape, truth)]
        costs += [{"operator": name, **row} for row in evaluations(make(), shape, truth)]
        mine = [r for r in rows if r["operator"] == name]
        done = [r for r in mine if r["plain"] < KrylovOperator.max_iterations]
        total = {k: sum(r[k] for r in done) for k in ("plain", "surrogate", "guess")}
        worst = max((r["error"] - ROUNDING) / r["bound"] for r in mine)
        say(
            f"{name}: at most {worst:.2f} of the bound; a surrogate saves a factor of "
            f"{total['plain'] / total['surrogate']:.2f}, a guess another "
            f"{total['surrogate'] / total['guess']:.2f} ({time.perf_counter() - began:.0f} s)"
        )
        if args.out:
            write_atomically(args.out, "".join(json.dumps(r) + "\n" for r in rows + costs).encode())
    say("\n" + table(rows) + "\n\n" + cost_table(costs))
    missed = [r for r in rows if not r["error"] <= 1.01 * r["bound"] + ROUNDING]
    for r in missed:
        say(f"missed: {r}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
