"""Convolutions without an exact solve, for every boundary, and all blurs against SciPy in one to three dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from operator_suite import F64, KrylovSuite, randn
from scipy import ndimage, signal
from test_convolution import kernel
from torch import Tensor
from torch.nn import functional

from posteriori.operators import Blur, BoundaryConvolution, Downsampling, GaussianBlur, KrylovOperator

MODES = {"reflect": "mirror", "replicate": "nearest", "zero": "constant", "circular": "wrap"}


class TestValid(KrylovSuite):
    shape = (2, 5, 6)

    def build(self) -> KrylovOperator:
        A = Blur(kernel(3, 4), "valid")
        assert isinstance(A, BoundaryConvolution)
        return A


class TestVolumeReflect(KrylovSuite):
    shape = (4, 3, 5)

    def build(self) -> KrylovOperator:
        A = Blur(kernel(3, 2, 3), "reflect")
        assert isinstance(A, BoundaryConvolution)
        return A


class _PerSample(KrylovSuite):
    __test__ = False
    shape = (1, 4, 5)
    tied = True
    boundary: str

    def kernels(self, samples: Sequence[int]) -> BoundaryConvolution:
        A = Blur(torch.stack([kernel(3, 3, seed=i) for i in samples]), self.boundary, per_sample=True)  # type: ignore[arg-type]
        assert isinstance(A, BoundaryConvolution)
        return A

    def build(self) -> KrylovOperator:
        return self.kernels(range(3))

    def make(self, samples: Sequence[int]) -> KrylovOperator:
        A = self.kernels(samples)
        A.tolerance = A.spectral_tolerance = 1e-11
        return A

    def test_gradients_where_the_iteration_stops_at_once(self) -> None:
        """Tested with a kernel for all samples, whose gradients are then the same."""


class TestReplicatePerSample(_PerSample):
    __test__ = True
    boundary = "replicate"


class TestZeroPerSample(_PerSample):
    __test__ = True
    boundary = "zero"


class TestValidPerSample(_PerSample):
    __test__ = True
    boundary = "valid"


def _kernels(dims: int) -> list[Tensor]:
    """A general and a separable kernel with even and odd sizes."""
    sizes = (3, 4, 2)[:dims]
    separable = randn(sizes[0], seed=5)
    for i, size in enumerate(sizes[1:]):
        separable = separable.unsqueeze(-1) * randn(size, seed=6 + i)
    return [randn(*sizes, seed=4), separable]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("boundary", [*MODES, "valid"])
def test_blur_is_scipys_convolution(boundary: str, dims: int) -> None:
    """A flipped or shifted kernel, or another border than its name says, whatever structure was picked and for a class
    of its own (float64, 1e-10)."""
    x = randn(2, 6, 5, 7)
    lead = x.shape[: 4 - dims]
    for k in _kernels(dims):
        flat = x.reshape(-1, *x.shape[4 - dims :]).numpy()
        if boundary == "valid":
            theirs = np.stack([signal.convolve(p, k.numpy(), mode="valid", method="direct") for p in flat])
        else:
            theirs = np.stack([ndimage.convolve(p, k.numpy(), mode=MODES[boundary]) for p in flat])
        for A in (Blur(k, boundary), BoundaryConvolution(k, boundary)):  # type: ignore[arg-type]
            np.testing.assert_allclose(A(x).numpy(), theirs.reshape(*lead, *theirs.shape[1:]), atol=1e-10)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_gaussian_blur_is_scipys(dims: int) -> None:
    """Dimensions blurred that should not be, or left out (SciPy cuts at 4 sigma too; float64, 1e-10)."""
    x = randn(2, 8, 9, 7)
    theirs = ndimage.gaussian_filter(x.numpy(), [0] * (4 - dims) + [0.8] * dims, mode="mirror", radius=4)
    np.testing.assert_allclose(GaussianBlur(0.8, dims=dims)(x).numpy(), theirs, atol=1e-10)


def test_a_kernel_wider_than_the_signal_is_reflected_again() -> None:
    """The border of a border: SciPy's mirror has no end (float64, 1e-10)."""
    x, k = randn(1, 4, 3), randn(11, 9, seed=1)
    np.testing.assert_allclose(
        BoundaryConvolution(k)(x)[0].numpy(), ndimage.convolve(x[0].numpy(), k.numpy(), mode="mirror"), atol=1e-10
    )


