r"""What a piecewise smooth picture would be: an estimate from ``y`` alone that knows neighbours and edges.

    x = argmin |y - A x|^2 / sigma_y^2 + sum_pixels w |D x|^2,      w = 16 / s^2 at first

Under ``N(0, s^2 I)``, the prior of the preconditioning, nothing is known of a missing pixel. Here its neighbours speak
for it: a hole is spanned by a membrane from its rim, a blurred or small photo is enlarged without ringing, whatever the
size of the picture. Then ``w`` is set anew in every pixel, twice, to ``l / sqrt(|D x|^2 + e^2)`` with ``l = 3/(2 s)``
and ``e = s/16``: where there is an edge it is no longer smoothed. ``|D x|^2`` is the sum over both axes and all
channels, so edges of colours coincide. These are the first steps from the membrane to total variation (lagged
diffusivity, Vogel & Oman 1996; iteratively reweighted least squares, Wohlberg & Rodriguez 2007), which gain most.

A network that is shown this estimate need not carry colours across the picture by itself, and its receptive field no
longer limits how large a hole it can fill; nor need it deconvolve by itself.

Solved by fixed numbers of conjugate gradients, which makes it the same wherever it is computed. The preconditioner
adds up corrections on all scales (Bramble, Pasciak & Xu 1990): a large hole needs no more iterations than a small one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from posteriori.operators.base import LinearOperator, Scalar, full_precision, per_sample

__all__ = ["graph_laplacian", "smooth_estimate"]

ITERATIONS = 8  # a round; the first is of the membrane
ROUNDS = 3
LARGEST_MATRIX = 128  # pixels along an axis, up to which products of matrices are the cheaper way between scales
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
    rounds: int = ROUNDS,
) -> Tensor:
    """The module's ``x``, ``(B, C, H, W)``.

    Args:
        y: ``(B, *measurement)``.
        A: the operator.
        shape: ``(B, C, H, W)``.
        sigma_y: one number, or one per sample; less than 0.01 counts as 0.01.
        prior_std: ``s``.
        iterations: of conjugate gradients in every round.
        rounds: 1 for the membrane; ``w`` is set anew before every further one.

    Raises:
        ValueError: when the signals are not images.
    """
    if len(shape) != 4:
        raise ValueError(f"the smooth estimate is one of images (B, C, H, W), got signals of shape {tuple(shape[1:])}")
    rhs = A.adjoint(y)
    weight = per_sample(sigma_y, rhs).clamp_min(LEAST_NOISE) ** -2
    rhs = weight * rhs
    # what is measured of smooth pictures, pixel by pixel
    seen = (weight * A.gram(torch.ones_like(rhs))).clamp_min(0)
    w = torch.full_like(rhs[:, :1], 16 / prior_std**2)
    x = torch.zeros_like(rhs)
    for turn in range(rounds):
        if turn:
            w = 1.5 / prior_std * (_gradient_squares(x) + (prior_std / 16) ** 2).rsqrt()

        def apply(x: Tensor, w: Tensor = w) -> Tensor:
            return weight * A.gram(x) + graph_laplacian(x, (2, 3), w)

        x = _descend(apply, _Scales(seen, w), x, rhs - apply(x) if turn else rhs, iterations)
    return x


def _descend(
    apply: Callable[[Tensor], Tensor], precondition: Callable[[Tensor], Tensor], x: Tensor, r: Tensor, iterations: int
) -> Tensor:
    """Conjugate gradients from ``x``, whose residual is ``r``."""
    p, before = torch.zeros_like(x), x.new_ones(())
    for _ in range(iterations):
        z = precondition(r)
        rz = _inner(r, z)
        p = torch.addcmul(z, rz / before, p)
        q = apply(p)
        step = rz / _inner(p, q).clamp_min(1e-30)
        x, r = torch.addcmul(x, step, p), torch.addcmul(r, step, q, value=-1)
        before = rz.clamp_min(1e-30)
    return x


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1)).reshape(-1, 1, 1, 1)


def graph_laplacian(x: Tensor, axes: Sequence[int], weights: Tensor | None = None) -> Tensor:
    """``D^T w D x``: ``D`` are the differences of every pixel to the next one along these axes, ``w`` that pixel's
    weight, 1 when left out."""
    result = torch.zeros_like(x)
    for axis in axes:
        d = x.diff(dim=axis)
        n = d.shape[axis]
        if weights is not None:
            d = d.mul_(weights.narrow(axis, 0, n))
        result.narrow(axis, 0, n).sub_(d)
        result.narrow(axis, x.shape[axis] - n, n).add_(d)
    return result


def _gradient_squares(x: Tensor) -> Tensor:
    """``|D x|^2`` of every pixel, over both axes and all channels, ``(B, 1, H, W)``."""
    result = torch.zeros_like(x[:, :1])
    for axis in (2, 3):
        d = x.diff(dim=axis).square().sum(1, keepdim=True)
        result.narrow(axis, 0, d.shape[axis]).add_(d)
    return result


class _Scales:
    """``r -> D_0^-1 r + W (sum_l P_l D_l^-1 P_l^T) W r``: pictures of a half, a quarter, ... of the resolution, each
    scaled by what the equation's diagonal would be there, down to a single pixel.

    ``W`` is near 0 where pixels are measured: what spans a hole ends at its rim. Weights that differ between pixels,
    ``(B, 1, H, W)``, are known to the finest scale and by their mean to the others.
    """

    def __init__(self, seen: Tensor, weights: Tensor) -> None:
        self.diagonal = seen + 4 * weights
        smoothness = weights.mean((2, 3), keepdim=True)
        self.free = 1 / (1 + seen / (4 * smoothness))
        cost = self.free.square() * seen + smoothness * _steps(self.free)
        self.sizes = [cost.shape[-2:]]
        coarse: list[Tensor] = []
        while max(self.sizes[-1]) > 1:
            cost = _restrict(cost, 1.0)  # of hats, which reach into the next block
            self.sizes.append(cost.shape[-2:])
            coarse.append(cost + 4 * smoothness / 4 ** (len(coarse) + 1))
        apart = next((k for k, size in enumerate(self.sizes) if max(size) <= LARGEST_MATRIX), 0)
        self.coarse, together = coarse[:apart], coarse[apart:]
        self.rows, self.columns = (_hats(n, len(together), cost.dtype, cost.device) for n in self.sizes[apart])
        self.inverse = cost.new_zeros(*cost.shape[:2], len(self.rows), len(self.columns))
        top = left = 0
        for diagonal in together:
            h, w = diagonal.shape[-2:]
            self.inverse[..., top : top + h, left : left + w] = 1 / diagonal
            top, left = top + h, left + w

    def __call__(self, r: Tensor) -> Tensor:
        parts = [self.free * r]
        for _ in self.coarse:
            parts.append(_restrict(parts[-1]))
        z = self.rows.T @ (self.inverse * (self.rows @ parts[-1] @ self.columns.T)) @ self.columns
        for k in reversed(range(len(self.coarse))):
            z = _prolong(z.addcdiv_(parts[k + 1], self.coarse[k]), self.sizes[k])
        return torch.addcdiv(self.free * z, r, self.diagonal)


@lru_cache(maxsize=32)
def _hats(n: int, levels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Along one axis of ``n`` pixels the hats of all scales, one a row: small pictures take them all at once."""
    rows, line = [], torch.eye(n, dtype=dtype, device=device)
    for _ in range(levels):
        line = _restrict_axis(line, 0, 2**0.5)
        rows.append(line)
    return torch.cat(rows) if rows else line[:0]


