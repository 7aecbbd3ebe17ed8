r"""DDRM, denoising diffusion restoration models (Kawar et al. 2022, arXiv 2201.11793, eqs. 7 and 8).

With ``A = U S V^T``, ``y_i = (U^T y)_i / s_i`` and its noise ``sigma_y / s_i``, the denoiser's answer ``D_i`` and fresh
normal noise ``z_i``, coefficient ``i`` of the next ``u'`` at noise ``q'`` is

    s_i = 0                 D_i + sqrt(1 - eta^2) q' (u_i - D_i)/q                    + eta q' z_i
    q' < sigma_y / s_i      D_i + sqrt(1 - eta^2) q' (y_i - D_i)/(sigma_y/s_i)        + eta q' z_i
    q' >= sigma_y / s_i     (1 - eta_b) D_i + eta_b y_i           + sqrt(q'^2 - eta_b^2 sigma_y^2/s_i^2) z_i

and the start is ``y_i`` with noise up to ``q``, or noise alone where ``q < sigma_y/s_i``: functions of ``A^T A``, one
``A.spectral`` each. An operator known through ``A`` and ``A^T`` only cannot apply rules with jumps and is refused.
Settings (github.com/bahjat-kawar/ddrm): 20 steps, eta 0.85, eta_b 1. The first level is the schedule's largest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from posteriori.methods.base import Advance, Estimate, Problem, Seed, ddpm_grid, draw, needs_spectrum
from posteriori.operators.base import per_sample
from posteriori.posterior import ExactPosterior
from posteriori.sample import Mean, Noise, State, Transition


def ddrm(
    posterior: ExactPosterior, n: int, nfe: int, seed: Seed, advance: Advance, eta: float = 0.85, eta_b: float = 1.0
) -> Estimate:
    """DDRM with ``nfe`` steps of one evaluation, uniform in DDPM's time.

    Args:
        posterior, n, nfe, seed, advance: as for every method. The paper takes 20 steps.
        eta, eta_b: see the module's head.

    Raises:
        MethodError: when the singular values of ``A`` are not at hand.
    """
    needs_spectrum(posterior.A, "ddrm")

    def method(problem: Problem) -> Transition:
        transition = spectral_transition(problem, eta, eta_b)

        def step(state: State, q: float, mean: Mean, noise: Noise) -> State:
            if problem.evaluations == 0:  # the loop starts from noise alone
                state = State(_start(problem, state), state.q)
            return transition(state, q, mean, noise)

        return step

    return draw(posterior, n, seed, advance, ddpm_grid(posterior.schedule, nfe), method, eta=eta, eta_b=eta_b)


def _levels(problem: Problem, lam: Tensor) -> tuple[Tensor, Tensor]:
    """``s_i^2`` and ``sigma_y / s_i``; 1 and infinity where ``s_i = 0``."""
    unseen = problem.A.unseen(lam)
    square = torch.where(unseen, torch.ones_like(lam), lam)
    s_y = per_sample(problem.sigma_y, lam.new_empty(1).expand(len(problem.y), *[1] * (lam.ndim - 1)))
    return square, torch.where(unseen, math.inf, s_y / square.sqrt())


def _start(problem: Problem, state: State) -> Tensor:
    """What is measured, its noise raised to ``q``, and the noise ``u`` elsewhere."""

    def measured(lam: Tensor) -> Tensor:
        square, level = _levels(problem, lam)
        return (level <= state.q) / square

    def fresh(lam: Tensor) -> Tensor:
        level = _levels(problem, lam)[1] / state.q
        return torch.where(level <= 1, (1 - level.clamp_max(1) ** 2).sqrt(), 1.0)

    return problem.A.spectral(measured, problem.A.adjoint(problem.y)) + problem.A.spectral(fresh, state.u)


def spectral_transition(problem: Problem, eta: float, eta_b: float) -> Transition:
    """The transition of the module's head."""
    A, kept = problem.A, (1 - eta**2) ** 0.5

    def step(state: State, q: float, mean: Mean, noise: Noise) -> State:
        d = mean(state.u, state.q)

        def measured(lam: Tensor) -> Tensor:
            """Factor of ``A^T (y - A D)``."""
            square, level = _levels(problem, lam)
            below = kept * q / level.clamp_min(torch.finfo(level.dtype).tiny)  # 0 where s_i = 0
            return torch.where(level > q, below, eta_b) / square

        def fresh(lam: Tensor) -> Tensor:
            level = _levels(problem, lam)[1]
            left = (q**2 - eta_b**2 * level.clamp_max(q) ** 2).sqrt()
            return torch.where(level > q, eta * q, left)

        u = d + A.spectral(measured, A.adjoint(problem.residual(d)))
        if q > 0:
            u = u + kept * q / state.q * A.null_projection(state.u - d) + A.spectral(fresh, noise())
        return State(u, q)

    return step
