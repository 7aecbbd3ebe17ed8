"""Channel mixing and mosaics against their dense matrices, scikit-image, Pillow, and a pixel loop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from operator_suite import OperatorSuite, randn
from PIL import Image
from skimage.color import rgb_from_hed

from posteriori.operators import Bayer, ChannelMixing, Grayscale, LinearOperator


class TestGrayscale(OperatorSuite):
    shape = (3, 3, 5)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Grayscale()


class TestSpectralResponse(OperatorSuite):
    """Many narrow bands seen through three broad ones."""

    shape = (6, 2, 4)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return ChannelMixing(randn(3, 6).abs())


class TestMoreRowsThanChannels(OperatorSuite):
    shape = (2, 4)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return ChannelMixing(randn(5, 2))


class TestChannelsOfDependentRows(OperatorSuite):
    shape = (3, 2, 2)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return ChannelMixing(torch.tensor([[1, 2, 3], [2, 4, 6]]))


class TestChannelsWithoutPlaces(OperatorSuite):
    """Signals ``(C,)``: a single pixel."""

    shape = (5,)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return ChannelMixing(randn(2, 5))


class TestChannelsOfVolumes(OperatorSuite):
    shape = (2, 2, 3, 2)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return ChannelMixing(randn(1, 2))


class TestChannelsPerSample(OperatorSuite):
    shape = (3, 2, 4)
    tied = True

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return ChannelMixing(torch.stack([randn(2, 3, seed=i) for i in samples]))


class TestBayer(OperatorSuite):
    shape = (3, 4, 4)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Bayer()


class TestBayerOddSize(OperatorSuite):
    shape = (3, 3, 5)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Bayer("GBRG")


class TestMosaicWithoutBlue(OperatorSuite):
    """A cell of another shape, with a channel that is never measured."""

    shape = (3, 4, 3)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Bayer(["RGG", "GRG", "GGR"])


def test_grey_is_pillows() -> None:
    """Another luma (Pillow's "L" is BT.601 too: half a level of 255), or channels in another order."""
    picture = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    ours = Grayscale()(torch.from_numpy(picture).double().permute(2, 0, 1).unsqueeze(0))[0, 0].numpy()
    assert np.abs(ours - np.asarray(Image.fromarray(picture).convert("L"))).max() <= 0.51


def test_mixing_is_scikit_images_matrix() -> None:
    """The matrix transposed, or another axis mixed: optical densities of stains to colour (float64, 1e-12)."""
    stains = randn(2, 3, 4, 5).abs()
    expected = stains.permute(0, 2, 3, 1).numpy() @ rgb_from_hed
    ours = ChannelMixing(torch.from_numpy(np.asarray(rgb_from_hed)).T)(stains).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-12)


@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("pattern", ["RGGB", "BGGR", "GRBG", "GBRG"])
def test_mosaic_pixel_by_pixel(pattern: str, size: tuple[int, int]) -> None:
    """Swapped colours, the pattern transposed, or the last row or column of an odd picture lost."""
    x = randn(2, 3, *size)
    y = Bayer(pattern)(x)
    assert y.shape == (2, 1, *size)
    for i in range(size[0]):
        for j in range(size[1]):
            letter = pattern[2 * (i % 2) + j % 2]
            assert torch.equal(y[:, 0, i, j], x[:, "RGB".index(letter), i, j])


def test_bad_matrices_and_patterns_are_refused() -> None:
    """Each would fail from deep inside, or mix something that is no channel."""
    for bad in (torch.ones(3), torch.ones(0, 3), torch.full((1, 3), float("nan"))):
        with pytest.raises(ValueError, match="finite"):
            ChannelMixing(bad)
    A = Grayscale()
    for wrong in (torch.zeros(1, 1, 4, 4), torch.zeros(3)):
        with pytest.raises(ValueError, match="from 3 to 1 channels"):
            A(wrong)
    with pytest.raises(ValueError, match="1 rows"):
        A.adjoint(torch.zeros(1, 3, 4, 4))
    for pattern in ("RGB", "RGGX", "", ["RG", "G"], []):
        with pytest.raises(ValueError, match="mosaic"):
            Bayer(pattern)
    with pytest.raises(ValueError, match="colour images"):
        Bayer()(torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"\(1, H, W\)"):
        Bayer().adjoint(torch.zeros(1, 3, 4, 4))
