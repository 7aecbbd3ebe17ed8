r"""An exponential integrator for posteriors: what a Gaussian prior makes of the measurement is integrated exactly.

Under the prior ``N(0, s^2 I)`` the posterior given ``y`` is Gaussian, with mean ``mu`` and, along an eigenvector of
``A^T A`` with eigenvalue ``lam``, variance ``v = 1/(1/s^2 + lam/sigma_y^2)``: small where ``A`` measures, ``s^2`` where
it does not. Its flow is known: ``u - mu`` scales with ``(v + q^2)^(1/2)``. For any other prior let

    D(u, q) = x_lin + N(u, q),      x_lin = mu + v/(v + q^2) (u - mu)         (the linear estimate of the pivot)

and ``w = (u - mu) (v + q^2)^(-1/2)``, ``F = N (v + q^2)^(1/2) / (q v^(1/2))``. Per spectral coefficient, exactly,

    dw/dq = -v^(1/2)/(v + q^2) F,       that is,   dw/dtheta = -F,   theta = arctan(q / v^(1/2)).

``F`` has unit scale: of a spectrally preconditioned EDM network it *is* the output, ``D = x_lin + c_out(Q) F``.
Only ``F`` is approximated: by the polynomial in ``log q`` through its last three values (Adams & Bashforth; Lu et al.
2022, of whose DPM-Solver++ this is the form with the matrix ``v`` in place of 0). Each coefficient has its own clock:
a measured one, ``v^(1/2) << q``, rests at ``theta = pi/2`` until the noise comes down to its own. A Gaussian
``N(0, s^2 I)`` is sampled exactly by one step, and the step to noise 0 needs no limit: it ends at ``mu + v^(1/2) w``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from posteriori.denoise import ExactPosterior
from posteriori.operators.base import SpectralOperator
from posteriori.pivot import linear_estimate, noise_variance
from posteriori.solvers import Mean, Noise, State, Transition

__all__ = ["exponential"]

Function = Callable[[Tensor], Tensor]  # of v, elementwise

# Gauss-Legendre nodes in log q: for steps of a factor of 3 the weights have an error of 1e-6.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(6)


def exponential(posterior: ExactPosterior, order: int = 3) -> Transition:
    """The transition for one problem.

    Args:
        posterior: the problem; its denoiser's ``data_std`` is ``s``.
        order: values of ``F`` in the polynomial, 1 to 3. The step to noise 0 takes one, where ``log q`` does not exist.

    A single step from the start to noise 0 returns the mean: there is nothing to integrate.
    """
    s, A = posterior.denoiser.data_std, posterior.A
    like = posterior.y.new_empty(1).expand(posterior.shape)
    nothing = posterior.y.new_zeros(posterior.shape)
    mu = linear_estimate(nothing, posterior.y, A, alpha_t=0.0, sigma_t=1.0, sigma_y=posterior.sigma_y, prior_std=s)
    # Q^2 of x_t at noise s is the variance v that the prior and the measurement leave
    variance = noise_variance(A, like, alpha_t=1.0, sigma_t=s, sigma_y=posterior.sigma_y)
    if isinstance(A, SpectralOperator):  # everything on coefficients: two transforms a step
        v = variance(A.eigenvalues(like))
        enter, leave = A.coefficients, lambda c: A.signal(c, posterior.shape)
        apply = lambda f, c: f(v) * c  # noqa: E731
    else:
        enter = leave = lambda c: c
        apply = lambda f, c: A.spectral(lambda lam: f(variance(lam)), c)  # noqa: E731
    centre = enter(mu)

    def step(state: State, q: float, mean: Mean, noise: Noise) -> State:
        d = mean(state.u, state.q)
        if q == 0 and not state.history:
            return State(d, q)
        z = enter(state.u) - centre
        deviation = enter(d) - centre - apply(lambda v: v / (v + state.q**2), z)
        history = ((state.q, deviation), *state.history)[:order]
        used = history if q > 0 else history[:1]
        z = apply(lambda v: ((v + q**2) / (v + state.q**2)).sqrt(), z)
        for (_, value), weight in zip(used, _weights([level for level, _ in used], q), strict=True):
            z = z + apply(weight, value)
        return State(leave(z + centre).to(state.u), q, history=history)

    return step


def _weights(levels: Sequence[float], q: float) -> list[Function]:
    """Weights of the deviations ``N`` at noise ``levels`` (the last first) in the step from ``levels[0]`` to ``q``:
    ``(v + q^2)^(1/2) (v + q_j^2)^(1/2) / q_j`` times the integral of Lagrange's polynomial ``j`` over
    ``dq/(v + q^2)``. 0 at ``v = 0``, where ``mu`` is the answer."""
    start = levels[0]

    def whole(v: Tensor) -> Tensor:
        """The integral of 1, ``(theta_1 - theta_2) / v^(1/2)``."""
        root = v.sqrt()
        return torch.atan(root * (start - q) / (v + start * q)) / root

    parts: list[Function] = []
    if len(levels) > 1:
        half = math.log(start / q) / 2
        at = np.exp(math.log(q) + half * (1 + _NODES))
        others = [half * _WEIGHTS * at * _lagrange(np.log(levels), j, np.log(at)) for j in range(1, len(levels))]
        parts = [_sum_of_poles(c, at) for c in others]

    def first(v: Tensor) -> Tensor:
        return whole(v) - sum((p(v) for p in parts), torch.zeros_like(v))

    def scaled(integral: Function, level: float) -> Function:
        def weight(v: Tensor) -> Tensor:
            measured = v == 0  # without noise
            v = torch.where(measured, torch.ones_like(v), v)
            value = integral(v) * ((v + q**2) * (v + level**2)).sqrt() / level
            return torch.where(measured, torch.zeros_like(v), value)

        return weight

    return [scaled(f, level) for f, level in zip([first, *parts], levels, strict=True)]


def _lagrange(nodes: np.ndarray, j: int, x: np.ndarray) -> np.ndarray:
    rest = [k for k in range(len(nodes)) if k != j]
    return np.prod([(x - nodes[k]) / (nodes[j] - nodes[k]) for k in rest], axis=0)


def _sum_of_poles(coefficients: np.ndarray, at: np.ndarray) -> Function:
    """``v -> sum_k c_k / (v + q_k^2)``."""

    def function(v: Tensor) -> Tensor:
        terms = (float(c) / (v + float(a) ** 2) for c, a in zip(coefficients, at, strict=True))
        return sum(terms, torch.zeros_like(v))

    return function
