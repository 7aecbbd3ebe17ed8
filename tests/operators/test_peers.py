"""The operators against what the rest of the world calls by the same name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from operator_suite import F64, randn
from PIL import Image
from scipy import ndimage, signal
from torch.nn import functional

from posteriori.operators import Blur, CircularConvolution, Downsampling, GaussianBlur, gaussian_taps

# posteriori's boundary -> SciPy's mode
MODES = {"reflect": "mirror", "replicate": "nearest", "zero": "constant", "circular": "wrap"}


@pytest.mark.parametrize("size", [(3, 3), (5, 3), (2, 4), (4, 3)], ids=str)
@pytest.mark.parametrize("boundary", MODES)
def test_blur_is_scipys_convolution(boundary: str, size: tuple[int, int]) -> None:
    """A flipped kernel, one shifted by half a pixel, or another border than its name says (float64, 1e-10)."""
    x = randn(2, 3, 9, 8)
    general = randn(*size, seed=1)
    separable = torch.outer(randn(size[0], seed=2), randn(size[1], seed=3))
    for kernel in (general, separable):
        ours = Blur(kernel, boundary)(x)  # type: ignore[arg-type]
        theirs = np.stack(
            [ndimage.convolve(p.numpy(), kernel.numpy(), mode=MODES[boundary]) for p in x.reshape(-1, 9, 8)]
        )
        np.testing.assert_allclose(ours.reshape(-1, 9, 8).numpy(), theirs, atol=1e-10)


@pytest.mark.parametrize("boundary", MODES)
def test_gaussian_blur_is_scipys(boundary: str) -> None:
    """A blur of 3 pixels would not be a blur of 3 pixels (SciPy cuts at 4 sigma too; float64, 1e-10)."""
    x = randn(1, 2, 30, 27)
    for sigma in (0.5, 1.0, 3.0):
        ours = GaussianBlur(sigma, boundary=boundary)(x)  # type: ignore[arg-type]
        radius = math.ceil(4 * sigma)
        theirs = ndimage.gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode=MODES[boundary], radius=radius)
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-10)


def test_gaussian_taps_sum_to_one() -> None:
    """The picture would darken."""
    for taps in (None, 1, 9, 61):
        assert abs(sum(gaussian_taps(3.0, taps)) - 1) < 1e-12
        assert taps is None or len(gaussian_taps(3.0, taps)) == taps


@pytest.mark.parametrize("sizes", [(8, 9), (7, 7)], ids=str)
def test_circular_is_numpys_fft(sizes: tuple[int, int]) -> None:
    """The centre of the kernel is entry ``size // 2``; NumPy's transform of the kernel rolled there (1e-12)."""
    x, kernel = randn(2, 1, *sizes), randn(4, 3, seed=1)
    padded = np.zeros(sizes)
    padded[:4, :3] = kernel
    padded = np.roll(padded, (-2, -1), (0, 1))
    expected = np.fft.ifft2(np.fft.fft2(x.numpy()) * np.fft.fft2(padded)).real
    np.testing.assert_allclose(CircularConvolution(kernel)(x).numpy(), expected, atol=1e-12)


def test_circular_signals_are_scipys_convolution() -> None:
    """1-D: the linear convolution folded at the ends (float64, 1e-12)."""
    x, kernel = randn(3, 11), randn(5, seed=1)
    for row, ours in zip(x.numpy(), CircularConvolution(kernel)(x).numpy(), strict=True):
        full = signal.convolve(np.tile(row, 3), kernel.numpy(), mode="same")
        np.testing.assert_allclose(ours, full[11:22], atol=1e-12)


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_bicubic_is_torchs(factor: int) -> None:
    """Super-resolution benchmarks mean this bicubic: antialiased, borders renormalised (float64, 1e-10)."""
    x = randn(2, 3, 6 * factor, 4 * factor)
    expected = functional.interpolate(x, scale_factor=1 / factor, mode="bicubic", antialias=True)
    torch.testing.assert_close(Downsampling(factor, "bicubic")(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_bicubic_is_pillows(factor: int) -> None:
    """What a user's photo editor did to the picture (Pillow in float32, 1e-4 of the range)."""
    x = randn(1, 1, 6 * factor, 5 * factor, dtype=torch.float32)
    shrunk = Image.fromarray(x[0, 0].numpy()).resize((5, 6), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(Downsampling(factor, "bicubic")(x)[0, 0].numpy(), np.asarray(shrunk), atol=1e-4)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_box_is_average_pooling(factor: int) -> None:
    """Sums instead of means, or blocks shifted by a pixel (float64, 1e-12)."""
    x = randn(2, 3, 5 * factor, 2 * factor)
    torch.testing.assert_close(Downsampling(factor)(x), functional.avg_pool2d(x, factor), rtol=0, atol=1e-12)
    # the same as a given filter: taps are centred on every block
    given = torch.full((factor, factor), 1 / factor**2, dtype=F64)
    torch.testing.assert_close(Downsampling(factor, given)(x), functional.avg_pool2d(x, factor), rtol=0, atol=1e-12)


def test_taps_by_a_factor_are_blur_and_decimation() -> None:
    """A filter of odd size centred on blocks of odd size is a blur that keeps every block's middle (1e-12)."""
    x, row = randn(1, 2, 9, 12), randn(5, seed=1)
    kernel = torch.outer(row, randn(5, seed=2))
    expected = Blur(kernel)(x)[..., 1::3, 1::3]
    torch.testing.assert_close(Downsampling(3, kernel)(x), expected, rtol=0, atol=1e-12)
