r"""Total variation: the classical reconstruction that any learned method has to beat.

    min_x 1/2 |A x - y|^2 + weight * sum_pixels sqrt(sum_channels |D x|^2)        (Rudin, Osher & Fatemi 1992)

``D`` are forward differences down and right, none across the border. One Euclidean norm over both differences and all
channels of a pixel: isotropic in space and in colour, so edges of the channels coincide (Bresson & Chan 2008).

ADMM on ``z = x``, ``d = D x`` (Afonso, Bioucas-Dias & Figueiredo 2010), over-relaxed, every step exact: ``D^T D``
is diagonal in the cosine transform, the data step is ``A.gram_solve``, the last one shrinks vectors.
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from posteriori.operators.base import LinearOperator, Scalar, per_sample

__all__ = ["Reconstruction", "total_variation", "tv"]


class Reconstruction(NamedTuple):
    """``x`` ``(B, C, H, W)``, iterations spent, and the last relative change of every sample ``(B,)``."""

    x: Tensor
    iterations: int
    change: Tensor


def _differences(x: Tensor) -> Tensor:
    return torch.cat([pad(x.diff(dim=-2), (0, 0, 0, 1)), pad(x.diff(dim=-1), (0, 1))], 1)


def _differences_adjoint(d: Tensor) -> Tensor:
    down, right = d.chunk(2, 1)  # their last row and column are zero
    return pad(down[..., :-1, :], (0, 0, 1, 0)) - down + pad(right[..., :-1], (1, 0)) - right


def tv(x: Tensor) -> Tensor:
    """Total variation of images ``(B, C, H, W)``, shape ``(B,)``."""
    return _differences(x).square().sum(1).sqrt().flatten(1).sum(1)


@lru_cache(maxsize=16)
def _cosine_basis(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Eigenvectors (columns) and eigenvalues of ``D^T D`` along an axis of ``n`` pixels."""
    k = torch.arange(n, dtype=torch.float64)
    basis = torch.cos(math.pi / n * (k[:, None] + 0.5) * k) * (2 / n) ** 0.5
    basis[:, 0] /= 2**0.5
    return basis.to(device, dtype), (2 - 2 * torch.cos(math.pi * k / n)).to(device, dtype)


@torch.no_grad()
def total_variation(
    A: LinearOperator, y: Tensor, weight: Scalar, *, tolerance: float = 1e-5, max_iterations: int = 2000
) -> Reconstruction:
    """Minimise ``1/2 |A x - y|^2 + weight TV(x)`` for a batch of images.

    Args:
        A: any operator on images; one whose solves are exact is much faster.
        y: measurements ``(B, ...)`` of images in [-1, 1] (step sizes suit that range; others converge later).
        weight: positive; one number or one per sample ``(B,)``.
        tolerance: stop when an iteration (a mean over five) changes no sample by more than this part of its norm.
        max_iterations: after these the best effort is returned, with a warning.

    Raises:
        ValueError: when the weight is not positive.
    """
    w = per_sample(weight, y.new_empty(y.shape[0], 1, 1, 1))
    if not bool((w > 0).all()):
        raise ValueError(f"the weight of total variation must be positive, got {weight}")
    # Penalties: weight/rho_d is the size of a difference at an edge (1/4), and rho_z couples the data to the smoother.
    # An iterative solve has to be right to 1e-5 here: 1e-3, its usual tolerance, of the unit.
    rho_z, rho_d, over, unit = w, 4 * w, 1.8, 1e-4 * w.reshape(-1)
    x = z = last = A.gram_solve(0.01, 1.0, None, y)
    d, u_z, u_d = _differences(x), torch.zeros_like(x), torch.zeros_like(_differences(x))
    (v_h, lam_h), (v_w, lam_w) = (_cosine_basis(n, x.dtype, x.device) for n in x.shape[-2:])
    smoother = rho_z + rho_d * (lam_h[:, None] + lam_w)
    change, iteration = x.new_full((x.shape[0],), math.inf), 0
    while iteration < max_iterations and bool((change > tolerance).any()):
        iteration += 1
        target = rho_z * (z - u_z) + rho_d * _differences_adjoint(d - u_d)
        x = v_h @ (v_h.T @ target @ v_w / smoother) @ v_w.T
        x_over, d_over = over * x + (1 - over) * z, over * _differences(x) + (1 - over) * d
        z = A.gram_solve(rho_z.reshape(-1), 1.0, rho_z * (x_over + u_z), y, unit=unit)
        u_z = u_z + x_over - z
        v = d_over + u_d
        u_d = v * (0.25 / v.square().sum(1, keepdim=True).sqrt().clamp_min(0.25))  # the part that shrinking takes away
        d = v - u_d
        if iteration % 5 == 0:
            change, last = (x - last).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1).clamp_min(1e-12) / 5, x
    if bool((change > tolerance).any()):
        warnings.warn(f"total variation: change {float(change.max()):.0e} after {iteration} iterations", stacklevel=2)
    return Reconstruction(x, iteration, change)
