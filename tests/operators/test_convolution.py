"""Blur and downsampling against their dense matrices, whatever structure solves them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from operator_suite import F64, KrylovSuite, OperatorSuite, randn
from torch import Tensor

from posteriori.operators import (
    Blur,
    CircularConvolution,
    Downsampling,
    GaussianBlur,
    KrylovOperator,
    LinearOperator,
    PaddedConvolution,
    Separable,
    gaussian_taps,
    motion_kernel,
)


def kernel(*size: int, seed: int = 0) -> Tensor:
    """A kernel without any symmetry: a flip or a shift by one would show."""
    k = randn(*size, seed=seed).abs() + 0.1
    return k / k.sum()


class TestCircular1dOdd(OperatorSuite):
    shape = (9,)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return CircularConvolution(kernel(5))


class TestCircular1dEven(OperatorSuite):
    shape = (8,)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return CircularConvolution(kernel(4))


class TestCircularRowsOfImages(OperatorSuite):
    """A kernel with one dimension acts along the last one."""

    shape = (2, 3, 6)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return CircularConvolution(kernel(3))


class TestCircularOddKernelEvenWidth(OperatorSuite):
    shape = (2, 5, 6)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return CircularConvolution(kernel(3, 5))


class TestCircularEvenKernelOddWidth(OperatorSuite):
    shape = (1, 6, 5)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return CircularConvolution(kernel(2, 4))


class TestCircularKernelAsLargeAsTheImage(OperatorSuite):
    shape = (1, 4, 5)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return CircularConvolution(kernel(4, 5))


class TestCircularVolume(OperatorSuite):
    shape = (1, 3, 4, 5)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return CircularConvolution(kernel(3, 2, 3))


class TestCircularKernelPerSample(OperatorSuite):
    shape = (2, 4, 5)
    tied = True

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return CircularConvolution(torch.stack([kernel(3, 3, seed=i) for i in samples]), per_sample=True)


class TestCircularUnstable(OperatorSuite):
    """A wide blur annihilates high frequencies: no pseudo-inverse."""

    shape = (1, 8, 8)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        taps = torch.tensor(gaussian_taps(1.3, 7), dtype=F64)
        return CircularConvolution(torch.outer(taps, taps))


class _Gaussian(OperatorSuite):
    __test__ = False
    shape = (2, 5, 6)
    boundary: str

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return GaussianBlur(0.7, boundary=self.boundary)  # type: ignore[arg-type]


class TestGaussianReflect(_Gaussian):
    __test__ = True
    boundary = "reflect"


class TestGaussianReplicate(_Gaussian):
    __test__ = True
    boundary = "replicate"


class TestGaussianZero(_Gaussian):
    __test__ = True
    boundary = "zero"


class TestGaussianCircular(_Gaussian):
    __test__ = True
    boundary = "circular"


class TestGaussianWiderThanTheImage(OperatorSuite):
    """The reflected border is reflected again, and there is no stable pseudo-inverse."""

    shape = (1, 5, 7)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return GaussianBlur(2.0)


class TestGaussianWidthPerSample(OperatorSuite):
    shape = (1, 4, 6)
    tied = True

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return GaussianBlur([0.4 + 0.15 * i for i in samples])


class TestGaussianOnGreyWithoutChannels(OperatorSuite):
    """Signals ``(H, W)``: the two convolved dimensions are all there is."""

    shape = (4, 6)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return GaussianBlur(0.5)


class TestBlurSeparableAsymmetric(OperatorSuite):
    shape = (1, 6, 5)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        A = Blur(torch.outer(kernel(3), kernel(4, seed=1)), "reflect")
        assert isinstance(A, Separable)
        return A


class TestBlurSeparablePerSample(OperatorSuite):
    shape = (2, 4, 5)
    tied = True

    def make(self, samples: Sequence[int]) -> LinearOperator:
        kernels = [torch.outer(kernel(3, seed=i), kernel(3, seed=i + 50)) for i in samples]
        return Blur(torch.stack(kernels), "replicate", per_sample=True)


class TestBlurDerivative(OperatorSuite):
    """The taps sum to zero: no sign can be read off their sum."""

    shape = (1, 5, 6)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Blur(torch.outer(torch.tensor([1.0, 0.0, -1.0]), torch.tensor([1.0, 2.0, 1.0])), "reflect")


class TestBoxBy2(OperatorSuite):
    shape = (2, 4, 6)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Downsampling(2)


class TestBoxBy3(OperatorSuite):
    shape = (1, 6, 9)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Downsampling(3)


class TestBoxBy4(OperatorSuite):
    shape = (1, 8, 4)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Downsampling(4)


class TestBicubicBy2(OperatorSuite):
    shape = (1, 6, 8)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Downsampling(2, "bicubic")


class TestBicubicBy3(OperatorSuite):
    shape = (1, 9, 6)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Downsampling(3, "bicubic")


class TestBicubicBy4(OperatorSuite):
    shape = (1, 8, 12)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Downsampling(4, "bicubic")


class TestTapsBy2(OperatorSuite):
    shape = (1, 6, 8)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Downsampling(2, torch.outer(kernel(4), kernel(4, seed=1)))


class TestTapsBy3(OperatorSuite):
    shape = (1, 6, 9)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Downsampling(3, torch.outer(kernel(5), kernel(5, seed=1)), boundary="zero")


class _Padded(KrylovSuite):
    __test__ = False
    shape = (1, 5, 6)
    boundary: str

    def build(self) -> KrylovOperator:
        A = Blur(kernel(3, 4), self.boundary)  # type: ignore[arg-type]
        assert isinstance(A, PaddedConvolution)
        return A


class TestPaddedReflect(_Padded):
    __test__ = True
    boundary = "reflect"


class TestPaddedReplicate(_Padded):
    __test__ = True
    boundary = "replicate"


class TestPaddedZero(_Padded):
    __test__ = True
    boundary = "zero"


class TestBlur1d(OperatorSuite):
    shape = (9,)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        A = Blur(kernel(4), "reflect")
        assert isinstance(A, Separable)
        return A


class TestBlur1dPerSample(OperatorSuite):
    shape = (7,)
    tied = True

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Blur(torch.stack([kernel(3, seed=i) for i in samples]), "zero", per_sample=True)


class TestBlur1dOfChannels(OperatorSuite):
    """A kernel with one dimension acts along the last one."""

    shape = (2, 3, 6)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Blur(kernel(3), "replicate")


class TestBlurSeparableVolume(OperatorSuite):
    shape = (1, 4, 3, 5)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        A = Blur(torch.einsum("i,j,k->ijk", kernel(3), kernel(2, seed=1), kernel(4, seed=2)), "reflect")
        assert isinstance(A, Separable)
        return A


class TestGaussianVolume(OperatorSuite):
    """Signals ``(D, H, W)``: the three blurred dimensions are all there is."""

    shape = (4, 3, 5)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return GaussianBlur(0.6, dims=3)


class TestGaussian1dWidthPerSample(OperatorSuite):
    shape = (2, 7)
    tied = True

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return GaussianBlur([0.4 + 0.1 * i for i in samples], dims=1)


class TestValid1d(OperatorSuite):
    shape = (9,)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Blur(kernel(4), "valid")


class TestValidSeparable(OperatorSuite):
    shape = (2, 6, 7)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        A = Blur(torch.outer(kernel(3), kernel(4, seed=1)), "valid")
        assert isinstance(A, Separable)
        return A


class TestValidKernelAsLargeAsTheImage(OperatorSuite):
    """One number is measured."""

    shape = (1, 3, 4)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Blur(torch.outer(kernel(3), kernel(4, seed=1)), "valid")


class TestGaussianValid(OperatorSuite):
    shape = (1, 9, 10)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return GaussianBlur(0.7, 5, "valid")


class TestBox1dBy3(OperatorSuite):
    shape = (2, 9)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Downsampling(3, dims=1)


class TestBicubic1dBy2(OperatorSuite):
    shape = (10,)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Downsampling(2, "bicubic", dims=1)


class TestBoxOfVolumeSlices(OperatorSuite):
    """Thick slices: only one of the dimensions is downsampled."""

    shape = (1, 6, 3, 2)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Downsampling((3, 1, 1))


class TestBicubicVolume(OperatorSuite):
    shape = (4, 6, 2)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Downsampling(2, "bicubic", dims=3)


class TestGaussianBy2(OperatorSuite):
    shape = (1, 6, 8)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Downsampling(2, "gaussian")


class TestGaussianBy3(OperatorSuite):
    shape = (1, 6, 9)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Downsampling(3, "gaussian", "zero", sigma=0.8)


class TestTapsValidBy2(OperatorSuite):
    shape = (1, 7, 9)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Downsampling(2, torch.outer(kernel(3), kernel(5, seed=1)), "valid")


def test_structure_is_found() -> None:
    """A separable or circular blur solved by conjugate gradients: slow and inexact without need."""
    rank_one = torch.outer(kernel(3), kernel(5))
    assert Blur(rank_one).solver == "exact (kronecker-svd)"
    assert Blur(rank_one.float()).solver == "exact (kronecker-svd)"
    assert Blur(kernel(3, 3), "circular").solver == "exact (fft)"
    assert Blur(kernel(3, 3)).solver == "cg"
    assert Blur(kernel(3, 3), "valid").solver == "cg"
    assert Blur(kernel(5)).solver == "exact (kronecker-svd)"
    assert Blur(kernel(3, 3, 3), "circular").solver == "exact (fft)"
    assert Downsampling(2, kernel(3, 3), "circular").solver == "exact (polyphase)"
    assert Downsampling(2, rank_one, "circular").solver == "exact (kronecker-svd)"


def test_bad_kernels_and_boundaries_are_refused() -> None:
    """Each would give a wrong picture, or an error from deep inside."""
    for bad in (torch.tensor(1.0), torch.ones(0, 3), torch.full((3, 3), float("nan"))):
        with pytest.raises(ValueError, match="kernel"):
            Blur(bad)
    with pytest.raises(ValueError, match="acts on batches"):
        Blur(torch.ones(2, 3, 3))(torch.zeros(2, 8, 8))
    with pytest.raises(ValueError, match="crop the kernel"):
        Blur(torch.ones(9, 9), "valid")(torch.zeros(1, 1, 8, 10))
    with pytest.raises(ValueError, match="too long for a dense SVD"):
        Blur(kernel(3))(torch.zeros(1, 10_000))
    with pytest.raises(ValueError, match="unknown boundary"):
        Blur(kernel(3, 3), "mirror")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown boundary"):
        PaddedConvolution(kernel(3, 3), "circular")
    with pytest.raises(ValueError, match="kernel"):
        PaddedConvolution(kernel(3))
    with pytest.raises(ValueError, match="does not fit"):
        CircularConvolution(kernel(5, 5))(torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="too large to reflect"):
        Blur(kernel(9, 9))(torch.zeros(1, 1, 4, 4))


def test_bad_widths_and_factors_are_refused() -> None:
    """A width of 0, an even number of taps (no centre), a factor that cuts the last row off."""
    for width in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive width"):
            GaussianBlur(width)
    with pytest.raises(ValueError, match="odd number of taps"):
        GaussianBlur(1.0, taps=4)
    for factor in (0, -2, 1.5):
        with pytest.raises(ValueError, match="whole number"):
            Downsampling(factor)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown downsampling kernel"):
        Downsampling(2, "lanczos")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not separable"):
        Downsampling(2, kernel(3, 3))
    with pytest.raises(ValueError, match="3 of them"):
        Downsampling((2, 2), torch.ones(2, 2, 2) / 8)
    with pytest.raises(ValueError, match="positive width"):
        Downsampling(2, "gaussian", sigma=0.0)
    with pytest.raises(ValueError, match="dims is"):
        GaussianBlur(1.0, dims=0)
    with pytest.raises(ValueError, match="unknown boundary"):
        GaussianBlur(1.0, boundary="mirror")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every 2th place"):
        Downsampling(2, torch.ones(3) / 3, "valid")(torch.zeros(1, 8))
    with pytest.raises(ValueError, match="factors for the axes"):
        Separable()
    for A in (Downsampling(2), Downsampling(2, "bicubic"), Downsampling(2, torch.ones(2, 2) / 4)):
        with pytest.raises(ValueError, match="not a multiple of the factor"):
            A(torch.zeros(1, 1, 7, 8))


def test_gradient_of_a_kernel_survives_a_second_step() -> None:
    """A remembered transfer function would keep the graph of the first step: kernels could not be fitted."""
    k = kernel(3, 3).requires_grad_()
    A, x = CircularConvolution(k), randn(2, 1, 5, 6)
    for _ in range(2):
        k.grad = None
        A(x).square().sum().backward()
    torch.autograd.gradcheck(lambda k: CircularConvolution(k).gram_solve(0.4, 1.0, x), (k,))


def test_motion_kernels() -> None:
    """Kernels that do not sum to one darken the picture; off centre they move it; one for all seeds is no variety."""
    kernels = [motion_kernel(21, 0.5, seed).double() for seed in range(5)]
    grid = torch.arange(21, dtype=F64) - 10
    for k in kernels:
        assert float(k.min()) >= 0
        assert abs(float(k.sum()) - 1) < 1e-5
        assert abs(float((k.sum(1) * grid).sum())) < 1
        assert abs(float((k.sum(0) * grid).sum())) < 1
    assert torch.equal(motion_kernel(21, 0.5, 3), motion_kernel(21, 0.5, 3))
    assert float((kernels[0] - kernels[1]).abs().max()) > 0.01
    with pytest.raises(ValueError, match="intensity"):
        motion_kernel(21, 1.5)
