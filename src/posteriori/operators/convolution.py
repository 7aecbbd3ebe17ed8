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
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from posteriori.operators.base import LinearOperator, full_precision
from posteriori.operators.boundaries import BoundaryConvolution
from posteriori.operators.decimation import CircularDownsampling
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


@lru_cache(maxsize=256)
def _fast_size(n: int) -> int:
    """The next number without prime factors above 5: others take a Fourier transform several times as long."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1


def _outside(n: int, margins: tuple[int, int], boundary: Boundary) -> list[Tensor]:
    """Which entries of an axis stand before its first and behind its last one."""
    before, behind = torch.arange(-margins[0], 0), torch.arange(n, n + margins[1])
    if boundary == "replicate":
        return [before.clamp_min(0), behind.clamp_max(n - 1)]
    return [-before, 2 * (n - 1) - behind]


def _extend(x: Tensor, axis: int, margins: tuple[int, int], boundary: Boundary) -> Tensor:
    if boundary == "zero":
        return functional.pad(x, (*[0] * (2 * (-1 - axis)), *margins))
    before, behind = (x.index_select(axis, i.to(x.device)) for i in _outside(x.shape[axis], margins, boundary))
    return torch.cat([before, x, behind], axis)


def _fold(x: Tensor, axis: int, n: int, margins: tuple[int, int], boundary: Boundary) -> Tensor:
    """Transpose of :func:`_extend`, from at least as many entries."""
    core = x.narrow(axis, margins[0], n)
    if boundary != "zero":
        parts = x.narrow(axis, 0, margins[0]), x.narrow(axis, margins[0] + n, margins[1])
        for i, part in zip(_outside(n, margins, boundary), parts, strict=True):
            core = core.index_add(axis, i.to(x.device), part)
    return core


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
        if boundary not in ("reflect", "replicate", "zero"):
            raise ValueError(f"unknown boundary {boundary!r} for padding: choose reflect, replicate or zero")
        self.kernel = k if k.is_floating_point() else k.float()
        self.boundary: Boundary = boundary
        # What lies before the first and behind the last entry of each axis.
        self._margins = [(m - 1 - m // 2, m // 2) for m in self.kernel.shape]
        self._transfers: dict[tuple[object, ...], Tensor] = {}  # a memo by size: derived from the kernel alone

    def _sizes(self, shape: Sequence[int]) -> list[int]:
        """Sizes for the transform of an extended image, as large as it or a little larger where that is faster."""
        extended = [n + before + behind for n, (before, behind) in zip(shape[-2:], self._margins, strict=True)]
        for n, margins in zip(shape[-2:], self._margins, strict=True):
            if self.boundary == "reflect" and max(margins) >= n:
                raise ValueError(
                    f"a kernel of {tuple(self.kernel.shape)} is too large to reflect a {shape[-2]}x{shape[-1]} image: "
                    "crop it"
                )
        return [_fast_size(n) for n in extended]

    def _transfer(self, sizes: list[int], like: Tensor) -> Tensor:
        if self.kernel.requires_grad:  # a kernel being fitted has a graph of its own at every call
            return torch.fft.rfftn(self.kernel.to(like), s=sizes)
        key = (*sizes, like.dtype, like.device)
        if key not in self._transfers:
            with torch.inference_mode(False):  # what is kept must serve training too
                self._transfers[key] = torch.fft.rfftn(self.kernel.to(like), s=sizes)
        return self._transfers[key]

    def forward(self, x: Tensor) -> Tensor:
        sizes = self._sizes(x.shape)
        extended = x
        for axis, margins in zip((-2, -1), self._margins, strict=True):
            extended = _extend(extended, axis, margins, self.boundary)
        # circular convolution of the extended image equals the convolution wherever the kernel does not wrap
        product = torch.fft.rfftn(extended, s=sizes, dim=(-2, -1)) * self._transfer(sizes, x)
        full = torch.fft.irfftn(product, s=sizes, dim=(-2, -1))
        (top, left), (h, w) = (sum(m) for m in self._margins), x.shape[-2:]
        return full[..., top : top + h, left : left + w]

    @full_precision
    def adjoint(self, y: Tensor) -> Tensor:
        sizes = self._sizes(y.shape)
        (top, left), (h, w) = (sum(m) for m in self._margins), y.shape[-2:]
        embedded = functional.pad(y, (left, sizes[1] - left - w, top, sizes[0] - top - h))
        product = torch.fft.rfftn(embedded, dim=(-2, -1)) * self._transfer(sizes, y).conj()
        folded = torch.fft.irfftn(product, s=sizes, dim=(-2, -1))
        for axis, n, margins in zip((-2, -1), (h, w), self._margins, strict=True):
            folded = _fold(folded, axis, n, margins, self.boundary)
        return folded

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(measurement_shape)

    def surrogate(self, like: Tensor) -> CircularConvolution:
        """The same blur wrapping around, of a kernel that is wrapped too where it is wider than the image."""
        k, sizes = self.kernel.detach().double(), like.shape[-2:]
        index = [(torch.arange(m) - m // 2 + n // 2) % n for m, n in zip(k.shape, sizes, strict=True)]
        wrapped = torch.zeros(sizes, dtype=k.dtype, device=k.device)
        wrapped.index_put_((index[0][:, None].to(k.device), index[1].to(k.device)), k, accumulate=True)
        return CircularConvolution(wrapped)

    def describe(self) -> str:
        return f"Blur({'x'.join(map(str, self.kernel.shape))}, {self.boundary}) [{self.solver}]"


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
