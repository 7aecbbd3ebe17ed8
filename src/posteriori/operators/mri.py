r"""Magnetic resonance: ``A = M F`` (one coil), ``A = [M F S_1; M F S_2; ...]`` (several).

``F`` is the unitary Fourier transform with the zero frequency in the middle of image and k-space (fastMRI's
convention), ``M`` the sampling mask, ``S_c`` the sensitivity of coil ``c``. Complex images are two real channels, real
and imaginary part, and so is k-space. One coil is diagonal in ``F``: ``lam = M``.

For images known to be real, ``A^T A x = Re F^* M F x = F^* (M(k) + M(-k))/2 F x``: the spectrum of a real ``x`` is
Hermitian, so the real part symmetrises the mask, and the solve stays exact. For any k-space ``z`` and real, even ``g``,
``Re F^* g z`` is ``F^* g`` of the Hermitian part of ``z``: taking the real part at the end is enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from posteriori.operators.base import SpectralFunction, SpectralOperator, full_precision
from posteriori.operators.fourier import complex_dtype
from posteriori.operators.krylov import KrylovOperator, Surrogate

__all__ = ["MRI", "MultiCoilMRI", "birdcage_maps", "cartesian_mask", "radial_mask"]

AXES = (-2, -1)


def _sizes(size: int | Sequence[int]) -> tuple[int, int]:
    h, w = (size, size) if isinstance(size, int) else size
    return h, w


def cartesian_mask(
    size: int | Sequence[int], acceleration: float = 4, center_fraction: float = 0.08, seed: int = 0
) -> Tensor:
    """Mask ``(H, W)`` of whole columns of k-space: the middle ones, and others at random.

    Args:
        size: ``(H, W)``, or one number for square images.
        acceleration: ``W`` over the number of columns measured, at least 1.
        center_fraction: share of columns measured in the middle.
        seed: of the others.
    """
    h, w = _sizes(size)
    middle, kept = round(w * center_fraction), round(w / acceleration)
    if acceleration < 1 or not 0 <= center_fraction <= 1 or kept < max(middle, 1):
        raise ValueError(
            f"{w} columns at acceleration {acceleration:g} leave {kept}, fewer than the {middle} of the middle: lower "
            "one of them"
        )
    start = (w - middle + 1) // 2
    others = torch.cat([torch.arange(start), torch.arange(start + middle, w)])
    picked = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[: kept - middle]]
    columns = torch.zeros(w)
    columns[start : start + middle] = 1
    columns[picked] = 1
    return columns.expand(h, w).contiguous()


def radial_mask(size: int | Sequence[int], spokes: int) -> Tensor:
    """Mask ``(H, W)`` of the grid points next to ``spokes`` diameters of k-space at equal angles."""
    h, w = _sizes(size)
    if spokes < 1:
        raise ValueError(f"a radial mask needs at least one spoke, got {spokes}")
    mask = torch.zeros(h, w)
    radius = torch.linspace(-0.5, 0.5, 4 * max(h, w), dtype=torch.float64)
    for k in range(spokes):
        angle = math.pi * k / spokes
        rows = (radius * math.sin(angle) * h).round().long() + h // 2
        columns = (radius * math.cos(angle) * w).round().long() + w // 2
        inside = (rows >= 0) & (rows < h) & (columns >= 0) & (columns < w)
        mask[rows[inside], columns[inside]] = 1
    return mask


def birdcage_maps(coils: int, size: int | Sequence[int], width: float = 0.7) -> Tensor:
    """Smooth complex sensitivities ``(coils, H, W)`` of coils on a circle around the image, normalised so that the sum
    of squares is 1 at every pixel."""
    h, w = _sizes(size)
    y = torch.linspace(-1, 1, h, dtype=torch.float64)[:, None]
    x = torch.linspace(-1, 1, w, dtype=torch.float64)[None]
    maps = []
    for k in range(coils):
        angle = 2 * math.pi * k / coils
        distance = (y - 1.2 * math.sin(angle)) ** 2 + (x - 1.2 * math.cos(angle)) ** 2
        phase = angle + 0.5 * (x * math.cos(angle) + y * math.sin(angle))
        maps.append(torch.polar(torch.exp(-distance / (2 * width**2)), phase))
    stacked = torch.stack(maps)
    return (stacked / stacked.abs().square().sum(0).sqrt()).to(torch.complex64)


def _fourier(x: Tensor) -> Tensor:
    """Unitary, centred in both domains."""
    transformed = torch.fft.fft2(torch.fft.ifftshift(x, AXES), norm="ortho")
    return torch.fft.fftshift(transformed, AXES)


def _inverse(c: Tensor) -> Tensor:
    image = torch.fft.ifft2(torch.fft.ifftshift(c, AXES), norm="ortho")
    return torch.fft.fftshift(image, AXES)


def _mirrored(mask: Tensor) -> Tensor:
    """``M(-k)`` for a centred ``M``."""
    plain = torch.fft.ifftshift(mask, AXES).flip(AXES).roll((1, 1), AXES)
    return torch.fft.fftshift(plain, AXES)


def _complex(x: Tensor, channel: int) -> Tensor:
    """Two real channels as one complex."""
    return torch.complex(*x.unbind(channel)).unsqueeze(channel)


def _channels(z: Tensor, channel: int) -> Tensor:
    """One complex channel as two real ones."""
    return torch.cat([z.real, z.imag], channel)


def _check_mask(mask: Tensor) -> Tensor:
    m = torch.as_tensor(mask)
    if m.ndim not in (2, 3, 4) or not bool(((m == 0) | (m == 1)).all()):
        raise ValueError(
            f"a k-space mask holds 0 and 1, shape (H, W), or (B, H, W) with one for each sample; got {tuple(m.shape)}"
        )
    m = m if m.is_floating_point() else m.float()
    if m.ndim == 4:
        if m.shape[1] != 1:
            raise ValueError(f"a k-space mask has one channel, got {tuple(m.shape)}: real and imaginary part share it")
        return m
    return m[None, None] if m.ndim == 2 else m[:, None]


def _fitting(mask: Tensor, like: Tensor) -> Tensor:
    """``(B or 1, 1, H, W)`` in the precision of ``like``."""
    if mask.shape[0] not in (1, like.shape[0]) or mask.shape[-2:] != like.shape[-2:]:
        raise ValueError(f"k-space masks {tuple(mask.shape)} do not fit a batch of shape {tuple(like.shape)}")
    return mask.to(device=like.device, dtype=like.real.dtype)


class MRI(SpectralOperator):
    """One coil, exact. Signals ``(B, 2, H, W)`` (real and imaginary part), k-space ``(B, 2, H, W)``, 0 where it is
    not measured.

    Args:
        mask: 1 where k-space is measured, zero frequency at ``(H // 2, W // 2)``: ``(H, W)``, or ``(B, H, W)`` with one
            for each sample.
        real: whether images are real, ``(B, 1, H, W)``.

    Raises:
        ValueError: when the mask holds other values or has another shape.
    """

    def __init__(self, mask: Tensor, *, real: bool = False) -> None:
        self.mask = _check_mask(mask)
        self.real = real
        self.shape = (1 if real else 2, *self.mask.shape[-2:])

    @property
    def solver(self) -> str:
        return "exact (fft)"

    def samples(self, ndim: int) -> int | None:
        return self.mask.shape[0] if self.mask.shape[0] > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        return _channels(_fitting(self.mask, x) * self.coefficients(x), 1)

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        return self.shape

    def eigenvalues(self, like: Tensor) -> Tensor:
        m = _fitting(self.mask, like)
        return (m + _mirrored(m)) / 2 if self.real else m

    def coefficients(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"this operator fits signals (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        return _fourier(x.to(complex_dtype(x.dtype)) if self.real else _complex(x, 1))

    def signal(self, c: Tensor, like_shape: Sequence[int]) -> Tensor:
        image = _inverse(c)
        return image.real if self.real else _channels(image, 1)

    def adjoint_coefficients(self, y: Tensor) -> Tensor:
        return _fitting(self.mask, y) * _complex(y, 1)

    def spectral_diagonal(self, f: SpectralFunction, like: Tensor) -> Tensor:
        return f(self.eigenvalues(like)).mean(AXES, keepdim=True)

    def observed(self, y: Tensor) -> Tensor | None:
        return _fitting(self.mask, y).expand(y.shape)


class MultiCoilMRI(KrylovOperator):
    """Several coils, by conjugate gradients. Signals as for :class:`MRI`, k-space ``(B, coils, 2, H, W)``.

    Args:
        mask: as for :class:`MRI`.
        maps: sensitivities, complex ``(coils, H, W)``, see :func:`birdcage_maps`; ``(B, coils, H, W)`` with a set for
            each sample.
        real: whether images are real, ``(B, 1, H, W)``.

    Raises:
        ValueError: when mask or maps have another shape, or values that are not finite.
    """

    def __init__(self, mask: Tensor, maps: Tensor, *, real: bool = False) -> None:
        self.mask = _check_mask(mask)
        s = torch.as_tensor(maps)
        if s.ndim not in (3, 4) or s.shape[-2:] != self.mask.shape[-2:] or not bool(torch.isfinite(s).all()):
            raise ValueError(
                f"sensitivity maps are finite, (coils, H, W) with the mask's {tuple(self.mask.shape[-2:])}; got "
                f"{tuple(s.shape)}"
            )
        s = s if s.is_complex() else s.to(complex_dtype(s.dtype if s.is_floating_point() else torch.float32))
        self.maps = s.unsqueeze(0) if s.ndim == 3 else s
        self.real = real
        self.shape = (1 if real else 2, *self.mask.shape[-2:])
        # A memo by precision and device: derived from mask and maps alone.
        self._surrogates: dict[tuple[object, ...], Surrogate] = {}

    def samples(self, ndim: int) -> int | None:
        n = max(self.mask.shape[0], self.maps.shape[0])
        return n if n > 1 else None

    def _maps(self, like: Tensor) -> Tensor:
        if self.maps.shape[0] not in (1, like.shape[0]):
            raise ValueError(f"{self.maps.shape[0]} sets of sensitivity maps do not fit a batch of {like.shape[0]}")
        return self.maps.to(device=like.device, dtype=complex_dtype(like.dtype))

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"this operator fits signals (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        image = x.to(complex_dtype(x.dtype)) if self.real else _complex(x, 1)
        k_space = _fitting(self.mask, x) * _fourier(self._maps(x) * image)
        return torch.stack([k_space.real, k_space.imag], 2)

    @full_precision
    def adjoint(self, y: Tensor) -> Tensor:
        k_space = _fitting(self.mask, y) * torch.complex(*y.unbind(2))
        image = (self._maps(y).conj() * _inverse(k_space)).sum(1, keepdim=True)
        return image.real if self.real else _channels(image, 1)

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        return self.shape

    def measurement_ndim(self, ndim: int) -> int:
        return ndim + 1

    def observed(self, y: Tensor) -> Tensor | None:
        return _fitting(self.mask, y).unsqueeze(2).expand(y.shape)

    def gram(self, v: Tensor) -> Tensor:
        # where an image's middle is does not matter to a convolution: only the mask is shifted
        image = v.to(complex_dtype(v.dtype)) if self.real else _complex(v, 1)
        maps, mask = self._maps(v), torch.fft.ifftshift(_fitting(self.mask, v), AXES)
        image = (maps.conj() * torch.fft.ifft2(mask * torch.fft.fft2(maps * image))).sum(1, keepdim=True)
        return image.real if self.real else _channels(image, 1)

    def surrogate(self, like: Tensor) -> Surrogate:
        """The convolution closest to ``A^T A`` (T. Chan 1988): ``d(k) = sum_c sum_k' M(k') |F S_c|^2(k' - k) / (H W)``,
        the energy that the coils measure of a plane wave."""
        key = (like.dtype, like.device)
        if self.maps.requires_grad or key not in self._surrogates:
            with torch.inference_mode(False), torch.no_grad():  # what is kept must serve training too
                maps, mask = self._maps(like), _fitting(self.mask, like)
                power = _fourier(maps).abs().square().sum(1, keepdim=True)
                lagged = torch.fft.fft2(mask) * torch.fft.fft2(torch.fft.ifftshift(power, AXES)).conj()
                spectrum = torch.fft.ifft2(lagged).real.clamp_min(0) / power[0].numel()
            spectrum = (spectrum + _mirrored(spectrum)) / 2 if self.real else spectrum
            one_coil = MRI(torch.ones(spectrum.shape[-2:]), real=self.real)
            self._surrogates[key] = Surrogate(one_coil, spectrum)
        return self._surrogates[key]
