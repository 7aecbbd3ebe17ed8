r"""An exponential integrator for posteriors: what a Gaussian prior makes of the measurement is integrated exactly.

Under the prior ``N(0, s^2 I)`` the posterior given ``y`` is Gaussian, with mean ``mu`` and, along an eigenvector of
``A^T A`` with eigenvalue ``lam``, variance ``v = 1/(1/s^2 + lam/sigma_y^2)``: small where ``A`` measures, ``s^2`` where
it does not. Its flow is known: ``u - mu`` scales with ``(v + q^2)^(1/2)``. For any other prior let

    D(u, q) = x_lin + N(u, q),      x_lin = mu + v/(v + q^2) (u - mu)         (the linear estimate of the pivot)

and ``w = (u - mu) (v + q^2)^(-1/2)``, ``F = N (v + q^2)^(1/2) / (q v^(1/2))``. Per spectral coefficient, exactly,

    dw/dq = -v^(1/2)/(v + q^2) F,       that is,   dw/dtheta = -F,   theta = arctan(q / v^(1/2)).

``F`` has unit scale: of a spectrally preconditioned EDM network it *is* the output, ``D = x_lin + c_out(Q) F``.
Only ``F`` is approximated, by the polynomial in ``log q`` through its last three values (Adams & Bashforth; the
DPM-Solver++ of Lu et al. 2022 is the form with a scalar 0 in place of the matrix ``v``). Each coefficient has its own
clock ``theta``: a measured one rests at ``pi/2`` until the noise comes down to its own. ``N(0, s^2 I)`` is sampled
exactly by any steps, and the step to noise 0 needs no limit: it ends at ``mu + v^(1/2) w``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from posteriori.operators.base import SpectralOperator
from posteriori.pivot import estimate_from_measurement, noise_variance
from posteriori.posterior import ExactPosterior
from posteriori.solvers import Mean, Noise, State, Transition

__all__ = ["exponential"]

# Gauss-Legendre nodes in log q: for steps of a factor of 3 the weights have an error of 1e-6.
_NODES, _WEIGHTS = (x.tolist() for x in np.polynomial.legendre.leggauss(6))


def exponential(posterior: ExactPosterior, order: int = 3) -> Transition:
    """The transition for one problem.

    Args:
        posterior: the problem; its denoiser's ``data_std`` is ``s``. Where ``A`` has no spectral basis (solves are
            iterative) the Gaussian is the prior alone, ``v = s^2`` and ``mu = 0``.
        order: values of ``F`` in the polynomial, 1 to 3. The step to noise 0 takes one, where ``log q`` does not exist.

    A single step from the start to noise 0 returns the mean: there is nothing to integrate.
    """
    s, A, y, shape = posterior.denoiser.data_std, posterior.A, posterior.y, posterior.shape
    enter: Callable[[Tensor], Tensor]
    leave: Callable[[Tensor], Tensor]
    if isinstance(A, SpectralOperator):  # everything on coefficients: two transforms a step
        like = y.new_empty(1).expand(shape)
        mu = estimate_from_measurement(y, A, shape, sigma_y=posterior.sigma_y, prior_std=s)
        # Q^2 of x_t at noise s is the variance that prior and measurement leave
        v = noise_variance(A, like, alpha_t=1.0, sigma_t=s, sigma_y=posterior.sigma_y)(A.eigenvalues(like))
        centre = A.coefficients(mu)
        enter, leave = lambda x: A.coefficients(x) - centre, lambda z: A.signal(z + centre, shape)
    else:
        v = y.new_full([1] * len(shape), s**2)
        enter = leave = lambda x: x

    noiseless = v == 0  # mu is the answer
    unspread = noiseless if bool(noiseless.any()) else None

    def step(state: State, q: float, mean: Mean, noise: Noise) -> State:
        d = mean(state.u, state.q)
        if q == 0 and not state.history:
            return State(d, q)
        # history: where u is among the coefficients, then values of v^(1/2) F
        z = state.history[0][1] if state.history else enter(state.u)
        width = (v + state.q**2).sqrt()
        values = ((state.q, width / state.q * (enter(d) - v / width**2 * z)), *state.history[1:])[:order]
        used = values if q > 0 else values[:1]
        w = z / width
        for integral, (_, value) in zip(_integrals(v, [level for level, _ in used], q, unspread), used, strict=True):
            w = w + integral * value
        z = (v + q**2).sqrt() * w
        return State(leave(z).to(state.u), q, history=((q, z), *values))

    return step


def _integrals(v: Tensor, levels: Sequence[float], q: float, unspread: Tensor | None = None) -> list[Tensor]:
    """For values at noise ``levels``, the latest first: the integral of Lagrange's polynomial in ``log q`` of each over
    ``dq/(v + q^2)``, from ``q`` to the latest; 0 where ``unspread``, which is where ``v`` is 0."""
    start = levels[0]
    v = v if unspread is None else torch.where(unspread, torch.ones_like(v), v)
    root = v.sqrt()
    # the polynomials sum to 1, and the integral of 1 is (theta_start - theta_q) / v^(1/2)
    first = torch.atan(root * (start - q) / (v + start * q)) / root
    rest: Sequence[Tensor] = ()
    if len(levels) > 1:
        nodes, weights = (v.new_tensor(x) for x in _quadrature(levels, q))
        nodes, weights = (x.reshape(*x.shape, *[1] * v.ndim) for x in (nodes, weights))
        rest = (weights / (v + nodes**2)).sum(1).unbind()
    for integral in rest:
        first = first - integral
    found = [first, *rest]
    return found if unspread is None else [torch.where(unspread, torch.zeros_like(x), x) for x in found]


def _quadrature(levels: Sequence[float], q: float) -> tuple[list[float], list[list[float]]]:
    """Nodes in ``q``, and the weights there of each polynomial but the first.

    In plain numbers: right after a network, a few calls of NumPy take longer than all else in a step.
    """
    logs, low = [math.log(level) for level in levels], math.log(q)
    half = (logs[0] - low) / 2
    at = [low + half * (1 + x) for x in _NODES]
    weights = []
    for j in range(1, len(levels)):
        rest = logs[:j] + logs[j + 1 :]
        scale = half / math.prod(logs[j] - p for p in rest)
        weights.append(
            [scale * w * math.exp(x) * math.prod(x - p for p in rest) for x, w in zip(at, _WEIGHTS, strict=True)]
        )
    return [math.exp(x) for x in at], weights
