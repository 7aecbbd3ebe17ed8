r"""What was tried on the way to the default sampler, measured by :mod:`posteriori.bench.sampler`.

The exponential integrator again, with every choice open: which Gaussian is integrated exactly (that of prior and
measurement, of the prior alone, none: data prediction), the clock of the polynomial (``log q`` or ``theta``), its
order, and a corrector: a step taken again once its end has been evaluated, at no evaluation, as UniPC does.
Further: noise added on the way, ancestral steps with a Gaussian's variance, Euler's step for the pivot in place of
``u``, and grids from a pilot run. Operators must have a spectral basis. See docs/sampler.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from posteriori.operators.base import SpectralOperator
from posteriori.pivot import estimate_from_measurement, noise_variance
from posteriori.posterior import ExactPosterior
from posteriori.sample import sample
from posteriori.solvers import Mean, Noise, State, Transition, dpmpp

__all__ = ["ancestral", "churned", "gaussian_end", "open_exponential", "pilot_grid", "pivot_euler"]

Clock = Literal["log q", "theta"]
Exact = Literal["posterior", "prior", "nothing"]
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


class _Coefficients:
    """Variance ``v`` and centre ``mu`` of the Gaussian posterior, on spectral coefficients."""

    def __init__(self, posterior: ExactPosterior, exact: Exact = "posterior") -> None:
        A, y, s = posterior.A, posterior.y, posterior.denoiser.data_std
        assert isinstance(A, SpectralOperator)
        self.operator, self.shape = A, posterior.shape
        nothing = y.new_zeros(posterior.shape)
        eigenvalues = A.eigenvalues(y.new_empty(1).expand(posterior.shape))
        if exact == "posterior":
            self.v = noise_variance(A, nothing, alpha_t=1.0, sigma_t=s, sigma_y=posterior.sigma_y)(eigenvalues)
            nothing = estimate_from_measurement(y, A, posterior.shape, sigma_y=posterior.sigma_y, prior_std=s)
        else:
            self.v = torch.full_like(eigenvalues, s**2 if exact == "prior" else 1e-12)
        self.mu = A.coefficients(nothing)

    def enter(self, u: Tensor) -> Tensor:
        return self.operator.coefficients(u) - self.mu

    def leave(self, z: Tensor) -> Tensor:
        return self.operator.signal(z + self.mu, self.shape)


def open_exponential(
    posterior: ExactPosterior,
    order: int = 3,
    exact: Exact = "posterior",
    clock: Clock = "log q",
    corrector: bool = False,
    knee: float = math.inf,
) -> Transition:
    """The exponential integrator, its choices open (module's head); ``log q`` levels off at ``knee`` times ``s``."""
    basis = _Coefficients(posterior, exact)
    v, bend = basis.v, 1 / (knee * posterior.denoiser.data_std)

    def time(q: Tensor) -> Tensor:
        return torch.atan(q / v.sqrt()) if clock == "theta" else (q / (1 + bend * q)).log()

    def weights(levels: list[float], start: float, q: float) -> list[Tensor]:
        """Integrals over ``theta`` from ``q`` to ``start`` of Lagrange's polynomials through ``levels``."""
        low = torch.atan(q / v.sqrt())
        width = torch.atan((start - q) * v.sqrt() / (v + start * q))
        total = [torch.zeros_like(v) for _ in levels]
        for node, weight in zip(_NODES, _WEIGHTS, strict=True):
            theta = low + width * (node + 1) / 2
            x = time(v.sqrt() * theta.tan())
            at = [time(torch.full_like(v, p)) for p in levels]
            for j in range(len(levels)):
                factor = torch.full_like(v, weight / 2)
                for k in range(len(levels)):
                    if k != j:
                        factor = factor * (x - at[k]) / (at[j] - at[k])
                total[j] += factor * width
        return total

    def advance(z: Tensor, start: float, q: float, known: list[tuple[float, Tensor]]) -> Tensor:
        parts = weights([level for level, _ in known], start, q)
        moved = sum((w * f for w, (_, f) in zip(parts, known, strict=True)), torch.zeros_like(z))
        return (v + q**2).sqrt() * (z / (v + start**2).sqrt() + moved)

    def step(state: State, q: float, mean: Mean, noise: Noise) -> State:
        d = mean(state.u, state.q)
        if q == 0 and (exact == "nothing" or not state.history):
            return State(d, q)
        z = basis.enter(state.u)
        # every value in the history is F, and where the step from there began
        known = [(level, value[0]) for level, value in state.history]

        def f(z: Tensor) -> Tensor:
            deviation = basis.enter(d) - v / (v + state.q**2) * z
            return deviation * (v + state.q**2).sqrt() / (state.q * v.sqrt())

        if corrector and state.history:
            level, value = state.history[0]
            z = advance(value[1], level, state.q, [(state.q, f(z)), *known][:order])
        history = ((state.q, torch.stack([f(z), z])), *state.history)[:order]
        known = [(state.q, history[0][1][0]), *known][:order]
        return State(basis.leave(advance(z, state.q, q, known if q > 0 else known[:1])), q, history=history)

    return step


def ancestral(posterior: ExactPosterior) -> Transition:
    """DDPM's step, ``x_0`` drawn from the Gaussian around the mean that prior and measurement leave, exactly:
    ``u' ~ N(D + r (u - D), q'^2 (1 - r) + (1 - r)^2 v q^2/(v + q^2))``, ``r = (q'/q)^2``."""
    basis = _Coefficients(posterior)

    def step(state: State, q: float, mean: Mean, noise: Noise) -> State:
        d = mean(state.u, state.q)
        r = (q / state.q) ** 2
        left = basis.v * state.q**2 / (basis.v + state.q**2)
        spread = (q**2 * (1 - r) + (1 - r) ** 2 * left).sqrt()
        fresh = basis.operator.signal(spread * basis.operator.coefficients(noise()), basis.shape)
        return State(d + r * (state.u - d) + fresh, q)

    return step


def churned(
    inner: Callable[[ExactPosterior], Transition], amount: float, low: float, high: float
) -> Callable[..., Transition]:
    """``inner`` with noise added before every step from a level between ``low`` and ``high``: ``q`` grows by
    ``amount``. History of other noise stays, as an approximation."""

    def make(posterior: ExactPosterior) -> Transition:
        step = inner(posterior)

        def noisy(state: State, q: float, mean: Mean, noise: Noise) -> State:
            if low <= state.q <= high:
                raised = state.q * (1 + amount)
                u = state.u + (raised**2 - state.q**2) ** 0.5 * noise()
                state = replace(state, u=u, q=raised)
            return step(state, q, mean, noise)

        return noisy

    return make


def gaussian_end(posterior: ExactPosterior) -> Transition:
    """DPM-Solver++(2M) whose last step adds the noise that a Gaussian still has around the mean."""
    basis = _Coefficients(posterior)

    def step(state: State, q: float, mean: Mean, noise: Noise) -> State:
        after = dpmpp(state, q, mean, noise)
        if q > 0:
            return after
        spread = (basis.v * state.q**2 / (basis.v + state.q**2)).sqrt()
        return State(after.u + basis.operator.signal(spread * basis.operator.coefficients(noise()), basis.shape), q)

    return step


def pivot_euler(posterior: ExactPosterior) -> Transition:
    """Euler's step in ``log q`` for the pivot: with ``p = mu* - A^+ y = r (u - A^+ y)`` and
    ``r = 1/(1 + q^2 lam/sigma_y^2)``, ``dp/dlog q = (2r - 1) p - r (D - A^+ y)``. The last step takes the mean."""
    A = posterior.A
    assert isinstance(A, SpectralOperator)
    lam = A.eigenvalues(posterior.y.new_empty(1).expand(posterior.shape)) / float(posterior.sigma_y) ** 2
    known = A.coefficients(A.pinv(posterior.y))

    def step(state: State, q: float, mean: Mean, noise: Noise) -> State:
        d = mean(state.u, state.q)
        if q == 0:
            return State(d, q)
        r, after = 1 / (1 + state.q**2 * lam), 1 / (1 + q**2 * lam)
        p = r * (A.coefficients(state.u) - known)
        p = p + math.log(q / state.q) * ((2 * r - 1) * p - r * (A.coefficients(d) - known))
        return State(A.signal(p / after + known, posterior.shape), q)

    return step


def pilot_grid(
    posterior: ExactPosterior, nfe: int, measure: Literal["mean", "entropy"], power: float = 1.0, steps: int = 60
) -> Tensor:
    """A grid for one problem from a pilot run: equal steps in what happens along ``log q``.

    Args:
        posterior, nfe: the problem and the evaluations to place.
        measure: ``"mean"``: root mean square change of ``E[x_0 | x_t, y]``; ``"entropy"``: ``E|x_0 - E[x_0 | x_t, y]|^2
            / q^2``, the rate at which the sample's entropy falls.
        power: of the rate; under 1 spreads the steps more evenly.
        steps: of the pilot, with 64 samples.
    """
    track = sample(posterior, 64, steps, 99, batch_size=64, return_trajectory=True)
    q = [float(r) for r in posterior.schedule.ratio(track.t)]
    if measure == "mean":
        rate = track.means.diff(dim=0).square().flatten(1).mean(1).sqrt()
    else:
        rate = (track.samples - track.means).square().flatten(1).mean(1)[1:] / torch.tensor(q[1:-1]) ** 2
    width = -np.diff(np.log(q[1:-1]))  # the first step is the warm start
    density = (rate[1:].numpy() / (width if measure == "mean" else 1)) ** power
    done = np.concatenate([[0.0], np.cumsum(density * width)])
    at = np.interp(np.linspace(0, done[-1], nfe - 1), done, -np.log(q[1:-1]))
    times = [
        float(track.t[0]),
        *(float(posterior.schedule.time(torch.tensor(math.exp(-a), dtype=torch.float64))) for a in at),
    ]
    return torch.tensor([*times, 0.0], dtype=torch.float64)
