"""Tomography whose sizes follow from the data, circles, and projections of an ellipse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from operator_suite import F64, KrylovSuite, randn
from skimage.transform import iradon as skimage_iradon
from skimage.transform import radon as skimage_radon
from torch import Tensor

from posteriori.operators import KrylovOperator, Radon, check

ANGLES = [0.0, 30.0, 77.0, 90.0, 140.0]


class TestSizeFromTheData(KrylovSuite):
    shape = (2, 4, 4)

    def build(self) -> KrylovOperator:
        return Radon(ANGLES)


class TestCircle(KrylovSuite):
    shape = (5, 5)

    def build(self) -> KrylovOperator:
        return Radon(ANGLES, circle=True)


class TestTruncated(KrylovSuite):
    """Fewer detectors than the image is wide: the border is seen by some views only."""

    shape = (1, 4, 6)

    def build(self) -> KrylovOperator:
        return Radon(ANGLES, (4, 6), detectors=3)


@pytest.mark.parametrize("circle", [False, True])
def test_the_size_follows_from_the_sinogram(circle: bool) -> None:
    """Restored images would be of another size than those measured."""
    A = Radon([10.0], circle=circle)
    for n in range(1, 400):
        assert A.image_size(A.detectors((n, n))) == (n, n)


@pytest.mark.parametrize("size", [(9, 9), (8, 8), (5, 12), (12, 5), (1, 1)])
def test_the_detector_is_long_enough(size: tuple[int, int]) -> None:
    """Corners that no detector sees would be filled with anything."""
    angles = torch.arange(0, 360, 7.5)
    found = Radon(angles, size)
    longer = Radon(angles, size, detectors=found.detectors(size) + 20)
    corners = torch.zeros(4, 1, *size, dtype=F64)
    for k, (i, j) in enumerate([(0, 0), (0, -1), (-1, 0), (-1, -1)]):
        corners[k, 0, i, j] = 1
    seen, whole = (A(corners).sum((1, 2, 3)) for A in (found, longer))
    assert bool((seen >= 0.97 * whole).all())


def ellipse(n: int, a: float, b: float, row: float, column: float) -> Tensor:
    """Ellipse of half axes ``a`` (along rows) and ``b``, the mean over 9x9 points of every pixel."""
    fine = (torch.arange(9 * n, dtype=F64) - 4) / 9 - n // 2
    inside = (((fine[:, None] - row) / a) ** 2 + ((fine[None] - column) / b) ** 2 <= 1).double()
    return inside.reshape(n, 9, n, 9).mean((1, 3))


def test_projections_of_an_ellipse() -> None:
    """Units, direction and scale of the two axes; the chord of an ellipse is known. 2 % of the longest chord inside,
    1 % on average."""
    n, a, b, row, column = 81, 26.0, 12.0, 5.0, -8.0
    angles = torch.arange(0, 180, 9, dtype=F64)
    found = Radon(angles)(ellipse(n, a, b, row, column)[None, None])[0, 0]
    theta = torch.deg2rad(angles)[:, None]
    s = torch.arange(found.shape[1], dtype=F64) - found.shape[1] // 2
    s = s - column * theta.cos() + row * theta.sin()
    width = (b * theta.cos()) ** 2 + (a * theta.sin()) ** 2
    chord = 2 * a * b * (width - s**2).clamp_min(0).sqrt() / width
    inner = s.abs() < width.sqrt() - 2
    assert float((found - chord)[inner].abs().max()) <= 0.02 * float(chord.max())
    assert float((found - chord).abs().mean()) <= 0.01 * float(chord.max())


def test_a_circle_is_scikit_images() -> None:
    """Sinograms made with ``circle=True``, the default there, must be read as they are: same layout after a
    transposition, and what lies outside the circle has no part in them."""
    n = 64
    grid = torch.arange(n, dtype=F64) - n // 2
    image = torch.exp(-((grid[:, None] - 9) ** 2 + (grid - 4) ** 2) / 50)
    angles = np.arange(0, 180, 15.0)
    A = Radon(angles.tolist(), circle=True)
    expected = skimage_radon(image.numpy(), angles, circle=True).T
    found = A(image[None, None])
    assert found.shape == (1, 1, 12, n)
    assert np.abs(found[0, 0].numpy() - expected).max() <= 0.02 * expected.max()
    outside = (grid[:, None] ** 2 + grid**2 > (n // 2) ** 2).double()
    assert float(A(outside[None, None]).abs().max()) == 0


def test_filtered_backprojection_is_scikit_images() -> None:
    """The baseline of every table at the same quality as the usual one: within 3 % of the image's peak."""
    n = 65
    grid = torch.arange(n, dtype=F64) - n // 2
    image = torch.exp(-((grid[:, None] - 9) ** 2 + (grid - 4) ** 2) / 50)
    angles = np.arange(0, 180, 2.0)
    A = Radon(angles.tolist(), circle=True)
    y = A(image[None, None])
    expected = skimage_iradon(y[0, 0].numpy().T, angles, filter_name="ramp", circle=True)
    inside = (grid[:, None] ** 2 + grid**2 <= (n // 2 - 2) ** 2).numpy()
    assert np.abs(A.filtered_backprojection(y)[0, 0].numpy() - expected)[inside].max() <= 0.03


def test_dense_projections_are_the_same() -> None:
    """The exact operator for small images must be the same one."""
    A = Radon(ANGLES, (5, 6))
    A.tolerance = 1e-11
    x, y = randn(2, 1, 5, 6), randn(2, 5, A.detectors((5, 6)), seed=1)
    exact = A.dense().gram_solve(0.2, 1.1, x, y.flatten(1))
    torch.testing.assert_close(exact, A.gram_solve(0.2, 1.1, x, y[:, None]), rtol=0, atol=1e-7)
    torch.testing.assert_close(Radon(ANGLES).dense(5)(randn(1, 1, 5, 5)), Radon(ANGLES)(randn(1, 1, 5, 5)).flatten(1))


def test_it_passes_the_users_own_check() -> None:
    """``operators.check`` without a shape must find one that fits."""
    check(Radon(ANGLES, (6, 8)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Radon([0.0], detectors=5), "give size too"),
        (lambda: Radon([0.0])(torch.zeros(1, 1, 4, 5)), "takes batches"),
        (lambda: Radon([0.0])(torch.zeros(4, 4)), "takes batches"),
        (lambda: Radon([0.0, 1.0]).adjoint(torch.zeros(1, 1, 3, 5)), "projections are batches"),
        (lambda: Radon([0.0]).adjoint(torch.zeros(1, 1, 1, 1)), "check its size"),
        (lambda: Radon([0.0], 8).adjoint(torch.zeros(1, 1, 1, 9)), "check its size"),
        (lambda: Radon([0.0]).dense(), "give size"),
    ],
)
def test_what_cannot_be_is_refused(call: object, message: str) -> None:
    """An index error from deep inside, or an image of another size."""
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