def _restrict(x: Tensor, total: float = 2**0.5) -> Tensor:
    """Inner products with hats of the next scale, ``[1, 3, 3, 1]/8`` of the pixels along an axis, times ``total``."""
    return _restrict_axis(_restrict_axis(x, 2, total), 3, total)


def _restrict_axis(x: Tensor, axis: int, total: float) -> Tensor:
    """Along one axis, with the outermost pixels repeated beyond the border; as it is when it has one pixel."""
    size = x.shape[axis]
    if size == 1:
        return x
    n = (size + 1) // 2
    even, odd = (x[(slice(None),) * axis + (slice(k, None, 2),)] for k in (0, 1))
    result = 3 * even
    result.narrow(axis, 0, size // 2).add_(odd, alpha=3)
    result.narrow(axis, 0, n - 1).add_(even.narrow(axis, 1, n - 1))
    result.narrow(axis, 1, n - 1).add_(odd.narrow(axis, 0, n - 1))
    result.narrow(axis, 0, 1).add_(even.narrow(axis, 0, 1))
    if size % 2 == 0:
        result.narrow(axis, n - 1, 1).add_(odd.narrow(axis, n - 1, 1))
    return result.mul_(total / 8)


def _prolong(x: Tensor, size: Sequence[int]) -> Tensor:
    """The transpose of :func:`_restrict`, to pictures of ``size``."""
    for axis, length in ((3, size[1]), (2, size[0])):
        if length == 1:
            continue
        n = x.shape[axis] - 1
        even, odd = 3 * x, 3 * x
        even.narrow(axis, 1, n).add_(x.narrow(axis, 0, n))
        odd.narrow(axis, 0, n).add_(x.narrow(axis, 1, n))
        even.narrow(axis, 0, 1).add_(x.narrow(axis, 0, 1))
        odd.narrow(axis, n, 1).add_(x.narrow(axis, n, 1))
        x = torch.stack([even, odd], axis + 1).flatten(axis, axis + 1).narrow(axis, 0, length).mul_(2**0.5 / 8)
    return x


def _steps(x: Tensor) -> Tensor:
    """Half the squared differences of every pixel to its neighbours."""
    result = torch.zeros_like(x)
    for axis in (2, 3):
        d = x.diff(dim=axis).square() / 2
        result.narrow(axis, 0, d.shape[axis]).add_(d)
        result.narrow(axis, x.shape[axis] - d.shape[axis], d.shape[axis]).add_(d)
    return result
