r"""Sampling: one loop over a decreasing time grid, with the transition as a pure function.

With ``u = x_t/alpha_t`` and ``q = sigma_t/alpha_t`` the probability flow of every interpolant is the same equation

    du/dq = E[noise | x_t, y] = (u - E[x_0 | x_t, y]) / q,

so a transition is written once, in ``(u, q)`` (:mod:`posteriori.solvers`, :mod:`posteriori.exponential`), and the
schedule and the grid (:mod:`posteriori.grids`) only decide which ``q`` are visited. The conditional mean comes from
the exact posterior score; nothing else changes when a measurement is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from posteriori.denoise import Posterior
from posteriori.exponential import exponential
from posteriori.grids import Grid, time_grid
from posteriori.pivot import sample_generators
from posteriori.posterior import ExactPosterior
from posteriori.solvers import (
    Mean,
    Noise,
    Solver,
    State,
    Transition,
    ddim,
    dpmpp,
    euler,
    evaluations_for,
    heun,
    steps_for,
    stochastic,
)
from posteriori.width import posterior_width

__all__ = [
    "Grid", "Mean", "Noise", "Solver", "State", "Trajectory", "Transition", "ddim", "dpmpp", "euler",
    "evaluations_for", "exponential", "heun", "sample", "steps_for", "stochastic",
]  # fmt: skip


@dataclass(frozen=True)
class Trajectory:
    """Samples with the way they came.

    Attributes:
        samples: ``(n, B, *signal)``.
        x_t: states ``x_t`` at the times ``t``, ``(steps + 1, n, B, *signal)``.
        means: ``E[x_0 | x_t, y]`` of the first evaluation of every step, ``(steps, n, B, *signal)``.
        t: times, ``(steps + 1,)``, float64.
        evaluations: network evaluations spent per sample.
    """

    samples: Tensor
    x_t: Tensor
    means: Tensor
    t: Tensor
    evaluations: int


@overload
def sample(
    posterior: ExactPosterior, n: int = ..., nfe: int = ..., seed: int | Sequence[int] = ..., *,
    solver: Solver = ..., grid: Grid | Tensor | None = ..., start: float | None = ..., stop: float | None = ...,
    rho: float | None = ..., eta: float = ..., churn: float = ...,
    batch_size: int = ..., progress: bool | Callable[[int], None] = ..., return_trajectory: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def sample(
    posterior: ExactPosterior, n: int = ..., nfe: int = ..., seed: int | Sequence[int] = ..., *,
    solver: Solver = ..., grid: Grid | Tensor | None = ..., start: float | None = ..., stop: float | None = ...,
    rho: float | None = ..., eta: float = ..., churn: float = ...,
    batch_size: int = ..., progress: bool | Callable[[int], None] = ..., return_trajectory: Literal[True],
) -> Trajectory: ...  # fmt: skip
@torch.no_grad()
def sample(
    posterior: ExactPosterior,
    n: int = 1,
    nfe: int = 8,
    seed: int | Sequence[int] = 0,
    *,
    solver: Solver = "exponential",
    grid: Grid | Tensor | None = None,
    start: float | None = None,
    stop: float | None = None,
    rho: float | None = None,
    eta: float = 1.0,
    churn: float = 40.0,
    batch_size: int = 64,
    progress: bool | Callable[[int], None] = False,
    return_trajectory: bool = False,
) -> Tensor | Trajectory:
    """Draw posterior samples.

    Args:
        posterior: the problem, with ``B`` measurements.
        n: samples of each measurement.
        nfe: network evaluations per sample, the first, which gives the mean, included; 1 gives that mean alone.
        seed: one number, or one per measurement. Sample ``k`` of measurement ``b`` has a generator of its own, so
            neither ``n``, ``B`` nor ``batch_size`` changes it (up to rounding).
        solver: ``"exponential"`` (default, :mod:`posteriori.exponential`), ``"dpmpp"`` (DPM-Solver++ 2M), ``"euler"``,
            ``"heun"``, ``"ddim"`` (with ``eta``) or ``"stochastic"`` (EDM's, with ``churn``).
        grid: ``"posterior"`` (of ``"exponential"``), ``"karras"`` (of the other solvers, as published), ``"log"``,
            ``"uniform"``, or the times themselves; with ``start``, ``stop`` and ``rho`` see
            :func:`posteriori.grids.time_grid`.
        start, stop: noise ``sigma_t/alpha_t`` of the second and the last evaluation.
        rho: exponent of the grid.
        eta: DDIM's fresh noise, 0 to 1.
        churn: EDM's S_churn.
        batch_size: samples evaluated at once, at least ``B``; bounds the memory.
        progress: show a progress bar, or a function called after every step with the evaluations just spent on each
            measurement: ``n * evaluations_for(solver, nfe)`` in all.
        return_trajectory: return a :class:`Trajectory` instead of the samples alone.

    Returns:
        ``(n, B, *signal)`` in the precision of the measurement.

    Raises:
        ValueError: on a non-positive ``n`` or ``nfe``, an unknown solver or grid, or as many seeds as do not fit.
    """
    if n < 1 or nfe < 1:
        raise ValueError(f"n and nfe must be at least 1, got n={n} and nfe={nfe}")
    transitions: dict[str, Callable[[ExactPosterior], Transition]] = {
        "exponential": exponential,
        "dpmpp": lambda _: dpmpp,
        "euler": lambda _: euler,
        "heun": lambda _: heun,
        "ddim": lambda _: ddim(eta),
        "stochastic": lambda _: stochastic(churn, steps_for("stochastic", nfe)),
    }
    if solver not in transitions:
        raise ValueError(f"unknown solver {solver!r}: choose one of {', '.join(transitions)}")
    batch = posterior.shape[0]
    sample_generators(seed, batch)  # refused before anything is computed
    s = posterior.denoiser.data_std
    if grid is None:
        grid = "posterior" if solver == "exponential" else "karras"
    width = (
        posterior_width(posterior)
        if isinstance(grid, str) and grid == "posterior" and start is None and nfe > 1
        else 0.0
    )
    times = time_grid(posterior.schedule, steps_for(solver, nfe), grid, s, width=width, start=start, stop=stop, rho=rho)
    tied = posterior.A.samples(len(posterior.shape)) is not None
    at_once = 1 if tied else max(1, min(n, batch_size // batch))
    parts = []
    with _progress_bar(progress, n * evaluations_for(solver, nfe)) as advance:
        for k in range(0, n, at_once):
            copies = range(k, min(k + at_once, n))
            problem = posterior if len(copies) == 1 else posterior.expand(len(copies))
            generators = sample_generators(seed, batch, copies)
            step = transitions[solver](problem)
            parts.append(_run(problem, times, step, generators, len(copies), advance, return_trajectory))
    samples = torch.cat([p.samples for p in parts])
    if not return_trajectory:
        return samples
    return Trajectory(
        samples,
        torch.cat([p.x_t for p in parts], 1),
        torch.cat([p.means for p in parts], 1),
        times,
        parts[0].evaluations,
    )


def _run(
    posterior: ExactPosterior,
    grid: Tensor,
    transition: Transition,
    generators: list[torch.Generator],
    copies: int,
    advance: Callable[[int], None],
    keep: bool,
) -> Trajectory:
    schedule, y = posterior.schedule, posterior.y
    signal = posterior.shape[1:]

    def noise() -> Tensor:
        return torch.stack([torch.randn(signal, generator=g, dtype=y.dtype) for g in generators]).to(y.device)

    evaluations = 0
    previous: Posterior | None = None
    means: list[Tensor] = []
    step_means: list[Tensor] = []

    def mean(u: Tensor, q: float) -> Tensor:
        nonlocal evaluations, previous
        evaluations += 1
        # The grid's own time where the step starts there; otherwise (added noise, second stage) the inverse.
        t = float(times.get(q, float(schedule.time(torch.tensor(q, dtype=torch.float64)))))
        alpha = float(schedule.alpha(torch.tensor(t, dtype=torch.float64)))
        previous = posterior.denoise(alpha * u, t, previous)
        d = previous.mean
        if keep:
            step_means.append(d)
        return d

    ratios = [float(r) for r in schedule.ratio(grid)]
    times = dict(zip(ratios, [float(t) for t in grid], strict=True))
    alphas = [float(a) for a in schedule.alpha(grid)]
    state = State(noise() * ratios[0], ratios[0])
    states = [state.u * alphas[0]] if keep else []
    for ratio, alpha in zip(ratios[1:], alphas[1:], strict=True):
        step_means.clear()
        before = evaluations
        state = transition(state, ratio, mean, noise)
        advance(copies * (evaluations - before))
        if keep:
            states.append(state.u * alpha)
            means.append(step_means[0])
    shape = (copies, -1, *signal)
    return Trajectory(
        state.u.reshape(shape),
        torch.stack(states).reshape(len(states), *shape) if keep else state.u,
        torch.stack(means).reshape(len(means), *shape) if keep else state.u,
        grid,
        evaluations,
    )


@contextmanager
def _progress_bar(progress: bool | Callable[[int], None], total: int) -> Iterator[Callable[[int], None]]:
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield lambda _: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("sampling"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("evaluations"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("sampling", total=total)
        yield lambda k: bar.advance(task, k)
