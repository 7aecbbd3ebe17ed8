r"""Time, error and memory of the pivot's solve against deepinv's proximal step on the same operator.

    OMP_NUM_THREADS=1 python -m posteriori.bench.solve_speed --out solve-speed.jsonl      (needs deepinv)

Both solve ``(sigma_y^2 I + sigma_t^2 A^T A) mu = sigma_y^2 x_t + sigma_t^2 A^T y`` in float32: ``gram_solve`` here,
``prox_l2(x_t, y, gamma = sigma_t^2/sigma_y^2)`` there. Errors are whitened,
``sqrt((|e/sigma_t|^2 + |A e/sigma_y|^2)/n)``, against a float64 solve whose own error is bounded by
``sigma_t |rho| / sqrt(n)`` and reported. Where deepinv iterates it gets the solver and the fewest iterations that reach
our error, or come within a tenth of the smallest error that it reaches at all.

Times are taken in turn, ours and theirs, so that a busy machine slows both: what is reported is the ratio of each
turn, its median and range. Shares are of one evaluation of the bundled network in bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posteriori.adapters import from_deepinv
from posteriori.bench.common import HalfPrecision, Results, markdown_table, say
from posteriori.checkpoint import load
from posteriori.denoise import NetworkDenoiser
from posteriori.operators import LinearOperator, Matrix, gaussian_taps, motion_kernel
from posteriori.operators.profiling import peak_memory
from posteriori.tasks import random_mask

__all__ = ["Case", "cases", "compare", "main", "tune", "whitened_error"]

SIGMA_Y = 0.05
SIGMA_T = (1.0, 80.0)
ITERATIONS = (2, 5, 10, 20, 50, 100, 200, 500, 1000)


@dataclass(frozen=True)
class Case:
    """One operator in both libraries. ``iterative``: deepinv has no closed form for it."""

    name: str
    physics: Any
    ours: LinearOperator
    shape: tuple[int, ...]
    iterative: bool


@dataclass(frozen=True)
class Problem:
    """Noisy signal and measurement of one comparison, with the float64 pivot and the bound on its whitened error."""

    x_t: Tensor
    y: Tensor
    sigma_t: float
    exact: Tensor
    certificate: float


def cases(size: int) -> list[Case]:
    """The operators, for images of ``size``."""
    from deepinv import physics as p

    shape, rng = (3, size, size), np.random.default_rng(0)
    taps = torch.tensor(gaussian_taps(3.0, 25))
    physics = {
        "random mask, 70 % missing": (p.Inpainting(shape, random_mask((size, size), 0.7, rng)), False),
        "motion blur, circular": (p.BlurFFT(shape, motion_kernel(61)[None, None]), False),
        "Gaussian blur 3, reflect": (p.Blur(torch.outer(taps, taps)[None, None], "reflect", use_fft=True), True),
        "x4 box, circular": (p.Downsampling(shape, torch.full((1, 1, 4, 4), 1 / 16), 4), False),
        "x4 bicubic, reflect": (p.Downsampling(shape, "bicubic", 4, padding="reflect"), True),
        "grayscale": (p.Decolorize(), False),
    }
    found = [Case(name, q, from_deepinv(q, shape), shape, iterative) for name, (q, iterative) in physics.items()]
    matrix = torch.from_numpy(rng.standard_normal((512, 1024))).float() / 32
    small = (1, 32, 32)
    dense = p.LinearPhysics(
        A=lambda x, **_: x.flatten(1) @ matrix.T, A_adjoint=lambda y, **_: (y @ matrix).reshape(-1, *small)
    )
    return [
        *[c for c in found if c.ours.exact],
        Case("dense 512x1024 (1x32x32)", dense, Matrix(matrix, small), small, True),
    ]


def problem(case: Case, batch: int, sigma_t: float, seed: int = 0) -> Problem:
    """Signals in [-1, 1] measured at ``SIGMA_Y``."""
    generator = torch.Generator().manual_seed(seed)
    A, v_y, v_t = case.ours, SIGMA_Y**2, sigma_t**2
    x_0 = torch.rand(batch, *case.shape, generator=generator) * 2 - 1
    y = A(x_0)
    y = y + SIGMA_Y * torch.randn(y.shape, generator=generator)
    observed = A.observed(y)
    y = y if observed is None else y * observed
    x_t = x_0 + sigma_t * torch.randn(x_0.shape, generator=generator)
    x, b = x_t.double(), y.double()
    exact = A.gram_solve(v_y, v_t, v_y * x, v_t * b, unit=v_y * v_t)
    rho = (x - exact) / v_t + A.adjoint(b - A(exact)) / v_y
    certificate = sigma_t * float(rho.flatten(1).norm(dim=1).max()) / x[0].numel() ** 0.5
    return Problem(x_t, y, sigma_t, exact, certificate)


def whitened_error(A: LinearOperator, p: Problem, mu: Tensor) -> float:
    """Largest of the batch."""
    e = mu.double() - p.exact
    parts = (e / p.sigma_t).flatten(1).square().sum(1) + (A(e) / SIGMA_Y).flatten(1).square().sum(1)
    return float((parts / e[0].numel()).sqrt().max())


def ours(case: Case, p: Problem) -> Tensor:
    v_y, v_t = SIGMA_Y**2, p.sigma_t**2
    return case.ours.gram_solve(v_y, v_t, v_y * p.x_t, v_t * p.y, unit=v_y * v_t)


def theirs(case: Case, p: Problem, options: dict[str, Any]) -> Tensor:
    result: Tensor = case.physics.prox_l2(p.x_t, p.y, p.sigma_t**2 / SIGMA_Y**2, **options)
    return result


def tune(case: Case, p: Problem, target: float, seconds: float) -> dict[str, Any]:
    """Solver and fewest iterations with which deepinv reaches ``target``, or comes within a tenth of the smallest error
    that it reaches with calls of at most ``seconds``. Empty where it has a closed form."""
    if not case.iterative:
        return {}
    tried: list[tuple[float, float, dict[str, Any]]] = []
    for solver in ("CG", "lsqr"):
        for iterations in ITERATIONS:
            options = {"solver": solver, "max_iter": iterations, "tol": 1e-12}
            began = time.perf_counter()
            error = whitened_error(case.ours, p, theirs(case, p, options))
            spent = time.perf_counter() - began
            tried.append((spent, error if error == error else float("inf"), options))
            if error <= target or spent > seconds:
                break
    goal = max(target, 1.1 * min(error for _, error, _ in tried))
    return min((t for t in tried if t[1] <= goal), key=lambda t: t[0])[2]


def milliseconds(function: Callable[[], object], count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        function()
    return 1e3 * (time.perf_counter() - began) / count


def compare(case: Case, batch: int, sigma_t: float, turns: int, options: dict[str, Any]) -> dict[str, Any]:
    """Both solves in turn."""
    p = problem(case, batch, sigma_t)
    solves = (lambda: ours(case, p), lambda: theirs(case, p, options))
    errors = [whitened_error(case.ours, p, solve()) for solve in solves]
    counts = [max(1, min(100, round(20 / milliseconds(solve, 1)))) for solve in solves]  # 20 ms a turn or more
    times = np.array([[milliseconds(s, c) for s, c in zip(solves, counts, strict=True)] for _ in range(turns)])
    ratios = times[:, 1] / times[:, 0]
    return {
        "ours_ms": float(np.median(times[:, 0])), "deepinv_ms": float(np.median(times[:, 1])),
        "ratio": float(np.median(ratios)), "ratio_min": float(ratios.min()), "ratio_max": float(ratios.max()),
        "ours_error": errors[0], "deepinv_error": errors[1], "reference": p.certificate, "turns": turns, **options,
    }  # fmt: skip


def network_times(size: int, batch: int, A: LinearOperator, repeats: int = 3) -> dict[str, float]:
    """Milliseconds of the bundled network alone, and of all else in one evaluation of the denoiser with ``A``."""
    denoiser = load("photo")
    assert isinstance(denoiser, NetworkDenoiser)
    backbone = HalfPrecision(denoiser.backbone)
    x_0 = torch.zeros(batch, 3, size, size)
    y, x_t = A(x_0), torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    network, rest = [], []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        prepared = denoiser.prepare(x_t, 1.0, A, y, SIGMA_Y)
        middle = time.perf_counter()
        prediction = backbone(prepared.inputs, prepared.c_noise, prepared.conditioning)
        after = time.perf_counter()
        prepared.out(prediction)
        network.append(1e3 * (after - middle))
        rest.append(1e3 * (middle - began + time.perf_counter() - after))
    return {"network_ms": statistics.median(network[1:]), "rest_ms": statistics.median(rest[1:])}


def memory(size: int) -> dict[str, dict[str, float]]:
    """``mib``: what the first solve of every case takes in MiB, factors that it keeps included."""
    found = {}
    for case in cases(size):
        p = problem(case, 1, 1.0)
        found[case.name] = peak_memory(partial(ours, case, p))
    return {"mib": found}


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    network = {r["batch"]: r["network_ms"] for r in rows if r["kind"] == "network"}
    lines = []
    for r in (r for r in rows if r["kind"] == "solve"):
        how = f"{r['solver']}, {r['max_iter']}" if "solver" in r else "closed form"
        share = f"{100 * r['ours_ms'] / network[r['batch']]:.2f} %" if r["image"] else "-"
        ratio = f"{r['ratio']:.3g} ({r['ratio_min']:.3g} to {r['ratio_max']:.3g})"
        errors = [f"{r[k]:.1e}" for k in ("ours_error", "deepinv_error")]
        times = [f"{r[k]:.3g}" for k in ("ours_ms", "deepinv_ms")]
        lines.append([r["operator"], how, r["batch"], f"{r['sigma_t']:g}", *times, ratio, *errors, share])
    header = ["operator", "deepinv", "batch", "sigma_t", "ours, ms", "deepinv, ms", "ratio (range)", "our error",
              "its error", "share of network"]  # fmt: skip
    parts = [markdown_table(header, lines, 2)]
    evaluation = [r for r in rows if r["kind"] == "network"]
    if evaluation:
        cells = [
            [r["operator"], r["batch"], f"{r['network_ms']:.0f}", f"{r['rest_ms']:.1f}",
             f"{100 * r['rest_ms'] / r['network_ms']:.2f} %"] for r in evaluation
        ]  # fmt: skip
        parts.append(markdown_table(["operator", "batch", "network, ms", "all else, ms", "all else / network"], cells))
    held = [r for r in rows if r["kind"] == "memory"]
    if held:
        sizes = [r["size"] for r in held]
        names = [n for n in held[0]["mib"] if "dense" not in n]
        cells = [
            [n, *[f"{r['mib'][n]:.1f}" for r in held], f"{held[-1]['mib'][n] / held[0]['mib'][n]:.1f}"] for n in names
        ]
        parts.append(markdown_table(["operator", *[f"{s}x{s}, MiB" for s in sizes], "ratio"], cells))
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; rows that the file already has are not measured again."""
    parser = argparse.ArgumentParser(
        "python -m posteriori.bench.solve_speed", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--size", type=int, default=256, help="side of the images")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=3.0, help="longest call that deepinv is tuned to, one image")
    parser.add_argument("--operators", default="", help="only those whose name contains this")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    args = parser.parse_args(arguments)
    try:
        import deepinv  # noqa: F401
    except ImportError as error:
        say(f"this comparison needs deepinv ({error}): pip install 'posteriori[deepinv]'")
        return 2
    results = Results(args.out, ("kind", "operator", "batch", "sigma_t", "size"))
    rows = []
    with torch.no_grad():
        for size in (args.size // 2, args.size):
            rows.append(results.get(partial(memory, size), kind="memory", size=size))
        chosen = [c for c in cases(args.size) if args.operators in c.name]
        for case in chosen:
            for batch in args.batches if case.shape[0] == 3 else ():
                times = results.get(
                    partial(network_times, args.size, batch, case.ours),
                    kind="network", operator=case.name, batch=batch, size=args.size,
                )  # fmt: skip
                rows.append(times)
                say(f"{case.name}, batch {batch}: network {times['network_ms']:.0f} ms, rest {times['rest_ms']:.1f} ms")
        for case in chosen:
            for sigma_t in SIGMA_T:
                options: dict[str, Any] | None = None
                for batch in args.batches:

                    def measure(case: Case = case, sigma_t: float = sigma_t, batch: int = batch) -> dict[str, Any]:
                        nonlocal options
                        if options is None:
                            one = problem(case, 1, sigma_t)
                            options = tune(case, one, whitened_error(case.ours, one, ours(case, one)), args.seconds)
                        return {**compare(case, batch, sigma_t, args.turns, options), "image": case.shape[0] == 3}

                    row = results.get(
                        measure, kind="solve", operator=case.name, batch=batch, sigma_t=sigma_t, size=args.size
                    )
                    rows.append(row)
                    say(
                        f"{case.name}, batch {batch}, sigma_t {sigma_t:g}: {row['ours_ms']:.3g} against "
                        f"{row['deepinv_ms']:.3g} ms, errors {row['ours_error']:.1e} and {row['deepinv_error']:.1e}"
                    )
    say("\n" + tables(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
