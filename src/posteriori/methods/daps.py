r"""DAPS, decoupled annealing posterior sampling (Zhang et al. 2025, arXiv 2407.01521, algorithm 1).

    x_hat = D along the probability flow from u at q           a few Euler steps
    x    <- x - h (2 A^T (A x - y)/tau^2 + (x - x_hat)/q^2) + sqrt(2 h) z,      100 times, from x_hat     (Langevin)
    u'    = x + q' z

Langevin samples ``exp(-|y - A x|^2/tau^2) N(x; x_hat, q^2 I)``. ``tau = 0.01``, the authors' value whatever the noise,
trusts a measurement with ``sigma_y = 0.05`` fifty times too much; with ``tau = sqrt(2) sigma_y`` ("calibrated") the
likelihood is that of the measurement, and ``h``, which falls a hundredfold on the way, grows with ``tau^2``.

Settings: the authors' code (github.com/zhangbingliang2019/DAPS, ``configs/task/*.yaml`` (``pixel``, ``sigma_y`` 0.05),
``configs/sampler/edm_daps.yaml``, ``cores/scheduler.py``): ``tau``, steps, ``rate``; levels from 100 to 0.1, with 0 in
place of the last, and the flow's from ``q`` to 0.01. (Their first release spent its last evaluation below 0.01.)

Deviations: levels start at the schedule's largest one where that is below 100. ``h = 1e-4`` is the largest stable step
with ``|A| = 1``, the most that the authors' operators have; where ``|A| > 1``, ``h`` is divided by ``|A|^2``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from posteriori.methods.base import Advance, Estimate, MethodError, Problem, Seed, draw
from posteriori.posterior import ExactPosterior
from posteriori.sample import Mean, Noise, State, Transition, euler

SETTINGS: dict[str, dict[str, Any]] = {"box": {"rate": 5e-5}, "motion": {"rate": 5e-5}}
HIGHEST, LOWEST, FLOW_END, RHO, TAU = 100.0, 0.1, 0.01, 7.0, 0.01
AT_ONCE = 20  # noises drawn in one call


def daps(
    posterior: ExactPosterior,
    n: int,
    nfe: int,
    seed: Seed,
    advance: Advance,
    tau: float | Literal["calibrated"] = TAU,
    rate: float = 1e-4,
    flow_steps: int = 2,
    langevin_steps: int = 100,
) -> Estimate:
    """DAPS with ``nfe / flow_steps`` annealing steps.

    Args:
        posterior, n, nfe, seed, advance: as for every method. The paper takes 50 x 2, 100 x 10 or 200 x 5 evaluations.
        tau: see the module's head.
        rate: first step ``h`` of Langevin at ``tau = 0.01``: 1e-4, or 5e-5 for a missing box and motion blur.
        flow_steps: evaluations per annealing step.
        langevin_steps: per annealing step.

    Raises:
        MethodError: when ``nfe`` is less than ``flow_steps``, or ``tau`` is calibrated without noise.
    """
    if nfe < flow_steps:
        raise MethodError(f"daps spends {flow_steps} evaluations a step, got nfe={nfe}: give at least that")
    if tau == "calibrated" and bool((torch.as_tensor(posterior.sigma_y) <= 0).any()):
        raise MethodError("the calibrated tau needs a positive sigma_y: give a tau, such as 0.01")
    schedule, steps = posterior.schedule, nfe // flow_steps
    top = min(HIGHEST, float(schedule.ratio(torch.tensor(schedule.t_max, dtype=torch.float64))))
    ratios = torch.cat([_levels(top, LOWEST, steps + 1)[:-1], torch.zeros(1, dtype=torch.float64)])

    def method(problem: Problem) -> Transition:
        temperature = problem.scalar(2**0.5 * problem.sigma_y if tau == "calibrated" else tau)
        first_step = rate * (temperature / TAU) ** 2 if tau == "calibrated" else torch.full_like(temperature, rate)
        first_step = first_step / problem.scalar(_squared_norm(problem).clamp_min(1))
        done = 0

        def step(state: State, q: float, mean: Mean, noise: Noise) -> State:
            nonlocal done
            flow = state
            for level in _levels(state.q, FLOW_END, flow_steps + 1).tolist()[1:]:
                flow = euler(flow, level, mean, noise)
            x = flow.u
            h = first_step * (1 - 0.99 * done / steps)
            for first in range(0, langevin_steps, AT_ONCE):
                for z in problem.noises(min(AT_ONCE, langevin_steps - first)):
                    pull = 2 * problem.A.adjoint(problem.residual(x)) / temperature**2 - (x - flow.u) / state.q**2
                    x = x + h * pull + (2 * h) ** 0.5 * z
            done += 1
            return State(x + q * noise() if q > 0 else x, q)

        return step

    settings = {"tau": tau, "rate": rate, "flow_steps": flow_steps, "langevin_steps": langevin_steps}
    return draw(posterior, n, seed, advance, schedule.time(ratios), method, **settings)


def _squared_norm(problem: Problem) -> torch.Tensor:
    """``|A|^2``, the largest eigenvalue of ``A^T A``, of every sample; 0 where nothing is measured."""
    v = problem.A.adjoint(problem.y)
    largest = problem.A.spectral(lambda lam: lam.amax(tuple(range(1, lam.ndim)), keepdim=True).expand_as(lam), v)
    return (largest * v).flatten(1).sum(1) / (v * v).flatten(1).sum(1).clamp_min(torch.finfo(v.dtype).tiny)


def _levels(high: float, low: float, count: int) -> torch.Tensor:
    x = torch.linspace(0, 1, count, dtype=torch.float64)
    return (high ** (1 / RHO) + x * (low ** (1 / RHO) - high ** (1 / RHO))) ** RHO
