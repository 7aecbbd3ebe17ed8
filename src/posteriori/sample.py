r"""Sampling: one loop over a decreasing time grid, with the transition as a pure function.

With ``u = x_t/alpha_t`` and ``q = sigma_t/alpha_t`` the probability flow of every interpolant is the same equation

    du/dq = E[noise | x_t, y] = (u - E[x_0 | x_t, y]) / q,

so a transition is written once, in ``(u, q)``, and the schedule only decides which ``q`` are visited. The conditional
mean comes from the exact posterior score; nothing else changes when a measurement is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Literal, overload

import torch
from torch import Tensor

from posteriori.denoise import ExactPosterior, Posterior
from posteriori.pivot import sample_generator
from posteriori.schedule import Spacing

Solver = Literal["dpmpp", "euler", "heun", "ddim", "stochastic"]

__all__ = ["Trajectory", "evaluations_for", "sample", "steps_for"]


@dataclass(frozen=True)
class State:
    """Where a batch is: ``u`` at noise ``q``, and what a multistep transition remembers."""

    u: Tensor
    q: float
    previous_mean: Tensor | None = None
    previous_q: float | None = None


Mean = Callable[[Tensor, float], Tensor]  # (u, q) -> E[x_0 | u at q, y]
Noise = Callable[[], Tensor]
Transition = Callable[[State, float, Mean, Noise], State]


def euler(state: State, q: float, mean: Mean, noise: Noise) -> State:
    """First order; equals deterministic DDIM (Song et al. 2021, eq. 12 with eta = 0)."""
    d = mean(state.u, state.q)
    return State(d + (q / state.q) * (state.u - d), q)


def heun(state: State, q: float, mean: Mean, noise: Noise) -> State:
    """Second order, two evaluations but for the last step (Karras et al. 2022, algorithm 1)."""
    slope = (state.u - mean(state.u, state.q)) / state.q
    u = state.u + (q - state.q) * slope
    if q == 0:
        return State(u, q)
    return State(state.u + (q - state.q) * 0.5 * (slope + (u - mean(u, q)) / q), q)


def dpmpp(state: State, q: float, mean: Mean, noise: Noise) -> State:
    """DPM-Solver++(2M): second order with one evaluation (Lu et al. 2022, algorithm 2), in data prediction.

    In ``(u, q)`` with ``h = log(q_t/q_s)``: ``u_s = (q_s/q_t) u_t + (1 - q_s/q_t) D``, ``D`` extrapolated from the last
    two means. The first step and the one to noise 0 are of first order, where ``h`` does not exist.
    """
    d = mean(state.u, state.q)
    extrapolated = d
    if state.previous_mean is not None and state.previous_q is not None and q > 0:
        h_last = _log(state.previous_q / state.q)
        weight = _log(state.q / q) / (2 * h_last)
        extrapolated = d + weight * (d - state.previous_mean)
    return State(extrapolated + (q / state.q) * (state.u - extrapolated), q, d, state.q)


def ddim(eta: float) -> Transition:
    """DDIM with fresh noise (Song et al. 2021, eq. 16 in ``(u, q)``); ``eta = 1`` is ancestral (DDPM) sampling."""

    def step(state: State, q: float, mean: Mean, noise: Noise) -> State:
        d = mean(state.u, state.q)
        # Ancestral variance of q(u_s | u_t, x_0); what is left of q^2 keeps the direction of the predicted noise.
        fresh = eta * q * max(1 - (q / state.q) ** 2, 0.0) ** 0.5
        kept = max(q**2 - fresh**2, 0.0) ** 0.5
        u = d + (kept / state.q) * (state.u - d)
        return State(u + fresh * noise() if fresh > 0 else u, q)

    return step


def stochastic(churn: float, steps: int, low: float = 0.05, high: float = 50.0, inflation: float = 1.003) -> Transition:
    """Heun with added noise before every step (Karras et al. 2022, algorithm 2)."""

    def step(state: State, q: float, mean: Mean, noise: Noise) -> State:
        gamma = min(churn / steps, 2**0.5 - 1) if low <= state.q <= high else 0.0
        if gamma > 0:
            raised = state.q * (1 + gamma)
            u = state.u + (raised**2 - state.q**2) ** 0.5 * inflation * noise()
            state = replace(state, u=u, q=raised)
        return heun(state, q, mean, noise)

    return step


def _log(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).log())


def steps_for(solver: Solver, nfe: int) -> int:
    """Steps that spend at most ``nfe`` evaluations (Heun spends two a step and one on the last)."""
    return max((nfe + 1) // 2, 1) if solver in ("heun", "stochastic") else nfe


def evaluations_for(solver: Solver, nfe: int) -> int:
    """Evaluations that :func:`sample` spends on every sample when it may spend ``nfe``."""
    return 2 * steps_for(solver, nfe) - 1 if solver in ("heun", "stochastic") else nfe


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
    solver: Solver = ..., spacing: Spacing = ..., rho: float = ..., eta: float = ..., churn: float = ...,
    batch_size: int = ..., progress: bool | Callable[[int], None] = ..., return_trajectory: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def sample(
    posterior: ExactPosterior, n: int = ..., nfe: int = ..., seed: int | Sequence[int] = ..., *,
    solver: Solver = ..., spacing: Spacing = ..., rho: float = ..., eta: float = ..., churn: float = ...,
    batch_size: int = ..., progress: bool | Callable[[int], None] = ..., return_trajectory: Literal[True],
) -> Trajectory: ...  # fmt: skip
@torch.no_grad()
def sample(
    posterior: ExactPosterior,
    n: int = 1,
    nfe: int = 20,
    seed: int | Sequence[int] = 0,
    *,
    solver: Solver = "dpmpp",
    spacing: Spacing = "karras",
    rho: float = 7.0,
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
        nfe: network evaluations per sample; 1 gives the posterior mean.
        seed: one number, or one per measurement. Sample ``k`` of measurement ``b`` has a generator of its own, so
            neither ``n``, ``B`` nor ``batch_size`` changes it (up to rounding).
        solver: ``"dpmpp"`` (DPM-Solver++ 2M, default), ``"euler"``, ``"heun"``, ``"ddim"`` (with ``eta``) or
            ``"stochastic"`` (EDM's, with ``churn``).
        spacing, rho: of the time grid, see :meth:`Schedule.grid`.
        eta: DDIM's fresh noise, 0 to 1.
        churn: EDM's S_churn.
        batch_size: samples evaluated at once, at least ``B``; bounds the memory.
        progress: show a progress bar, or a function called after every step with the evaluations just spent on each
            measurement: ``n * evaluations_for(solver, nfe)`` in all.
        return_trajectory: return a :class:`Trajectory` instead of the samples alone.

    Returns:
        ``(n, B, *signal)`` in the precision of the measurement.

    Raises:
        ValueError: on a non-positive ``n`` or ``nfe``, an unknown solver or as many seeds as do not fit.
    """
    if n < 1 or nfe < 1:
        raise ValueError(f"n and nfe must be at least 1, got n={n} and nfe={nfe}")
    transitions: dict[str, Transition] = {
        "euler": euler,
        "heun": heun,
        "dpmpp": dpmpp,
        "ddim": ddim(eta),
        "stochastic": stochastic(churn, steps_for("stochastic", nfe)),
    }
    if solver not in transitions:
        raise ValueError(f"unknown solver {solver!r}: choose one of {', '.join(transitions)}")
    batch = posterior.shape[0]
    seeds = [int(seed)] * batch if isinstance(seed, int | Integral) else [int(s) for s in seed]
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds do not fit a batch of {batch}: give one number, or one for each")
    grid = posterior.schedule.grid(steps_for(solver, nfe), spacing, rho)
    shared_seed = isinstance(seed, int | Integral)  # NumPy's integers too
    tied = posterior.A.samples(len(posterior.shape)) is not None
    at_once = 1 if tied else max(1, min(n, batch_size // batch))
    parts = []
    with _progress_bar(progress, n * evaluations_for(solver, nfe)) as advance:
        for start in range(0, n, at_once):
            copies = range(start, min(start + at_once, n))
            problem = posterior if len(copies) == 1 else posterior.expand(len(copies))
            # With one seed for all, measurement b has the stream (seed, b, k); with its own seed, (seed_b, 0, k).
            generators = [sample_generator(seeds[b], b if shared_seed else 0, k) for k in copies for b in range(batch)]
            track = _run(problem, grid, transitions[solver], generators, len(copies), advance, return_trajectory)
            parts.append(track)
    samples = torch.cat([p.samples for p in parts])
    if not return_trajectory:
        return samples
    return Trajectory(
        samples,
        torch.cat([p.x_t for p in parts], 1),
        torch.cat([p.means for p in parts], 1),
        grid,
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
