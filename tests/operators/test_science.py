"""Magnetic resonance, tomography, compressed sensing and sparse matrices against dense matrices and peers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch
from operator_suite import F64, KrylovSuite, OperatorSuite, randn
from skimage.transform import radon as skimage_radon
from torch import Tensor

from posteriori.operators import (
    DCT,
    MRI,
    Hadamard,
    KrylovOperator,
    LinearOperator,
    MultiCoilMRI,
    Radon,
    birdcage_maps,
    cartesian_mask,
    radial_mask,
)


def mask(*size: int, seed: int = 0) -> Tensor:
    return (torch.rand(*size, generator=torch.Generator().manual_seed(seed)) > 0.5).float()


class TestMRI(OperatorSuite):
    shape = (2, 4, 5)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return MRI(mask(4, 5))


class TestMRIMaskPerSample(OperatorSuite):
    shape = (2, 3, 4)
    tied = True

    def make(self, samples: Sequence[int]) -> LinearOperator:
        masks = torch.stack([mask(3, 4, seed=i) for i in range(8)])
        return MRI(masks[list(samples)])


class TestMRIOfRealImages(OperatorSuite):
    """The mask is not symmetric: the solve must use the symmetrised one."""

    shape = (1, 5, 6)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return MRI(mask(5, 6, seed=3), real=True)


class TestHadamard(OperatorSuite):
    shape = (2, 4, 2)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Hadamard(mask(4, 2, seed=2), scramble=1)


class TestHadamardOfLinesMaskPerSample(OperatorSuite):
    shape = (1, 8)
    tied = True

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Hadamard(torch.stack([mask(1, 8, seed=i) for i in range(8)])[list(samples)], dims=1)


class TestDCT(OperatorSuite):
    shape = (2, 3, 5)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return DCT(mask(3, 5, seed=4))


class TestDCTOfVolumesScrambled(OperatorSuite):
    shape = (1, 2, 3, 4)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return DCT(mask(2, 3, 4, seed=4), dims=3, scramble=0)


class TestMultiCoilMRI(KrylovSuite):
    shape = (2, 4, 4)

    def build(self) -> KrylovOperator:
        return MultiCoilMRI(mask(4, 4, seed=1), birdcage_maps(3, (4, 4)))


class TestMultiCoilMRIOfRealImages(KrylovSuite):
    shape = (1, 4, 5)

    def build(self) -> KrylovOperator:
        return MultiCoilMRI(mask(4, 5, seed=1), birdcage_maps(2, (4, 5)), real=True)


class TestRadon(KrylovSuite):
    shape = (1, 4, 5)

    def build(self) -> KrylovOperator:
        return Radon([0.0, 30.0, 77.0, 90.0, 140.0], (4, 5))


# -- meaning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_k_space_is_numpys_centred_unitary_transform(size: tuple[int, int]) -> None:
    """Masks and k-space of scanners and of fastMRI would be read shifted by half the field of view."""
    x = randn(2, 2, *size)
    image = x[:, 0].numpy() + 1j * x[:, 1].numpy()
    axes = (-2, -1)
    expected = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(image, axes), norm="ortho"), axes)
    found = MRI(torch.ones(size))(x)
    np.testing.assert_allclose(found[:, 0].numpy() + 1j * found[:, 1].numpy(), expected, atol=1e-12)


def test_one_coil_of_sensitivity_one_is_the_single_coil() -> None:
    """Two operators for one scanner would disagree."""
    m, x = mask(6, 5), randn(3, 2, 6, 5)
    several = MultiCoilMRI(m, torch.ones(1, 6, 5, dtype=torch.complex128))
    torch.testing.assert_close(several(x)[:, 0], MRI(m)(x))


def test_masks_of_k_space() -> None:
    """An acceleration that is not the one asked for; a mask without the low frequencies an image lives in."""
    m = cartesian_mask((16, 64), 4, 0.125, seed=3)
    assert m.shape == (16, 64)
    assert int(m[0].sum()) == 16
    assert bool((m == m[:1]).all())
    assert bool((m[:, 28:36] == 1).all())
    r = radial_mask((33, 40), 8)
    assert float(r[16, 20]) == 1
    assert bool((r[:, 20] == 1).all())  # 90 degrees is one of the spokes
    assert 0.1 < float(r.mean()) < 0.35
    maps = birdcage_maps(4, (8, 9))
    torch.testing.assert_close(maps.abs().square().sum(0), torch.ones(8, 9))


def test_noise_is_counted_where_k_space_is_measured() -> None:
    """Residuals would be divided by entries that are not measurements."""
    m = mask(6, 5)
    y = torch.zeros(2, 2, 6, 5)
    assert MRI(m).measurement_count(y).tolist() == [2 * float(m.sum())] * 2
    coils = MultiCoilMRI(m, birdcage_maps(3, (6, 5)))
    assert coils.measurement_count(torch.zeros(2, 3, 2, 6, 5)).tolist() == [6 * float(m.sum())] * 2


def disk(n: int, radius: float, row: float, column: float) -> Tensor:
    """Disk with a soft edge of one pixel (mean over 9x9 points of every pixel)."""
    fine = (torch.arange(9 * n, dtype=F64) - 4) / 9 - n // 2
    inside = ((fine[:, None] - row) ** 2 + (fine[None] - column) ** 2 <= radius**2).double()
    return inside.reshape(n, 9, n, 9).mean((1, 3))[None, None]


def test_projections_of_a_disk_are_its_chords() -> None:
    """Units or geometry of the projector: chords of an off-centre disk, in pixels, within 2 % of the diameter."""
    n, radius, row, column = 64, 18.0, 7.0, -4.0
    angles = torch.tensor([0.0, 20.0, 45.0, 63.0, 90.0, 135.0, 171.0], dtype=F64)
    A = Radon(angles, n)
    found = A(disk(n, radius, row, column))[0, 0]
    theta = torch.deg2rad(angles)
    centre = column * theta.cos() - row * theta.sin()
    s = torch.arange(found.shape[1], dtype=F64) - found.shape[1] // 2
    chord = 2 * (radius**2 - (s - centre[:, None]) ** 2).clamp_min(0).sqrt()
    assert float((found - chord).abs().mean()) <= 0.02 * 2 * radius * 0.5
    inner = (s - centre[:, None]).abs() < radius - 2
    assert float((found - chord)[inner].abs().max()) <= 0.02 * 2 * radius


def test_projections_agree_with_scikit_image() -> None:
    """A sinogram made elsewhere would be reconstructed rotated or mirrored: a smooth, asymmetric image within 2 %."""
    n = 65
    grid = torch.arange(n, dtype=F64) - n // 2
    image = torch.exp(-((grid[:, None] - 9) ** 2 + (grid - 4) ** 2) / 50)
    image = image + 0.6 * torch.exp(-((grid[:, None] + 12) ** 2 + (grid + 2) ** 2) / 30)
    angles = np.arange(0, 180, 15.0)
    found = Radon(torch.from_numpy(angles), n, detectors=n)(image[None, None])[0, 0].numpy()
    expected = skimage_radon(image.numpy(), angles, circle=True, preserve_range=True).T
    assert np.abs(found - expected).max() <= 0.02 * expected.max()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (F64, 1e-13)])
def test_the_adjoint_of_tomography_is_matched(dtype: torch.dtype, limit: float) -> None:
    """With an unmatched back-projector (most toolboxes') conjugate gradients converge to something else."""
    A = Radon(torch.arange(0, 180, 7.5), (48, 56))
    x = randn(2, 1, 48, 56, dtype=dtype)
    y = randn(*A(x).shape, seed=1, dtype=dtype)
    difference = float((A(x) * y).sum().double() - (x * A.adjoint(y)).sum().double())
    assert abs(difference) <= limit * float(A(x).norm() * y.norm())


def test_filtered_backprojection_inverts_full_tomography() -> None:
    """The classical method to compare with, at the wrong scale: a disk from 180 views, 2 % on average inside."""
    x = disk(64, 16.0, 3.0, -5.0)
    A = Radon(torch.arange(180.0), 64)
    back = A.filtered_backprojection(A(x))
    inside = disk(64, 13.0, 3.0, -5.0) == 1
    assert float((back - x)[inside].abs().mean()) <= 0.02
    assert abs(float((back - x)[inside].mean())) <= 0.005


def test_transforms_are_scipys() -> None:
    """Coefficients measured by a single-pixel camera or stored by a codec would be read in another order."""
    x = randn(2, 4, 8)
    expected = scipy.fft.dctn(x.numpy(), norm="ortho", axes=(1, 2))
    np.testing.assert_allclose(DCT(torch.ones(4, 8))(x).numpy(), expected, atol=1e-12)
    h = scipy.linalg.hadamard(32) / 32**0.5
    expected = x.numpy().reshape(2, 32) @ h.T
    np.testing.assert_allclose(Hadamard(torch.ones(4, 8))(x).numpy().reshape(2, 32), expected, atol=1e-12)


def test_scrambling_spreads_a_constant() -> None:
    """A flat image has one Hadamard coefficient, missed by most masks; with random signs all carry it alike."""
    flat = torch.ones(1, 16, 16, dtype=F64)
    plain, scrambled = (Hadamard(torch.ones(16, 16), scramble=s)(flat) for s in (None, 0))
    assert int((plain.abs() > 1e-9).sum()) == 1
    assert float(scrambled.abs().max()) <= 4 * float(flat.norm()) / 16  # 4 standard deviations
    assert float(scrambled.norm()) == pytest.approx(float(flat.norm()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MRI(torch.full((4, 4), 0.5)), "0 and 1"),
        (lambda: MultiCoilMRI(torch.ones(4, 4), torch.ones(2, 4, 5)), "sensitivity"),
        (lambda: MRI(torch.ones(4, 4))(torch.zeros(1, 1, 4, 4)), "fits signals"),
        (lambda: cartesian_mask((8, 32), 16, 0.2), "fewer"),
        (lambda: radial_mask((8, 8), 0), "spoke"),
        (lambda: Hadamard(torch.ones(6, 4)), "power of two"),
        (lambda: DCT(torch.ones(4)), "dims"),
        (lambda: Radon([], 8), "angles"),
        (lambda: Radon([0.0], (8, 0)), "size"),
        (lambda: Radon([0.0], 8, 0), "detector"),
        (lambda: Radon([0.0], 8)(torch.zeros(1, 1, 8, 9)), "takes batches"),
    ],
)
def test_what_cannot_be_is_refused(make: object, message: str) -> None:
    """An unreadable error from deep inside, or a wrong picture."""
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
