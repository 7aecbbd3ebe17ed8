r"""The linear estimate and functions of the pivot from the same coefficients, where ``A^T A = V diag(lam) V^T``.

With ``h = alpha_t sigma_y^2 V^T x_t + sigma_t^2 V^T A^T y`` and ``d = alpha_t^2 sigma_y^2 + sigma_t^2 lam``,

    Q^2 = sigma_t^2 sigma_y^2 / d,      f(Q) mu* = V f(Q) h / d,      x_lin = V h / (d + sigma_t^2 sigma_y^2 / s^2).

One by one (:mod:`posteriori.pivot`, ``A.spectral``) each of them changes to the basis of ``A`` and back. Together they
change there once, and the measurement, which stays the same along a whole trajectory, only at its first evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from posteriori.operators.base import LinearOperator, Scalar, SpectralOperator, full_precision, per_sample

__all__ = ["Measured", "can_share", "linear_and_pivots"]

#: A measurement, and its ``V^T A^T y``.
Measured = tuple[Tensor, Tensor]


def can_share(A: LinearOperator, alpha_t: Scalar, sigma_y: Scalar) -> TypeGuard[SpectralOperator]:
    """Whether ``A`` has a basis, and the pivot a density there: ``sigma_y = 0`` needs the pseudo-inverse."""
    return isinstance(A, SpectralOperator) and all(bool((torch.as_tensor(v) > 0).all()) for v in (alpha_t, sigma_y))


@full_precision
def linear_and_pivots(
    x_t: Tensor,
    y: Tensor,
    A: SpectralOperator,
    *,
    alpha_t: Scalar,
    sigma_t: Scalar,
    sigma_y: Scalar,
    prior_std: float,
    functions: Sequence[Callable[[Tensor], Tensor]] = (),
    known: Measured | None = None,
) -> tuple[list[Tensor], Measured]:
    """``[x_lin, f(Q) mu*, ...]``, one for each of the ``functions``; ``Q`` as in the module's head.

    Args:
        x_t: noisy signals ``(B, *signal)``.
        y: measurements ``(B, *measurement)``.
        A: the operator, with ``can_share(A, alpha_t, sigma_y)``.
        alpha_t, sigma_t, sigma_y: positive, one number or one per sample ``(B,)``.
        prior_std: ``s`` of the linear estimate.
        functions: elementwise, finite where ``Q`` is at most ``sigma_t / alpha_t``.
        known: what an earlier call returned; used when it is of the same ``y``.

    Returns:
        The signals, ``(B, *signal)`` each, and what the next call may be given as ``known``.
    """
    measured = known if known is not None and known[0] is y else (y, A.adjoint_coefficients(y))
    c, lam = A.coefficients(x_t), A.eigenvalues(x_t)
    # as many rows as there are different values: what is the same for all samples is worked out once
    reference = lam.new_empty(1).expand(x_t.shape[0], *[1] * (lam.ndim - 1))
    alpha, sigma, s_y = (per_sample(v, reference) for v in (alpha_t, sigma_t, sigma_y))
    noise = (sigma * s_y) ** 2
    d = (alpha * s_y) ** 2 + sigma**2 * lam
    h = alpha * s_y**2 * c + sigma**2 * measured[1]
    results = [A.signal(h / (d + noise / prior_std**2), x_t.shape)]
    if functions:
        q = (noise / d).sqrt()
        results += [A.signal(f(q) / d * h, x_t.shape) for f in functions]
    return [r.to(x_t.dtype) for r in results], measured
