r"""Blur and downsampling by name: each constructor picks the structure with an exact solve where there is one.

circular, any kernel                    Fourier            exact
the same, then decimated                polyphase          exact
separable kernel, any boundary          Kronecker SVD      exact
any kernel with another boundary        conjugate gradients

All of them act on 1-D signals, images or volumes: as many of the last dimensions as the kernel has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from posteriori.operators.base import LinearOperator
from posteriori.operators.boundaries import BoundaryConvolution, PaddedConvolution
from posteriori.operators.decimation import CircularDownsampling
from posteriori.operators.fourier import CircularConvolution
from posteriori.operators.kronecker import Boundary, ConvolutionAxis, ResamplingAxis, Separable

__all__ = ["Blur", "Downsampling", "GaussianBlur", "PaddedConvolution", "gaussian_taps", "motion_kernel"]


def gaussian_taps(sigma: float, taps: int | None = None) -> tuple[float, ...]:
    """Normalised samples of a Gaussian.

    Args:
        sigma: standard deviation in pixels, positive.
        taps: number of samples, odd; by default out to 4 sigma.
    """
    if not (sigma > 0 and math.isfinite(sigma)):
        raise ValueError(f"a Gaussian blur needs a positive width in pixels, got {sigma}")
    if taps is not None and (taps < 1 or taps % 2 == 0):
        raise ValueError(f"a Gaussian needs an odd number of taps to have a centre, got {taps}")
    radius = (taps - 1) // 2 if taps else max(1, math.ceil(4 * sigma))
    values = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-radius, radius + 1)]
    return tuple(v / sum(values) for v in values)


def motion_kernel(size: int = 61, intensity: float = 0.5, seed: int = 0) -> Tensor:
    """Random camera-shake kernel: a smooth random trajectory drawn into a ``(size, size)`` grid, summing to 1.

    The hand's direction turns at random; ``intensity`` in [0, 1] is how much (0 is a straight stroke). The
    trajectory is centred on its mass, so a blurred picture does not move. After the trajectories of Boracchi & Foi
    (2012), as used by the motion-blur task of DPS.
    """
    if size < 3 or not 0 <= intensity <= 1:
        raise ValueError(f"need size >= 3 and intensity in [0, 1], got {size} and {intensity}")
    generator = torch.Generator().manual_seed(seed)
    points = 64 * size // 16
    noise = torch.randn(points, 2, generator=generator, dtype=torch.float64)
    angle = 2 * math.pi * torch.rand((), generator=generator, dtype=torch.float64)
    turn = (noise[:, 0] * 2.5 * intensity / math.sqrt(points) * math.pi).cumsum(0) + angle
    speed = 0.6 + 0.4 * torch.sin(noise[:, 1].cumsum(0) / math.sqrt(points) * math.pi)
    path = torch.stack([turn.sin() * speed, turn.cos() * speed], 1).cumsum(0)
    extent = float((path.max(0).values - path.min(0).values).max())
    length = (0.35 + 0.4 * float(torch.rand((), generator=generator, dtype=torch.float64))) * (size - 3)
    path = (path - path.mean(0)) * (length / max(extent, 1e-9)) + (size - 1) / 2
    path = path.clamp(0.5, size - 1.5)
    kernel = torch.zeros(size, size, dtype=torch.float64)
    base = path.floor().long()
    fraction = path - base
    for dy in (0, 1):
        for dx in (0, 1):
            wy = fraction[:, 0] if dy else 1 - fraction[:, 0]
            wx = fraction[:, 1] if dx else 1 - fraction[:, 1]
            kernel.index_put_((base[:, 0] + dy, base[:, 1] + dx), wy * wx, accumulate=True)
    return (kernel / kernel.sum()).float()


def _separate(kernel: Tensor) -> list[tuple[float, ...]] | None:
    """Taps along each dimension of a rank-one kernel, else ``None``; a kernel being fitted may become anything."""
    if kernel.requires_grad:
        return None
    if kernel.ndim == 1:
        return [tuple(kernel.double().tolist())]
    u, s, vt = torch.linalg.svd(kernel.double().flatten(1), full_matrices=False)
    if s.numel() > 1 and float(s[1]) > 1e-6 * float(s[0]):
        return None
    sign = 1.0 if float(u[:, 0].sum()) >= 0 else -1.0  # never 0: the taps of a derivative sum to 0
    root = float(s[0]) ** 0.5
    rest = _separate((sign * root * vt[0]).reshape(kernel.shape[1:]))
    return None if rest is None else [tuple((sign * root * u[:, 0]).tolist()), *rest]


def _check_boundary(boundary: str) -> None:
    if boundary not in ("reflect", "replicate", "zero", "circular", "valid"):
        raise ValueError(f"unknown boundary {boundary!r}: choose 'reflect', 'replicate', 'zero', 'circular' or 'valid'")


def _kernel(kernel: Tensor, batch: bool = False) -> Tensor:
    k = torch.as_tensor(kernel)
    k = k if k.is_floating_point() else k.float()
    if k.ndim < 1 + batch or k.numel() == 0 or not bool(torch.isfinite(k).all()):
        raise ValueError(
            "a kernel is a finite tensor, (k,) for signals, (kh, kw) for images, (kd, kh, kw) for volumes, the batch "
            f"first per sample; got {tuple(k.shape)}"
        )
    return k


def Blur(  # noqa: N802 - a constructor by name, like the classes beside it
    kernel: Tensor, boundary: Boundary = "reflect", *, per_sample: bool = False
) -> LinearOperator:
    """Convolution of signals, images or volumes with a kernel.

    Args:
        kernel: ``(k,)``, ``(kh, kw)`` or ``(kd, kh, kw)``, centre at entry ``size // 2``; with ``per_sample`` the
            batch comes first. It acts on as many of the last dimensions as it has. It is used as it is; most kernels
            should sum to 1.
        boundary: what lies outside: ``"reflect"`` (border entry not repeated), ``"replicate"``, ``"zero"`` or
            ``"circular"``; or ``"valid"``: the measurement is smaller, only where the whole kernel fits.
        per_sample: one kernel per sample of the batch.

    Returns:
        An operator with an exact solve for circular boundaries and separable kernels (unless the kernel requires a
        gradient), else one that solves by conjugate gradients; ``A.solver`` tells.

    Raises:
        ValueError: on an unusable kernel or boundary.
    """
    k = _kernel(kernel, per_sample)
    _check_boundary(boundary)
    if boundary == "circular":
        return CircularConvolution(k, per_sample=per_sample)
    factors = [_separate(one) for one in (k if per_sample else k.unsqueeze(0))]
    kept = [f for f in factors if f is not None]
    if len(kept) == len(factors):
        axes = [[ConvolutionAxis(taps, boundary) for taps in axis] for axis in zip(*kept, strict=True)]
        return Separable(*axes, name=f"Blur({'x'.join(map(str, k.shape[per_sample:]))}, {boundary})")
    if k.ndim == 2 and boundary != "valid":
        return PaddedConvolution(k, boundary)
    return BoundaryConvolution(k, boundary, per_sample=per_sample)


def GaussianBlur(  # noqa: N802
    sigma: float | Sequence[float], taps: int | None = None, boundary: Boundary = "reflect", *, dims: int = 2
) -> Separable:
    """Gaussian blur of ``sigma`` pixels (one value, or one per sample), exact for every boundary.

    ``dims`` is how many of the last dimensions are blurred: 1 for signals, 2 for images, 3 for volumes.
    """
    _check_boundary(boundary)
    _check_dims(dims)
    sigmas = list(sigma) if isinstance(sigma, Sequence) else [sigma]
    axes = [ConvolutionAxis(gaussian_taps(s, taps), boundary) for s in sigmas]
    shown = f"{sigmas[0]:g}" if len(sigmas) == 1 else f"{len(sigmas)} widths"
    return Separable(*[axes] * dims, name=f"GaussianBlur({shown}, {boundary})")


def _check_dims(dims: int) -> None:
    if int(dims) != dims or dims < 1:
        raise ValueError(f"dims is how many of the last dimensions are meant, a whole number from 1 on; got {dims}")


def _block_gaussian(factor: int, sigma: float | None) -> tuple[float, ...]:
    """Gaussian taps centred on a block, out to 4 sigma; of a block of even size its centre lies between entries."""
    if factor == 1 and sigma is None:
        return (1.0,)
    s = (factor - 1) / 2 if sigma is None else sigma
    if not (s > 0 and math.isfinite(s)):
        raise ValueError(f"a Gaussian filter needs a positive width in pixels, got {s}")
    radius = math.ceil(4 * s) + (0 if factor % 2 else 0.5)
    values = [math.exp(-0.5 * ((i - radius) / s) ** 2) for i in range(int(2 * radius) + 1)]
    return tuple(v / sum(values) for v in values)


def Downsampling(  # noqa: N802
    factor: int | Sequence[int],
    kernel: Literal["box", "bicubic", "gaussian"] | Tensor = "box",
    boundary: Boundary = "reflect",
    *,
    dims: int = 2,
    sigma: float | None = None,
) -> Separable | CircularDownsampling:
    """Antialiased downsampling of signals, images or volumes by integer factors, exact.

    Args:
        factor: at least 1, or one for each downsampled dimension; sizes must be multiples of it.
        kernel: ``"box"`` (block average), ``"bicubic"`` (antialiased, as Pillow), ``"gaussian"``, or a filter
            centred on every block, with as many dimensions as are downsampled: separable, or any with the boundary
            ``"circular"``.
        boundary: for a Gaussian or given filter, what lies outside, as for :func:`Blur`; with ``"valid"`` the filter
            is applied wherever it fits, at every ``factor``-th place.
        dims: how many of the last dimensions are downsampled, where neither ``factor`` nor ``kernel`` tells.
        sigma: width of the Gaussian in pixels of the signal; ``(factor - 1) / 2`` if left out, as scikit-image.

    Raises:
        ValueError: on a bad factor or filter, or one that is not separable with a boundary other than circular.
    """
    _check_boundary(boundary)
    _check_dims(dims)
    rank = kernel.ndim if isinstance(kernel, Tensor) else len(factor) if isinstance(factor, Sequence) else dims
    factors = tuple(factor) if isinstance(factor, Sequence) else (factor,) * rank
    if len(factors) != rank or rank == 0 or any(int(f) != f or f < 1 for f in factors):
        raise ValueError(f"a downsampling factor is a whole number from 1 on, or {rank} of them; got {factor}")
    factors = tuple(map(int, factors))
    shown = "x".join(map(str, factors if len(set(factors)) > 1 else factors[:1]))
    if isinstance(kernel, Tensor):
        k = _kernel(kernel)
        taps = _separate(k)
        if taps is None:
            if boundary != "circular":
                why = "is being fitted" if k.requires_grad else "is not separable"
                raise ValueError(f"this filter {why}: that takes boundary='circular', not {boundary!r}")
            return CircularDownsampling(k, factors)
        name = f"Downsampling({shown}, {'x'.join(map(str, k.shape))} taps, {boundary})"
    elif kernel == "gaussian":
        taps = [_block_gaussian(f, sigma) for f in factors]
        name = f"Downsampling({shown}, gaussian, {boundary})"
    elif kernel in ("box", "bicubic"):
        return Separable(*[ResamplingAxis(f, kernel) for f in factors], name=f"Downsampling({shown}, {kernel})")
    else:
        raise ValueError(
            f"unknown downsampling kernel {kernel!r}: choose 'box', 'bicubic', 'gaussian' or give the taps"
        )
    return Separable(*[ConvolutionAxis(t, boundary, f) for t, f in zip(taps, factors, strict=True)], name=name)
