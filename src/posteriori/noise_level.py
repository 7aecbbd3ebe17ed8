r"""The noise level of a measurement from the measurement itself, ``estimate_sigma_y(A, y)``.

White noise is equally strong in every direction, the signal is not: the noise is what is left in the directions where
the signal vanishes. Three sources of such directions, the first that has enough of them decides.

1. The operator's own: coefficients of ``y`` whose singular value is so small that no signal can be seen through it
   (the fine detail of a blurred picture), and what no signal explains at all, ``y - A A^+ y`` (repeated measurements).
2. The picture's: small patches of a photo fill a few dimensions of their space, so the principal component with the
   least variance holds noise (Chen, Zhu, Heng, ICCV 2015, take the least eigenvalues of the patches' covariance).
   Found on one half of the patches, the component is measured on the other, where its choice has no influence, and by
   the median, which edges do not move. What this leaves is upward: texture is mistaken for noise.
3. With missing pixels: patches that miss the same pixels are complete vectors of fewer entries. Saturated pixels
   count as missing; without them, clipping would hide noise.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from posteriori.operators import (
    Bayer,
    BoundaryConvolution,
    ChannelMixing,
    CircularConvolution,
    CircularDownsampling,
    Composition,
    Crop,
    LinearOperator,
    Matrix,
    Pad,
    PaddedConvolution,
    Separable,
    SpectralOperator,
    Stack,
    Weighting,
)
from posteriori.operators.algebra import Padded, Scaled
from posteriori.operators.base import per_sample
from posteriori.operators.products import ChannelProduct, ConvolutionProduct, PickingProduct

__all__ = ["estimate_sigma_y"]

# Operators whose measurement of a photo looks like one.
_PICTURES = (
    Weighting, Bayer, Crop, Pad, PickingProduct, CircularConvolution, ConvolutionProduct, Separable, PaddedConvolution,
    BoundaryConvolution, CircularDownsampling, ChannelMixing, ChannelProduct,
)  # fmt: skip
_FEWEST = 30  # values of noise: a standard error of 13 %
_NORMAL_MEDIAN = 0.6744897501960817  # of |z|


@torch.no_grad()
def estimate_sigma_y(A: LinearOperator, y: Tensor) -> Tensor:
    """Standard deviation of the white noise of every measurement, from the measurement alone.

    Args:
        A: the operator.
        y: measurements ``(B, *measurement)``; pictures should not be denoised, sharpened or compressed hard.

    Returns:
        ``(B,)``, float64, in the units of ``y``. Texture finer than the pixels allow looks like noise, so small levels
        are overestimated: by how much is in the documentation.

    Raises:
        ValueError: when the measurement says nothing about its noise: too few or no redundant entries, no picture.
    """
    if not bool(torch.isfinite(y).all()):
        raise ValueError("the measurement holds NaN or infinite values: mask those entries out instead")
    y = y.double()
    known = _from_operator(A, y)
    if known is not None:
        return known
    if isinstance(A, Stack):
        parts = [estimate_sigma_y(part, p) for part, p in zip(A.operators, A.split(y), strict=True)]
        joint = [per_sample(w, s) * s for w, s in zip(A.weights, parts, strict=True)]
        return torch.stack(joint).log().mean(0).exp()
    if y.ndim < 3:
        raise ValueError(
            f"the noise of {A!r} cannot be told from its signal: a list of numbers has no neighbourhoods, and no "
            "entry is redundant; give sigma_y"
        )
    observed = A.observed(y)
    kept = torch.ones_like(y, dtype=torch.bool) if observed is None else (observed > 0).expand(y.shape)
    if isinstance(A, Bayer):  # each place of the cell is a channel of a smaller picture
        y, kept = (_unshuffled(z, A.pattern) for z in (y, kept))
    levels = [_from_patches(picture, mask, _is_picture(A)) for picture, mask in zip(y, kept, strict=True)]
    return torch.tensor(levels, dtype=torch.float64, device=y.device)


def _is_picture(A: LinearOperator) -> bool:
    if isinstance(A, Scaled | Padded):
        return _is_picture(A.operator)
    if isinstance(A, Composition):
        return all(map(_is_picture, A.operators))
    return isinstance(A, _PICTURES)


# -- directions that the operator gives -------------------------------------------------------------------------------


def _from_operator(A: LinearOperator, y: Tensor) -> Tensor | None:
    """From entries of ``y`` that hold no signal, or ``None`` where there are too few."""
    while isinstance(A, Scaled):
        A = A.operator
    if not isinstance(A, SpectralOperator):
        return None
    if isinstance(A, Matrix) or isinstance(A, Stack):  # noqa: SIM101 - as one test it is no SpectralOperator for mypy
        return _from_residual(A, y)
    x = y.new_empty(1).expand(y.shape[0], *A.signal_shape(y.shape[1:]))
    c = A.adjoint_coefficients(y)
    lam = A.eigenvalues(x).to(c.real.dtype).expand(c.shape)
    # c / sqrt(lam) is y in the basis of the measurement; left out where the quotient loses its digits
    usable = (lam > 1e-40 * lam.max()).flatten(1)
    size = torch.where(lam > 0, c.abs() / lam.clamp_min(1e-300).sqrt(), 0).flatten(1)
    relative = (lam / lam.amax()).flatten(1)
    levels = []
    for values, weight, ok, power in zip(size, relative, usable, y.square().flatten(1).mean(1), strict=True):
        limit, level = 1e-6, math.nan
        for _ in range(4):  # the weaker the noise, the smaller a singular value has to be
            chosen = values[ok & (weight <= limit)]
            if chosen.numel() < 1000:
                return None
            median = float(chosen.median())
            level = median / math.sqrt(math.log(2)) if c.is_complex() else median / _NORMAL_MEDIAN
            limit = 0.02 * level**2 / float(power)
        levels.append(level)
    return torch.tensor(levels, dtype=torch.float64, device=y.device)


def _from_residual(A: SpectralOperator, y: Tensor) -> Tensor | None:
    """From ``y - A A^+ y``, which has as many degrees of freedom as there are more measurements than singular
    values."""
    try:
        residual = y - A(A.pinv(y))
    except ValueError:  # no stable pseudo-inverse
        return None
    x = y.new_empty(1).expand(y.shape[0], *A.signal_shape(y.shape[1:]))
    rank = A.spectral_diagonal(lambda lam: (~A.unseen(lam)).to(lam.dtype), x).expand(x.shape).flatten(1).sum(1)
    freedom = A.measurement_count(y) - rank
    if bool((freedom < _FEWEST).any()):
        return None
    observed = A.observed(y)
    residual = residual if observed is None else residual * observed
    return (residual.flatten(1).square().sum(1) / freedom).sqrt()


# -- directions that pictures leave empty -----------------------------------------------------------------------------


def _unshuffled(z: Tensor, pattern: tuple[str, ...]) -> Tensor:
    rows, columns = len(pattern), len(pattern[0])
    z = z[..., : z.shape[-2] // rows * rows, : z.shape[-1] // columns * columns]
    return torch.cat([z[..., i::rows, j::columns] for i in range(rows) for j in range(columns)], 1)


def _from_patches(picture: Tensor, mask: Tensor, is_picture: bool) -> float:
    """Noise of one picture ``(C, ..., H, W)``; ``mask`` tells which entries are measured."""
    channels = picture.shape[0] if picture.ndim > 2 else 1
    z, m = (v.reshape(channels, -1, *v.shape[-2:]).transpose(0, 1) for v in (picture, mask))  # slices are samples
    if channels > 1 and bool((z == z[:, :1]).all()):
        z, m = z[:, :1], m[:, :1]  # a grey picture as colours: one noise, seen several times
    for extreme in (z[m].max(), z[m].min()) if bool(m.any()) else ():
        saturated = z == extreme
        if int((saturated & m).sum()) > 1e-3 * int(m.sum()):
            m = m & ~saturated
    for side in (5, 4, 3, 2):
        if side > min(z.shape[-2:]):
            continue
        share = 0.6 if side > 2 else 0.5
        groups = _complete_patches(z, m, side, share)
        rows = sum(len(g) for g in groups)
        if rows >= (400 if side > 2 else _FEWEST):
            levels = [_least_component(g, is_picture) for g in groups]
            return sum(len(g) * level for g, level in zip(groups, levels, strict=True)) / rows
    raise ValueError(
        f"the noise cannot be estimated from {int(m.sum())} scattered measurements: too few of them have measured "
        "neighbours (saturated ones do not count); give sigma_y"
    )


def _complete_patches(z: Tensor, m: Tensor, side: int, share: float) -> list[Tensor]:
    """Patches that have the same entries measured, ``(n, d)`` for each such pattern that is common enough."""
    # Not more than the precision needs, so that large photos cost no more; with holes every patch is welcome.
    most = 40_000 if side > 2 else 400_000
    stride = math.ceil(math.sqrt(z.shape[0] * z.shape[-2] * z.shape[-1] / most))
    columns = [functional.unfold(v, side, stride=stride).transpose(1, 2).flatten(0, 1) for v in (z, m.to(z.dtype))]
    patches, kept = columns[0], columns[1] > 0
    enough = kept.sum(1) >= max(2, share * kept.shape[1])
    patches, kept = patches[enough], kept[enough]
    if len(patches) == 0:
        return []
    codes = np.packbits(kept.cpu().numpy(), axis=1)
    _, inverse, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    index = torch.from_numpy(inverse.reshape(-1)).to(z.device)
    groups = []
    for g in np.argsort(-counts)[:24]:
        members = index == int(g)
        measured = kept[members][0]
        if counts[g] >= 8 * int(measured.sum()):
            groups.append(patches[members][:, measured])
    return groups


def _least_component(patches: Tensor, is_picture: bool) -> float:
    """Standard deviation of the patches ``(n, d)`` along the direction in which they vary least."""
    n, d = patches.shape
    # bands in turn: neighbouring patches overlap, and should be in the same half
    half = (torch.arange(n, device=patches.device) * 16 // n) % 2
    total = 0.0
    for chosen in (0, 1):
        train, rest = (p - p.mean(0) for p in (patches[half == chosen], patches[half != chosen]))
        variances, directions = torch.linalg.eigh(train.T @ train / len(train))
        count = min(max(1, 8000 // n), max(1, d // 8))  # more directions where patches are few
        spread = (rest @ directions[:, :count]).abs().median(0).values / _NORMAL_MEDIAN
        if not is_picture and float(spread.square().mean()) > 0.5 * float(variances.mean()):
            raise ValueError(
                "neighbouring measurements have nothing in common, so noise and signal look alike: give sigma_y"
            )
        total += float(spread.square().mean().sqrt()) / 2
    return total
