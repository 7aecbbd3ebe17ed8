r"""What a smooth picture would be: the posterior mean given ``y`` under a Gaussian prior that knows neighbours.

    x = argmin |y - A x|^2 / sigma_y^2 + |grad x|^2 / g^2,      g = s/4

Under ``N(0, s^2 I)``, the prior of the preconditioning, nothing is known of a missing pixel. Here its neighbours speak
for it: a hole is spanned by a membrane from its rim, a blurred or small photo is enlarged without ringing, whatever the
size of the picture. A network that is shown this estimate need not carry colours across the picture by itself, and its
receptive field no longer limits how large a hole it can fill.

Solved by a fixed number of conjugate gradients, which makes it the same wherever it is computed. The preconditioner
adds up corrections on all scales (Bramble, Pasciak & Xu 1990): a large hole needs no more iterations than a small one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from posteriori.operators.base import LinearOperator, Scalar, full_precision, per_sample

__all__ = ["smooth_estimate", "squared_differences"]

ITERATIONS = 16
LEAST_NOISE = 0.01  # below it the data term would only slow the iterations down


@full_precision
@torch.no_grad()
def smooth_estimate(
    y: Tensor,
    A: LinearOperator,
    shape: tuple[int, ...],
    *,
    sigma_y: Scalar,
    prior_std: float,
    iterations: int = ITERATIONS,
) -> Tensor:
    """The module's ``x``, ``(B, C, H, W)``.

    Args:
        y: ``(B, *measurement)``.
        A: the operator.
        shape: ``(B, C, H, W)``.
        sigma_y: one number, or one per sample; less than 0.01 counts as 0.01.
        prior_std: ``s``.
        iterations: of conjugate gradients; 8 to 16 reach the solution to what a network could tell, at any size.

    Raises:
        ValueError: when the signals are not images.
    """
    if len(shape) != 4:
        raise ValueError(f"the smooth estimate is one of images (B, C, H, W), got signals of shape {tuple(shape[1:])}")
    rhs = A.adjoint(y)
    weight = per_sample(sigma_y, rhs).clamp_min(LEAST_NOISE) ** -2
    smoothness = (prior_std / 4) ** -2
    rhs = weight * rhs

    def apply(x: Tensor) -> Tensor:
        return weight * A.adjoint(A(x)) + smoothness * squared_differences(x, (2, 3))

    # what is measured of smooth pictures, pixel by pixel
    seen = (weight * A.adjoint(A(torch.ones_like(rhs)))).clamp_min(0)
    precondition = _Scales(seen, smoothness)
    x, r = torch.zeros_like(rhs), rhs
    z = precondition(r)
    p, rz = z, _inner(r, z)
    for _ in range(iterations):
        q = apply(p)
        step = rz / _inner(p, q).clamp_min(1e-30)
        x, r = x + step * p, r - step * q
        z = precondition(r)
        rz, before = _inner(r, z), rz
        p = z + rz / before.clamp_min(1e-30) * p
    return x


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1).reshape(-1, 1, 1, 1)


def squared_differences(x: Tensor, axes: Sequence[int]) -> Tensor:
    """``D^T D x`` for the differences of neighbours along these axes."""
    result = torch.zeros_like(x)
    for axis in axes:
        d = x.diff(dim=axis)
        n = d.shape[axis]
        result.narrow(axis, 0, n).sub_(d)
        result.narrow(axis, x.shape[axis] - n, n).add_(d)
    return result


class _Scales:
    """``r -> D_0^-1 r + W (sum_l P_l D_l^-1 P_l^T) W r``: pictures of a half, a quarter, ... of the resolution, each
    scaled by what the equation's diagonal would be there.

    ``W`` is near 0 where pixels are measured: what spans a hole ends at its rim.
    """

    def __init__(self, seen: Tensor, smoothness: float) -> None:
        self.size = seen.shape[-2:]
        self.levels = max(min(self.size) - 1, 1).bit_length()
        side = 2**self.levels
        self.pad = (0, -self.size[1] % side, 0, -self.size[0] % side)
        self.diagonal = seen + 4 * smoothness
        self.free = 1 / (1 + seen / (4 * smoothness))
        cost = functional.pad(self.free.square() * seen + smoothness * _steps(self.free), self.pad)
        self.coarse = []
        for level in range(1, self.levels + 1):
            cost = functional.avg_pool2d(_blur(cost), 2)  # of hats, which reach into the next block
            self.coarse.append(cost + 4 * smoothness / 4**level)

    def __call__(self, r: Tensor) -> Tensor:
        parts = [functional.pad(self.free * r, self.pad)]
        for _ in range(self.levels):
            parts.append(2 * functional.avg_pool2d(_blur(parts[-1]), 2))
        z = torch.zeros_like(parts[-1])
        for part, diagonal in zip(parts[:0:-1], self.coarse[::-1], strict=True):
            z = _blur(functional.interpolate(z + part / diagonal, scale_factor=2, mode="nearest") / 2)
        return self.free * z[..., : self.size[0], : self.size[1]] + r / self.diagonal


def _steps(x: Tensor) -> Tensor:
    """Half the squared differences of every pixel to its neighbours."""
    result = torch.zeros_like(x)
    for axis in (2, 3):
        d = x.diff(dim=axis).square() / 2
        result.narrow(axis, 0, d.shape[axis]).add_(d)
        result.narrow(axis, x.shape[axis] - d.shape[axis], d.shape[axis]).add_(d)
    return result


def _blur(x: Tensor) -> Tensor:
    """``[1, 2, 1]/4`` along both axes, symmetric as a matrix; hats in place of steps."""
    for axis in (2, 3):
        n = x.shape[axis] - 1
        out = x / 2
        if n:
            out.narrow(axis, 0, n).add_(x.narrow(axis, 1, n), alpha=0.25)
            out.narrow(axis, 1, n).add_(x.narrow(axis, 0, n), alpha=0.25)
        x = out
    return x
