r"""Blur and downsampling by name: each constructor picks the structure with an exact solve where there is one.

circular, any kernel                    Fourier            exact
separable kernel, any boundary          Kronecker SVD      exact
any kernel with another boundary        conjugate gradients
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from posteriori.operators.base import LinearOperator, full_precision, transpose
from posteriori.operators.fourier import CircularConvolution
from posteriori.operators.kronecker import Boundary, ConvolutionAxis, ResamplingAxis, Separable
from posteriori.operators.krylov import KrylovOperator

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


_PADDING = {"reflect": "reflect", "replicate": "replicate", "zero": "constant"}  # torch's names


class PaddedConvolution(KrylovOperator):
    """Convolution of the last two dimensions with any kernel after padding the borders.

    Args:
        kernel: ``(kh, kw)``, centre at entry ``size // 2``.
        boundary: ``"reflect"``, ``"replicate"`` or ``"zero"``.

    Raises:
        ValueError: on an unusable kernel or boundary.
    """

    def __init__(self, kernel: Tensor, boundary: Boundary = "reflect") -> None:
        k = torch.as_tensor(kernel)
        if k.ndim != 2 or k.numel() == 0 or not bool(torch.isfinite(k).all()):
            raise ValueError(f"a blur kernel is a finite (kh, kw) tensor, got shape {tuple(k.shape)}")
        if boundary not in _PADDING:
            raise ValueError(f"unknown boundary {boundary!r} for padding: choose one of {', '.join(_PADDING)}")
        self.kernel = k if k.is_floating_point() else k.float()
        self.boundary: Boundary = boundary
        kh, kw = self.kernel.shape
        # torch order: left, right, top, bottom
        self._pad = (kw - 1 - kw // 2, kw // 2, kh - 1 - kh // 2, kh // 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right, top, bottom = self._pad
        h, w = x.shape[-2:]
        if self.boundary == "reflect" and (max(left, right) >= w or max(top, bottom) >= h):
            raise ValueError(f"a kernel of {tuple(self.kernel.shape)} is too large to reflect a {h}x{w} image: crop it")
        flat = x.reshape(1, -1, h, w)
        padded = functional.pad(flat, self._pad, mode=_PADDING[self.boundary])
        sizes = padded.shape[-2:]
        # circular correlation of the padded image equals the convolution wherever the kernel does not wrap
        transfer = torch.fft.rfftn(self.kernel.to(padded), s=sizes)
        full = torch.fft.irfftn(torch.fft.rfftn(padded, dim=(-2, -1)) * transfer, s=sizes, dim=(-2, -1))
        return full[..., sizes[0] - h :, sizes[1] - w :].reshape(x.shape)

    @full_precision
    def adjoint(self, y: Tensor) -> Tensor:
        return transpose(self.forward, y.shape[1:], y)

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(measurement_shape)

    def describe(self) -> str:
        return f"Blur({'x'.join(map(str, self.kernel.shape))}, {self.boundary}) [{self.solver}]"


def _separate(kernel: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Vertical and horizontal taps of a rank-one kernel, else ``None``."""
    u, s, vt = torch.linalg.svd(kernel.double())
    if s.numel() > 1 and float(s[1]) > 1e-6 * float(s[0]):
        return None
    sign = 1.0 if float(u[:, 0].sum()) >= 0 else -1.0  # never 0: the taps of a derivative sum to 0
    root = float(s[0]) ** 0.5
    return tuple((sign * root * u[:, 0]).tolist()), tuple((sign * root * vt[0]).tolist())


def Blur(  # noqa: N802 - a constructor by name, like the classes beside it
    kernel: Tensor, boundary: Boundary = "reflect", *, per_sample: bool = False
) -> LinearOperator:
    """Convolution of images with a kernel.

    Args:
        kernel: ``(kh, kw)``, centre at entry ``size // 2``; with ``per_sample`` ``(B, kh, kw)``. It is used as it
            is; most kernels should sum to 1.
        boundary: what lies outside the image: ``"reflect"`` (border pixel not repeated), ``"replicate"``,
            ``"zero"`` or ``"circular"``.
        per_sample: one kernel per sample of the batch.

    Returns:
        An operator with an exact solve for circular boundaries and separable kernels, else one that solves by
        conjugate gradients; ``A.solver`` tells.

    Raises:
        ValueError: on an unusable kernel or boundary.
    """
    k = torch.as_tensor(kernel)
    k = k if k.is_floating_point() else k.float()
    if k.ndim != 2 + per_sample or k.numel() == 0 or not bool(torch.isfinite(k).all()):
        raise ValueError(f"a blur kernel is a finite (kh, kw) tensor, (B, kh, kw) per sample; got {tuple(k.shape)}")
    if boundary == "circular":
        return CircularConvolution(k, per_sample=per_sample)
    if boundary not in ("reflect", "replicate", "zero"):
        raise ValueError(f"unknown boundary {boundary!r}: choose 'reflect', 'replicate', 'zero' or 'circular'")
    factors = [_separate(one) for one in (k if per_sample else k.unsqueeze(0))]
    kept = [f for f in factors if f is not None]
    if len(kept) == len(factors):
        heights = [ConvolutionAxis(f[0], boundary) for f in kept]
        widths = [ConvolutionAxis(f[1], boundary) for f in kept]
        return Separable(heights, widths, f"Blur({'x'.join(map(str, k.shape))}, {boundary})")
    if per_sample:
        raise ValueError(f"one non-separable kernel per sample needs boundary='circular', not {boundary!r}")
    return PaddedConvolution(k, boundary)


def GaussianBlur(  # noqa: N802
    sigma: float | Sequence[float], taps: int | None = None, boundary: Boundary = "reflect"
) -> Separable:
    """Gaussian blur of ``sigma`` pixels (one value, or one per sample), exact for every boundary."""
    sigmas = list(sigma) if isinstance(sigma, Sequence) else [sigma]
    axes = [ConvolutionAxis(gaussian_taps(s, taps), boundary) for s in sigmas]
    shown = f"{sigmas[0]:g}" if len(sigmas) == 1 else f"{len(sigmas)} widths"
    return Separable(axes, axes, f"GaussianBlur({shown}, {boundary})")


def Downsampling(  # noqa: N802
    factor: int,
    kernel: Literal["box", "bicubic"] | Tensor = "box",
    boundary: Boundary = "reflect",
) -> Separable:
    """Antialiased downsampling of images by an integer factor, exact.

    Args:
        factor: at least 1; both sides of an image must be multiples of it.
        kernel: ``"box"`` (block average), ``"bicubic"`` (antialiased, as Pillow), or a separable ``(kh, kw)``
            filter centred on every block.
        boundary: for a given filter, what lies outside the image.

    Raises:
        ValueError: on a bad factor or a filter that is not separable.
    """
    if int(factor) != factor or factor < 1:
        raise ValueError(f"a downsampling factor is a whole number from 1 on, got {factor}")
    if isinstance(kernel, Tensor):
        taps = _separate(kernel)
        if taps is None:
            raise ValueError("this downsampling filter is not separable; blur with Blur and decimate by composition")
        return Separable(
            ConvolutionAxis(taps[0], boundary, int(factor)),
            ConvolutionAxis(taps[1], boundary, int(factor)),
            f"Downsampling({factor}, {'x'.join(map(str, kernel.shape))} taps)",
        )
    if kernel not in ("box", "bicubic"):
        raise ValueError(f"unknown downsampling kernel {kernel!r}: choose 'box', 'bicubic' or give the taps")
    axis = ResamplingAxis(int(factor), kernel)
    return Separable(axis, axis, f"Downsampling({factor}, {kernel})")
