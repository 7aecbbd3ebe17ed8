r"""Transitions of the sampler: one step of the probability flow each, written in ``u = x_t/alpha_t`` and
``q = sigma_t/alpha_t``, where it is the same equation for every interpolant,

    du/dq = (u - D(u, q)) / q,      D(u, q) = E[x_0 | x_t, y].

A transition is a pure function ``(state, next q, mean, noise) -> state``; ``mean(u, q)`` is one evaluation of ``D``.
:mod:`posteriori.exponential` holds the one that knows the measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

Solver = Literal["exponential", "dpmpp", "euler", "heun", "ddim", "stochastic"]

__all__ = [
    "Mean", "Noise", "Solver", "State", "Transition", "ddim", "dpmpp", "euler", "evaluations_for", "heun", "steps_for",
    "stochastic",
]  # fmt: skip


@dataclass(frozen=True)
class State:
    """Where a batch is, ``u`` at noise ``q``, and what a multistep transition remembers.

    ``history`` holds ``(q, value)`` of earlier steps, the last one first; what the value is, is the transition's own.
    """

    u: Tensor
    q: float
    previous_mean: Tensor | None = None
    previous_q: float | None = None
    history: tuple[tuple[float, Tensor], ...] = ()


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
        weight = math.log(state.q / q) / (2 * math.log(state.previous_q / state.q))
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


def steps_for(solver: Solver, nfe: int) -> int:
    """Steps that spend at most ``nfe`` evaluations (Heun spends two a step and one on the last)."""
    return max((nfe + 1) // 2, 1) if solver in ("heun", "stochastic") else nfe


def evaluations_for(solver: Solver, nfe: int) -> int:
    """Evaluations that :func:`sample` spends on every sample when it may spend ``nfe``."""
    return 2 * steps_for(solver, nfe) - 1 if solver in ("heun", "stochastic") else nfe