@pytest.mark.parametrize(("factor", "sigma"), [(2, None), (3, None), (4, 1.6), (5, 0.7)])
def test_gaussian_downsampling_by_definition(factor: int, sigma: float | None) -> None:
    """A filter off the middle of its block, or of another width: the sum written out, and SciPy's filter where a block
    has a middle (float64, 1e-12)."""
    n, s = 6 * factor, sigma or (factor - 1) / 2
    x = randn(1, n)
    middles = (np.arange(6)[:, None] + 0.5) * factor
    places = np.arange(-20 * factor, n + 20 * factor) + 0.5
    distance = places - middles
    cut = np.ceil(4 * s) + 0.5 * (factor % 2 == 0)
    weights = np.where(np.abs(distance) <= cut, np.exp(-0.5 * (distance / s) ** 2), 0)
    weights /= weights.sum(1, keepdims=True)
    padded = np.pad(x[0].numpy(), 20 * factor, mode="reflect")
    ours = Downsampling(factor, "gaussian", dims=1, sigma=sigma)(x)[0].numpy()
    np.testing.assert_allclose(ours, weights @ padded, atol=1e-12)
    if factor % 2:
        blurred = ndimage.gaussian_filter(x[0].numpy(), s, mode="mirror", radius=int(np.ceil(4 * s)))
        np.testing.assert_allclose(ours, blurred[factor // 2 :: factor], atol=1e-12)


def test_box_and_bicubic_of_any_rank_are_torchs() -> None:
    """Blocks of signals and volumes, not of images only (float64, 1e-12)."""
    x = randn(2, 3, 4, 6, 8)
    torch.testing.assert_close(Downsampling(2, dims=3)(x), functional.avg_pool3d(x, 2), rtol=0, atol=1e-12)
    torch.testing.assert_close(Downsampling((2, 3, 4))(x), functional.avg_pool3d(x, (2, 3, 4)), rtol=0, atol=1e-12)
    rows = x.flatten(0, 3).unsqueeze(1)
    torch.testing.assert_close(Downsampling(4, dims=1)(rows), functional.avg_pool1d(rows, 4), rtol=0, atol=1e-12)


def test_valid_taps_are_torchs_strided_convolution() -> None:
    """The first place is where the kernel fits first (float64, 1e-12)."""
    x, k = randn(2, 1, 9, 11), torch.outer(randn(3), randn(5, seed=1))
    expected = functional.conv2d(x, k.flip(0, 1)[None, None], stride=2)
    torch.testing.assert_close(Downsampling(2, k, "valid")(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("boundary", [*MODES, "valid"])
def test_gradient_of_a_separable_kernel(boundary: str) -> None:
    """A kernel that starts separable would be taken apart, and its gradient lost without a word."""
    k = torch.outer(kernel(3), kernel(2, seed=1)).requires_grad_()
    x = randn(1, 4, 5)
    y = Blur(k.detach(), boundary)(x)  # type: ignore[arg-type]

    def solve(k: Tensor) -> Tensor:
        A = Blur(k, boundary)  # type: ignore[arg-type]
        if isinstance(A, KrylovOperator):
            A.tolerance = 1e-12
        return A.gram_solve(0.4, 1.0, x, y) + A.adjoint(A(x))

    torch.autograd.gradcheck(solve, (k,))
    torch.autograd.gradcheck(lambda k: Downsampling((2, 5), k, "circular")(x), (k,))
    with pytest.raises(ValueError, match="being fitted"):
        Downsampling(2, k, "reflect")


def test_bad_calls_are_refused() -> None:
    """Each would give a wrong picture, or an error from deep inside."""
    for bad in (torch.tensor(1.0), torch.ones(0, 3), torch.full((3, 3), float("nan"))):
        with pytest.raises(ValueError, match="kernel"):
            BoundaryConvolution(bad)
    with pytest.raises(ValueError, match="unknown boundary"):
        BoundaryConvolution(kernel(3, 3), "mirror")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="do not fit"):
        BoundaryConvolution(kernel(3, 3))(torch.zeros(4, 4, dtype=F64))
    with pytest.raises(ValueError, match="does not fit"):
        BoundaryConvolution(kernel(5, 5), "valid")(torch.zeros(1, 4, 4, dtype=F64))
