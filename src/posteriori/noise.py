r"""Noise that is not white: standard deviations that differ between measurements, and correlated noise.

    y = A x_0 + n,      n ~ N(0, Gamma)

A whitener ``W`` with ``W^T W = Gamma^-1`` brings it to the form that everything else takes,

    s W y = (s W A) x_0 + s noise,

for any level ``s``. Here ``s`` is the geometric mean of the standard deviations, ``det(Gamma)^(1/(2 m))``: a level
between the smallest and the largest, so that a network trained for a range of ``sigma_y`` is asked for one it knows.
``W A`` keeps an exact solve where the structure allows (:mod:`posteriori.operators.algebra`): deviations per
measurement on masks, samples and mosaics; stationary noise on a circular blur, or on the image itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from posteriori.operators import CircularConvolution, LinearOperator, Weighting
from posteriori.operators.base import Scalar, per_sample
from posteriori.pivot import seeded_noise

__all__ = ["Whitened", "measure", "stationary_whitener", "whiten"]


class Whitened(NamedTuple):
    """A measurement with white noise: ``posterior = ExactPosterior(denoiser, *whiten(A, y, std=std))``.

    Attributes:
        A: the whitened operator.
        y: the whitened measurement ``(B, *measurement)``.
        sigma_y: its noise, a number or one per sample ``(B,)``.
    """

    A: LinearOperator
    y: Tensor
    sigma_y: Scalar


def whiten(
    A: LinearOperator,
    y: Tensor,
    *,
    std: Tensor | float | None = None,
    whitener: LinearOperator | None = None,
    sigma_y: Scalar | None = None,
) -> Whitened:
    """Operator, measurement and noise level of the same problem with white noise.

    Args:
        A: the operator.
        y: measurements ``(B, *measurement)``.
        std: standard deviation of every measurement, aligned with the last dimensions of ``y`` as in NumPy
            broadcasting; with as many dimensions as ``y`` the batch comes first. ``inf`` is no measurement.
        whitener: or ``W``, acting on measurements, such that ``W n`` is white with standard deviation 1.
        sigma_y: the level; the geometric mean of the deviations when left out (any gives the same posterior).

    Raises:
        ValueError: unless exactly one of ``std`` and ``whitener`` is given, when a deviation is not positive, or when
            a whitener mixes measurements with entries that are none.
    """
    if (std is None) == (whitener is None):
        raise ValueError("give either std, the deviation of every measurement, or whitener, for correlated noise")
    if std is not None:
        return _whiten_each(A, y, _deviations(std, y), sigma_y)
    assert whitener is not None
    _check_mixing(A, y, whitener)
    level = _level(whitener, y) if sigma_y is None else sigma_y
    return Whitened(level * (whitener @ A), per_sample(level, y) * whitener(y), level)


def _deviations(std: Tensor | float, y: Tensor) -> Tensor:
    s = torch.as_tensor(std, dtype=torch.float64, device=y.device)
    if bool(torch.isnan(s).any()) or bool((s <= 0).any()) or not bool(torch.isfinite(s).any()):
        raise ValueError("standard deviations are positive; inf is allowed for entries that are no measurements")
    if s.ndim > y.ndim or (s.ndim == y.ndim and s.shape[0] not in (1, y.shape[0])):
        raise ValueError(f"deviations of shape {tuple(s.shape)} do not fit measurements {tuple(y.shape)}")
    return s


def _whiten_each(A: LinearOperator, y: Tensor, std: Tensor, sigma_y: Scalar | None) -> Whitened:
    level: Scalar
    if sigma_y is None:
        observed = A.observed(y)
        own = std.ndim == y.ndim or (observed is not None and observed.ndim == y.ndim and observed.shape[0] > 1)
        rows = y.shape[0] if own else 1
        counted = torch.isfinite(std) & (True if observed is None else observed > 0)
        counted = counted.expand(rows, *y.shape[1:]).flatten(1)
        logs = torch.where(torch.isfinite(std), std, 1.0).log().expand(rows, *y.shape[1:]).flatten(1)
        level = torch.exp((logs * counted).sum(1) / counted.sum(1).clamp_min(1))
        level = float(level[0]) if bool((level == level[0]).all()) else level
    else:
        level = sigma_y
    weights = (level.reshape(-1, *[1] * (y.ndim - 1)).to(std) if isinstance(level, Tensor) else level) / std
    scaled = torch.where(weights > 0, weights.to(y) * y, torch.zeros((), dtype=y.dtype, device=y.device))
    return Whitened(Weighting(weights) @ A, scaled, level)


def _check_mixing(A: LinearOperator, y: Tensor, whitener: LinearOperator) -> None:
    observed = A.observed(y)
    if observed is not None and not bool((observed > 0).all()) and not isinstance(whitener, Weighting):
        raise ValueError(
            f"{whitener!r} mixes measurements with entries that {A!r} does not measure: the noise of those measured "
            "has another whitener; list them with Sampling and give the inverse root of their covariance as a Matrix"
        )


def _level(whitener: LinearOperator, y: Tensor) -> Scalar:
    """Geometric mean of the deviations that a whitener undoes, from the trace of ``log W^T W``."""
    like = y.new_empty(1, dtype=torch.float64).expand(y.shape)
    if whitener.samples(y.ndim) is None:
        like = like[:1]

    def seen(lam: Tensor) -> Tensor:
        return (~whitener.unseen(lam)).to(lam.dtype)

    def log(lam: Tensor) -> Tensor:
        return torch.where(whitener.unseen(lam), torch.ones_like(lam), lam).log()

    traces = [whitener.spectral_diagonal(f, like).expand(like.shape).flatten(1).sum(1) for f in (log, seen)]
    level = torch.exp(-0.5 * traces[0] / traces[1].clamp_min(1e-300))
    return float(level[0]) if level.numel() == 1 else level


def stationary_whitener(
    shape: Sequence[int],
    *,
    spectrum: Tensor | Callable[..., Tensor] | None = None,
    autocovariance: Tensor | None = None,
) -> CircularConvolution:
    """Whitener of stationary noise, a circular convolution: exact on circular blurs and on the image itself.

    Args:
        shape: sizes of the last dimensions of a measurement: ``(n,)``, ``(H, W)``, ``(D, H, W)``.
        spectrum: power of the noise, ``E |n_f|^2`` of the unitary Fourier transform (its mean is the variance of an
            entry): a tensor of ``shape`` in the order of ``torch.fft.fftn``, or a function of the frequencies along
            every dimension, in cycles per entry and shaped to broadcast.
        autocovariance: or ``E n_p n_(p+d)`` for shifts ``d``, shift 0 at entry ``size // 2``, no larger than ``shape``.

    Raises:
        ValueError: unless exactly one is given, or when the power is not positive (no such noise exists, or some
            frequency has none: add white noise) or not symmetric.
    """
    sizes = tuple(shape)
    axes = tuple(range(-len(sizes), 0))
    if (spectrum is None) == (autocovariance is None):
        raise ValueError("give either the spectrum of the noise or its autocovariance")
    if callable(spectrum):
        grid = [torch.fft.fftfreq(n, dtype=torch.float64).reshape(-1, *[1] * (-a - 1)) for n, a in
                zip(sizes, axes, strict=True)]  # fmt: skip
        power = torch.as_tensor(spectrum(*grid), dtype=torch.float64).expand(sizes)
    elif spectrum is not None:
        power = torch.as_tensor(spectrum, dtype=torch.float64)
    else:
        kernel = torch.as_tensor(autocovariance, dtype=torch.float64)
        if kernel.ndim != len(sizes) or any(k > n for k, n in zip(kernel.shape, sizes, strict=True)):
            raise ValueError(f"an autocovariance of shape {tuple(kernel.shape)} does not fit measurements of {sizes}")
        placed = kernel.new_zeros(sizes)
        placed[tuple(slice(0, k) for k in kernel.shape)] = kernel
        power = torch.fft.fftn(torch.roll(placed, [-(k // 2) for k in kernel.shape], axes), dim=axes)
        if float(power.imag.abs().max()) > 1e-6 * float(power.abs().max()):
            raise ValueError("an autocovariance is symmetric about its centre, entry size // 2")
        power = power.real
    if power.shape != sizes:
        raise ValueError(f"the spectrum has shape {tuple(power.shape)}, measurements have {sizes}")
    mirrored = torch.roll(power.flip(axes), [1] * len(sizes), axes)
    if not bool(torch.isfinite(power).all()) or float(power.min()) <= 1e-12 * float(power.max()):
        raise ValueError(
            f"the power of the noise has to be finite and positive at every frequency, it goes down to "
            f"{float(power.min()):.1e}: add some white noise to it"
        )
    if float((power - mirrored).abs().max()) > 1e-6 * float(power.max()):
        raise ValueError("the spectrum of real noise is the same at f and -f")
    kernel = torch.fft.ifftn(power.rsqrt(), dim=axes).real
    return CircularConvolution(torch.fft.fftshift(kernel, dim=axes))


def measure(
    A: LinearOperator,
    x_0: Tensor,
    *,
    std: Tensor | float | None = None,
    whitener: LinearOperator | None = None,
    seed: int | None = None,
) -> Tensor:
    """Simulate a measurement ``y = A x_0 + n`` with noise as :func:`whiten` takes it.

    Args:
        A: the operator.
        x_0: signals ``(B, *signal)``.
        std, whitener: of the noise, see :func:`whiten`; a whitener needs an exact solve.
        seed: as for :func:`posteriori.measure`.

    Returns:
        ``(B, *measurement)``; entries that are not measured are 0.

    Raises:
        ValueError: as :func:`whiten`, or when the whitener cannot be inverted.
    """
    if (std is None) == (whitener is None):
        raise ValueError("give either std, the deviation of every measurement, or whitener, for correlated noise")
    y = A(x_0)
    noise = torch.randn_like(y) if seed is None else seeded_noise(y.shape, seed, y)
    if std is not None:
        s = _deviations(std, y)
        finite = torch.isfinite(s)
        y = torch.where(finite, y + torch.where(finite, s, 0.0).to(y) * noise, torch.zeros_like(y))
    else:
        assert whitener is not None
        if not whitener.exact:
            raise ValueError(f"{whitener!r} has no exact solve, so noise cannot be drawn from it: add your own to A(x)")
        noise = whitener.gram_solve(0.0, 1.0, y=noise)
        if not bool(torch.isfinite(noise).all()):
            raise ValueError(f"{whitener!r} cannot be inverted: there is no noise that it makes white")
        y = y + noise
    observed = A.observed(y)
    return y if observed is None else y * observed
