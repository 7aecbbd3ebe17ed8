r"""Conjugate gradients that return their error.

Solves ``M z = r`` with ``M = a I + b A^T A`` for operators without an exact solve. With the precision of the pivot
``Lambda = M / unit`` (``unit = sigma_t^2 sigma_y^2`` for the system of :func:`posteriori.pivot`) the error ``e`` of a
solution is judged by its whitened size, the one that decides whether a sample can tell:

    sqrt(e^T Lambda e / n) <= |rho| / sqrt(a unit n),      rho = r - M z

(``M^-1 <= I/a``). The bound is computed from the true residual, not from the recurrence, and returned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Solution", "conjugate_gradients", "with_derivative"]


@dataclass(frozen=True)
class Solution:
    """Result of an iterative solve.

    Attributes:
        x: the solution, shape ``(B, ...)``.
        iterations: iterations spent (the batch runs until its slowest sample is done).
        bound: ``(B,)``, an upper bound on the whitened error of every sample.
        converged: ``(B,)`` booleans, whether ``bound`` is within the tolerance.
    """

    x: Tensor
    iterations: int
    bound: Tensor
    converged: Tensor


def _dot(u: Tensor, v: Tensor) -> Tensor:
    return (u * v).flatten(1).sum(1).reshape(-1, *[1] * (u.ndim - 1))


def conjugate_gradients(
    gram: Callable[[Tensor], Tensor],
    rhs: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    unit: Tensor,
    tolerance: float = 1e-3,
    max_iterations: int = 500,
) -> Solution:
    """Solve ``(a I + b gram) z = rhs`` for a batch, each sample until its own bound is met.

    Args:
        gram: ``v -> A^T A v`` on tensors shaped like ``rhs``.
        rhs: ``(B, ...)``; float64 is advised.
        a, b: non-negative, broadcastable as ``(B, 1, ...)``; ``a`` positive.
        unit: broadcastable as ``(B, 1, ...)``; see the module's head.
        tolerance: target of the whitened error.
        max_iterations: iterations after which the best effort is returned with its bound.
    """
    n = rhs[0].numel()
    scale = (a * unit * n).sqrt()

    def apply(v: Tensor) -> Tensor:
        return a * v + b * gram(v)

    def bound_of(residual: Tensor) -> Tensor:
        return _dot(residual, residual).sqrt() / scale

    z = torch.zeros_like(rhs)
    residual, direction = rhs, rhs
    energy = _dot(residual, residual)
    iteration = 0
    bound = bound_of(residual)
    while iteration < max_iterations and bool((bound > tolerance).any()):
        active = bound > tolerance
        product = apply(direction)
        curvature = _dot(direction, product)
        step = torch.where(active & (curvature > 0), energy / curvature.clamp_min(1e-300), torch.zeros_like(energy))
        z = z + step * direction
        # Every 50 iterations the residual is computed anew: the recurrence drifts away from it.
        iteration += 1
        residual = rhs - apply(z) if iteration % 50 == 0 else residual - step * product
        new_energy = _dot(residual, residual)
        direction = residual + torch.where(energy > 0, new_energy / energy.clamp_min(1e-300), energy) * direction
        energy = new_energy
        bound = bound_of(residual)
    bound = bound_of(rhs - apply(z)).reshape(-1)
    return Solution(z, iteration, bound, bound <= 2 * tolerance)


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
