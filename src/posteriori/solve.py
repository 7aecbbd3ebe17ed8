r"""Conjugate gradients that return their error.

Solves ``M z = r`` with ``M = a I + b A^T A`` for operators without an exact solve. With the precision of the pivot
``Lambda = M / unit`` (``unit = sigma_t^2 sigma_y^2`` for the system of :func:`posteriori.pivot`) the error ``e`` of a
solution is judged by its whitened size ``sqrt(e^T Lambda e / n)``, the one that decides whether a sample can tell. Up
to ``sqrt(unit n)`` that is the norm ``|e|_M`` which conjugate gradients minimise, and it is bounded twice:

    |e|_M^2 = rho^T M^-1 rho <= |rho|^2 / a,                    rho = r - M z                  (M >= a)
    |e|_M^2 <= g_k rho^T P^-1 rho,      g_0 = 1/mu,    g_{k+1} = (g_k - s_k) / (mu (g_k - s_k) + d_{k+1})

The second is Gauss-Radau quadrature (Golub & Meurant 1994, in the form of Meurant & Tichy 2013): ``s_k`` and ``d_k``
are the iteration's own coefficients, ``P`` its preconditioner, and ``mu = a / |P|`` is below the spectrum of
``P^-1 M``. It follows the error closely where ``M`` is ill-conditioned and the first is too large by its square root.

Rounding makes the recursive residual ``rho'`` drift away from the true one. The result is therefore judged by the true
residual: ``|rho - rho'| / sqrt(a)`` is added to the second bound and the rounding of ``rho`` itself to both; where the
drift spoils the bound the iteration is started anew from the true residual.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Preconditioner", "Solution", "conjugate_gradients", "with_derivative"]

#: ``mu`` lies this much below ``a / |P|``: at an eigenvalue the quadrature would divide by nothing.
_BELOW = 0.999


@dataclass(frozen=True)
class Solution:
    """Result of an iterative solve.

    Attributes:
        x: the solution, shape ``(B, ...)``.
        iterations: iterations spent on the slowest sample.
        bound: ``(B,)``, an upper bound on the whitened error of every sample, but for the rounding of ``gram`` itself.
        converged: ``(B,)`` booleans, whether ``bound`` is within twice the tolerance.
    """

    x: Tensor
    iterations: int
    bound: Tensor
    converged: Tensor


@dataclass(frozen=True)
class Preconditioner:
    """A positive definite ``P`` close to ``M``.

    Attributes:
        solve: ``P^-1 v``.
        largest: no eigenvalue of ``P`` is above it; broadcastable as ``(B, 1, ...)``.
    """

    solve: Callable[[Tensor], Tensor]
    largest: Tensor


def _dot(u: Tensor, v: Tensor) -> Tensor:
    return (u * v).flatten(1).sum(1).reshape(-1, *[1] * (u.ndim - 1))


def _norm(v: Tensor) -> Tensor:
    return _dot(v, v).sqrt()


def conjugate_gradients(
    gram: Callable[[Tensor], Tensor],
    rhs: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    unit: Tensor,
    guess: Tensor | None = None,
    preconditioner: Preconditioner | None = None,
    tolerance: float = 1e-3,
    max_iterations: int = 2000,
    quadrature: bool = True,
) -> Solution:
    """Solve ``(a I + b gram) z = rhs`` for a batch, each sample until its own bound is met.

    Args:
        gram: ``v -> A^T A v`` on tensors shaped like ``rhs``.
        rhs: ``(B, ...)``; float64 is advised.
        a, b: non-negative, broadcastable as ``(B, 1, ...)``; ``a`` positive.
        unit: broadcastable as ``(B, 1, ...)``; see the module's head.
        guess: where to start, shaped like ``rhs``; 0 by default.
        preconditioner: saves iterations; none by default.
        tolerance: target of the whitened error.
        max_iterations: iterations after which the best effort is returned with its bound.
        quadrature: use both bounds; else that of the residual alone.
    """
    whiten = (unit * rhs[0].numel()).rsqrt()
    per_residual = whiten * a.rsqrt()

    def apply(v: Tensor) -> Tensor:
        return a * v + b * gram(v)

    z, product = (torch.zeros_like(rhs),) * 2 if guess is None else (guess, apply(guess))
    residual = rhs - product
    bound = _norm(residual) * per_residual
    spent = torch.zeros_like(bound, dtype=torch.long)
    wanted = bound > tolerance
    while bool(wanted.any()):
        run = _Run(apply, residual, wanted, spent, preconditioner)
        mu = _BELOW * a / (1 if preconditioner is None else preconditioner.largest)
        run.descend(mu if quadrature else None, whiten, per_residual, tolerance, max_iterations)
        candidate, spent = z + run.correction, run.spent
        product = apply(candidate)
        residual = rhs - product
        drift = _norm(residual - run.residual) * per_residual
        rounding = torch.finfo(rhs.dtype).eps * (_norm(rhs) + _norm(product)) * per_residual
        judged = torch.minimum(_norm(residual) * per_residual, run.bound + drift) + rounding
        better = wanted & (judged < bound)
        # Drift spoiled it, and this round gained: another one gains again.
        wanted = better & (judged > 2 * tolerance) & (judged < bound / 2) & (spent < max_iterations)
        z, bound = torch.where(better, candidate, z), torch.where(better, judged, bound)
    bound = bound.reshape(-1)
    return Solution(z, int(spent.max()), bound, bound <= 2 * tolerance)


class _Run:
    """One uninterrupted run of the recurrence from a residual, on the samples that are ``active``."""

    def __init__(
        self,
        apply: Callable[[Tensor], Tensor],
        residual: Tensor,
        active: Tensor,
        spent: Tensor,
        preconditioner: Preconditioner | None,
    ) -> None:
        self.apply = apply
        self.precondition = (lambda r: r) if preconditioner is None else preconditioner.solve
        self.correction = torch.zeros_like(residual)
        self.residual, self.active, self.spent = residual, active, spent
        self.bound = torch.full_like(spent, 0, dtype=residual.dtype)

    def descend(
        self, mu: Tensor | None, whiten: Tensor, per_residual: Tensor, tolerance: float, max_iterations: int
    ) -> None:
        tiny = torch.finfo(self.residual.dtype).tiny
        direction = self.precondition(self.residual)
        energy = _dot(self.residual, direction)
        never = torch.full_like(energy, torch.inf)
        radau = never if mu is None else (1 / mu).expand_as(energy)
        while True:
            by_residual = _norm(self.residual) * per_residual
            by_radau = (radau * energy).clamp_min(0).sqrt() * whiten
            found = torch.minimum(by_residual, torch.where(torch.isfinite(by_radau), by_radau, never))
            self.bound = torch.where(self.active, found, self.bound)
            self.active = self.active & (self.bound > tolerance) & (self.spent < max_iterations)
            if not bool(self.active.any()):
                return
            product = self.apply(direction)
            curvature = _dot(direction, product)
            self.active = self.active & (curvature > 0)  # 0 or NaN: this sample is at its end
            step = torch.where(self.active, energy / curvature.clamp_min(tiny), 0)
            self.correction = self.correction + step * direction
            self.residual = self.residual - step * product
            self.spent = self.spent + self.active
            preconditioned = self.precondition(self.residual)
            new_energy = _dot(self.residual, preconditioned)
            ratio = new_energy / energy.clamp_min(tiny)
            if mu is not None:
                left = radau - step
                fits = (left > 0) & torch.isfinite(left)  # else rounding has put a Ritz value below mu
                radau = torch.where(fits, left / (mu * left + ratio).clamp_min(tiny), never)
            direction = preconditioned + ratio * direction
            energy = new_energy


class _Derivative(torch.autograd.Function):
    @staticmethod
    def forward(source: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.zeros_like(source)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.linear = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.linear(gradient), None


def with_derivative(value: Tensor, source: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
    """``value``, to first order in ``source`` a symmetric linear map of it, which alone is run to differentiate.

    Iterations that stop when the answer is good enough have not converged in their derivative (a right-hand side of 0
    takes none at all), and remembering every one of them costs memory.
    """
    if not (torch.is_grad_enabled() and source.requires_grad):
        return value
    return value + _Derivative.apply(source, linear)
