"""Operators made of operators: each as a matrix product, a multiple, or matrices below each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.ndimage
import torch
from operator_suite import F64, KrylovSuite, OperatorSuite, dense, randn
from torch import Tensor

import posteriori as po
from posteriori.operators import (
    DCT,
    Bayer,
    Blur,
    Callable,
    ChannelMixing,
    CircularConvolution,
    CircularDownsampling,
    Composition,
    Crop,
    Downsampling,
    GaussianBlur,
    Grayscale,
    Hadamard,
    Identity,
    Inpainting,
    KrylovOperator,
    LinearOperator,
    Matrix,
    Nothing,
    Pad,
    PaddedConvolution,
    Sampling,
    Stack,
    Weighting,
    check,
    motion_kernel,
    stack,
)
from posteriori.operators.algebra import Permuted

KERNEL = randn(3, 2, seed=5).abs() / 3
KERNELS = randn(8, 3, 3, seed=6)


def weights(*size: int, seed: int = 3) -> Tensor:
    w = randn(*size, seed=seed).abs()
    return torch.where(w < 0.5, torch.zeros_like(w), w)


def krylov(A: LinearOperator) -> KrylovOperator:
    assert isinstance(A, KrylovOperator), A
    return A


# -- products -------------------------------------------------------------------------------------------------------


class TestMaskOfWeights(OperatorSuite):
    shape = (2, 4, 5)
    tied = True

    def make(self, samples: Sequence[int]) -> LinearOperator:
        masks = (weights(8, 1, 4, 5) > 0)[list(samples)]
        return Inpainting(masks) @ Weighting(weights(2, 4, 5, seed=8))


class TestCropOfWeights(OperatorSuite):
    shape = (2, 4, 6)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Weighting(weights(2, 3, 3)) @ Crop((1, 0), (2, 1)) @ Weighting(weights(4, 6, seed=4))


class TestWeightedMosaic(OperatorSuite):
    shape = (3, 4, 5)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Weighting(weights(1, 4, 5)) @ Bayer("GRBG") @ Weighting(weights(3, 4, 5, seed=4))


class TestWeightedSamplesPerSample(OperatorSuite):
    shape = (2, 6)
    tied = True

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Weighting(weights(8, 1, 4)[list(samples)]) @ Sampling(torch.tensor([5, 0, 0, 3]), 6)


class TestCropOfPad(OperatorSuite):
    shape = (1, 3, 4)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Crop((0, 1), (2, 2)) @ Pad(1, (1, 0))


class TestConvolutionTwice(OperatorSuite):
    shape = (2, 5, 4)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return CircularConvolution(KERNEL) @ GaussianBlur(0.6, 3, "circular")


class TestConvolutionTwicePerSample(OperatorSuite):
    shape = (1, 4, 6)
    tied = True

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return CircularConvolution(KERNELS[list(samples)], per_sample=True) @ CircularConvolution(KERNEL)


class TestSeparableTwice(OperatorSuite):
    shape = (2, 4, 6)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Downsampling(2, "bicubic") @ GaussianBlur(0.7, 3)


class TestSeparableWithCropsPerSample(OperatorSuite):
    shape = (1, 4, 5)
    tied = True

    def make(self, samples: Sequence[int]) -> LinearOperator:
        blur = GaussianBlur([0.5 + 0.2 * i for i in samples], 3)
        return Crop(1) @ Downsampling(2) @ blur @ Pad((1, 1), (0, 1))


class TestCropOfVolume(OperatorSuite):
    shape = (1, 3, 3, 4)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Crop((1, 0), 0, (0, 2))


class TestPadOfVector(OperatorSuite):
    shape = (5,)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Pad((2, 1))


class TestMatrixTwice(OperatorSuite):
    shape = (2, 3)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Weighting(weights(3).clamp_min(0.1)) @ Matrix(randn(3, 4)) @ Matrix(randn(4, 6, seed=1), (2, 3))


class TestMatrixOfWeights(OperatorSuite):
    shape = (2, 3)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Matrix(randn(4, 6), (2, 3)) @ Weighting(weights(3))


class TestGreyBlur(OperatorSuite):
    shape = (3, 4, 5)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Grayscale() @ CircularConvolution(KERNEL)


class TestMixedChannelsSmaller(OperatorSuite):
    shape = (3, 4, 4)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Downsampling(2) @ ChannelMixing(randn(2, 3))


class TestGreyMaskPerSample(OperatorSuite):
    shape = (3, 3, 4)
    tied = True

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Inpainting((weights(8, 1, 3, 4) > 0)[list(samples)]) @ Grayscale()


class TestPaddedMeasurement(OperatorSuite):
    shape = (1, 4, 4)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Pad((1, 0), 2) @ (2 * Downsampling(2))


class TestPaddedDecimation(OperatorSuite):
    shape = (1, 4, 4)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Pad(1, 1) @ CircularDownsampling(KERNEL, 2)


class TestPermutedMeasurement(OperatorSuite):
    shape = (2, 4, 6)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Permuted((2, 0, 1), Downsampling(2))


class TestComposition(KrylovSuite):
    shape = (2, 4, 5)

    def build(self) -> KrylovOperator:
        return krylov(Inpainting(weights(2, 4, 5) > 0) @ Blur(KERNELS[0], "reflect") @ Weighting(weights(4, 5, seed=9)))


class TestCroppedCircularBlur(KrylovSuite):
    """A blur that knows nothing of what lies outside its field of view."""

    shape = (1, 5, 6)

    def build(self) -> KrylovOperator:
        return krylov(Crop(1, (1, 2)) @ CircularConvolution(KERNELS[0]))


class TestCompositionOfFunctions(KrylovSuite):
    shape = (2, 3)

    def build(self) -> KrylovOperator:
        return krylov(Matrix(randn(4, 6), (2, 3)) @ Callable(lambda x: x.cumsum(-1) / 2, shape=(2, 3)))


# -- multiples --------------------------------------------------------------------------------------------------------


class TestMultiple(OperatorSuite):
    shape = (1, 4, 5)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return -2.5 * GaussianBlur(0.8, 3)


class TestMultiplePerSample(OperatorSuite):
    shape = (2, 4, 4)
    tied = True

    def make(self, samples: Sequence[int]) -> LinearOperator:
        factors = 0.5 * 1.3 ** torch.arange(8, dtype=F64)
        return CircularDownsampling(KERNEL, 2) * factors[list(samples)] if len(samples) > 1 else self.one(samples[0])

    def one(self, i: int) -> LinearOperator:
        return 0.5 * 1.3**i * CircularDownsampling(KERNEL, 2)


class TestMultipleOfWeights(OperatorSuite):
    shape = (3, 4)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return 3 * Weighting(weights(3, 4))


# -- stacks -----------------------------------------------------------------------------------------------------------


class TestStackOfWeights(OperatorSuite):
    shape = (2, 3, 4)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        parts = [Weighting(weights(3, 4)), Inpainting(weights(2, 3, 4, seed=5) > 0), Crop(1, 1), 3 * Identity()]
        return stack(parts, [0.1, 0.3, 0.2, 0.5], shape=self.shape)


class TestStackOfConvolutions(OperatorSuite):
    shape = (1, 4, 6)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        twice = CircularConvolution(KERNEL) @ CircularConvolution(KERNELS[2])
        return stack([-2 * CircularConvolution(KERNELS[1]), twice, Identity()], [0.1, 0.3, 1.0], shape=self.shape)


class TestStackPerSample(OperatorSuite):
    shape = (1, 4, 6)
    tied = True

    def make(self, samples: Sequence[int]) -> LinearOperator:
        blur = CircularConvolution(KERNELS[list(samples)], per_sample=True)
        sigma = (0.1 * (1 + torch.arange(8, dtype=F64)))[list(samples)]
        return stack([blur, 2 * Identity()], [sigma, 0.3], shape=self.shape)


class TestStackOfOneOperatorTwice(OperatorSuite):
    shape = (1, 4, 4)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return stack([Downsampling(2), 0.5 * Downsampling(2)], [0.1, 0.2], shape=self.shape)


class TestStackOfMatrices(OperatorSuite):
    shape = (2, 3)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return stack([Matrix(randn(4, 6), (2, 3)), 2 * Matrix(randn(1, 6, seed=1), (2, 3))], [0.1, 0.05])


class TestStackOfDifferentOperators(KrylovSuite):
    shape = (1, 4, 4)

    def build(self) -> KrylovOperator:
        parts = [Downsampling(2), CircularConvolution(KERNEL), Inpainting(weights(4, 4) > 0)]
        return krylov(stack(parts, [0.3, 0.2, 0.4], shape=self.shape))


# -- meaning ----------------------------------------------------------------------------------------------------------


def test_what_stays_exact_says_so() -> None:
    """A product that has a structure would be solved a hundred times slower, or claim a structure it has not."""
    mask = Inpainting(weights(8, 8) > 0)
    circular, box = CircularConvolution(KERNEL), Downsampling(2)
    expected = {
        "exact (diagonal)": [mask @ Weighting(weights(8, 8)), Crop(1, 1) @ mask, Crop(1) @ Crop(2), Bayer() @ mask],
        "exact (fft)": [circular @ circular @ circular, 3 * circular],
        "exact (kronecker-svd)": [box @ GaussianBlur(1.0), Crop(2, 2) @ GaussianBlur(1.0), box @ Pad(1, 1)],
        "exact (channels x fft)": [Grayscale() @ circular, circular @ Grayscale()],
        "exact (channels x diagonal)": [Crop(1, 1) @ Grayscale()],
        "exact (channels)": [ChannelMixing(torch.ones(1, 2)) @ ChannelMixing(torch.ones(2, 3))],
        "exact (svd)": [Matrix(torch.eye(3)) @ Matrix(torch.ones(3, 4))],
        "cg": [mask @ circular, circular @ mask, Blur(KERNELS[0]) @ Blur(KERNELS[0]), box @ circular],
    }
    for solver, operators in expected.items():
        for A in operators:
            assert A.solver == solver, A


SAME_SHAPE: dict[str, LinearOperator] = {
    "identity": Identity(),
    "nothing": Nothing(),
    "multiple": Weighting(torch.tensor(0.75)),  # exact in single precision
    "mask": Inpainting((weights(4, 8) > 0).float()),
    "weights": Weighting(weights(2, 4, 8, seed=4)),
    "circular": Blur(KERNEL, "circular"),
    "separable": GaussianBlur(0.8),
    "separable, circular": GaussianBlur(0.6, 3, "circular"),
    "general": Blur(randn(3, 3, seed=9), "replicate"),
    "channels": ChannelMixing(randn(2, 2, seed=8)),
    "hadamard": Hadamard((weights(4, 8, seed=6) > 0).float()),
    "dct": DCT((weights(4, 8, seed=7) > 0).float(), scramble=1),
    "function": Callable(lambda x: x.flip(-1) + 0.3 * x, shape=(2, 4, 8)),
}


@pytest.mark.parametrize("inner", SAME_SHAPE)
@pytest.mark.parametrize("outer", SAME_SHAPE)
def test_combinations_are_what_they_say(outer: str, inner: str) -> None:
    """A structure recognised wrongly (a transform whose weights were taken for those of a mask) gives an operator that
    is consistent with itself and another than the one written: products, multiples and stacks of all pairs, applied
    one after the other."""
    B, A, x = SAME_SHAPE[outer], SAME_SHAPE[inner], randn(2, 2, 4, 8)
    y = B(A(x))
    both = stack([B, 0.5 * A], shape=(2, 4, 8))
    for found, expected in [
        ((B @ A)(x), y),
        ((-2.0 * (B @ A))(x), -2.0 * y),
        ((B @ A).adjoint(x), A.adjoint(B.adjoint(x))),
        (both.split(both(x))[0], B(x)),
        (both.split(both(x))[1], 0.5 * A(x)),
        (both.adjoint(both(x)), B.adjoint(B(x)) + 0.25 * A.adjoint(A(x))),
    ]:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * float(expected.abs().max()) + 1e-12)


@pytest.mark.parametrize("transform", [Hadamard, DCT])
def test_weights_after_a_transform_stay_exact(transform: type[Hadamard] | type[DCT]) -> None:
    """Noise that differs between the coefficients of a single-pixel camera would cost conjugate gradients."""
    A = transform((weights(4, 8, seed=6) > 0).float(), scramble=3)
    for B in (Weighting(weights(4, 8)), Inpainting((weights(4, 8) > 0).float())):
        assert (B @ A).exact
        check(B @ A, (2, 4, 8))
    assert stack([A, A], [0.1, 0.2], shape=(2, 4, 8)).exact
    assert not stack([A, Inpainting((weights(4, 8) > 0).float())], shape=(2, 4, 8)).exact


def test_compositions_are_flat_and_simplify_where_they_meet() -> None:
    """``(C @ B) @ A`` and ``C @ (B @ A)`` would be different operators, one of them slow."""
    mask, blur = Inpainting(weights(8, 8) > 0), Blur(KERNELS[0])
    circular = CircularConvolution(KERNEL)
    for A in ((mask @ blur) @ (circular @ mask), mask @ (blur @ circular) @ mask):
        assert isinstance(A, Composition)
        assert [type(f) for f in A.operators] == [Inpainting, type(blur), CircularConvolution, Inpainting]
    assert len((mask @ blur @ circular @ circular).operators) == 3  # type: ignore[attr-defined]
    assert (mask @ Identity()) is mask
    assert isinstance((2 * blur) @ (0.5 * blur), Composition)  # the factors cancel


def test_products_as_scipy_computes_them() -> None:
    """Blur, then crop: in the other order, or with the wrong side cropped, the picture is another."""
    x = randn(1, 1, 9, 8)
    kernel = KERNELS[0].numpy()
    blurred = scipy.ndimage.convolve(x[0, 0].numpy(), kernel, mode="mirror")
    A = 2 * Crop((1, 3), (2, 0)) @ Blur(KERNELS[0], "reflect")
    np.testing.assert_allclose(A(x)[0, 0], 2 * blurred[1:6, 2:], atol=1e-12)
    padded = np.pad(blurred, ((0, 1), (2, 3)))
    np.testing.assert_allclose((Pad((0, 1), (2, 3)) @ Blur(KERNELS[0]))(x)[0, 0], padded, atol=1e-12)
    assert Crop.box((1, 2), (5, 6), (9, 8)).margins == ((1, 3), (2, 0))


def test_fillers_are_not_counted() -> None:
    """Residuals would be divided by entries that measure nothing."""
    mask = Inpainting(weights(8, 8) > 0)
    count = float((weights(8, 8) > 0).sum())
    x = randn(2, 1, 8, 8)
    for A, expected in [
        (mask @ Blur(KERNELS[0]), count),
        (Blur(KERNELS[0]) @ mask, 64),
        (Weighting(2 * torch.ones(8, 8)) @ (mask @ Blur(KERNELS[0])), count),
        (Pad(2, 2) @ (mask @ Blur(KERNELS[0])), count),
        (Pad(2, 2) @ Blur(KERNELS[0]), 64),
        (3 * mask, count),
        (Crop(1, 1) @ Inpainting(torch.eye(8)), 6),
        (stack([mask, Identity(), Nothing()], shape=(1, 8, 8)), count + 64),
    ]:
        assert A.measurement_count(A(x)).tolist() == [expected, expected], A


def test_parameters_per_sample_propagate() -> None:
    """Expanding such an operator for several samples would broadcast the wrong parameters."""
    per_sample = CircularConvolution(KERNELS, per_sample=True)
    assert (Crop(1, 1) @ per_sample).samples(4) == 8
    assert (per_sample @ Inpainting(weights(8, 8) > 0)).samples(4) == 8
    assert (Weighting(weights(8, 4)) @ Matrix(randn(4, 9), (1, 3, 3))).samples(4) == 8
    assert (2 * per_sample).samples(4) == (torch.ones(8) * Blur(KERNELS[0])).samples(4) == 8
    assert stack([per_sample, Identity()], shape=(1, 8, 8)).samples(4) == 8
    assert (Crop(1, 1) @ CircularConvolution(KERNEL)).samples(4) is None


def test_stack_is_the_posterior_of_all_measurements() -> None:
    """Two measurements with noises of their own: the exact posterior by Bayes' rule in dense algebra."""
    A_1, A_2, s_1, s_2 = Matrix(randn(2, 5)), Matrix(randn(4, 5, seed=1)), 0.1, 0.6
    y_1, y_2 = randn(1, 2, seed=2), randn(1, 4, seed=3)
    A = stack([A_1, A_2], [s_1, s_2])
    assert A.sigma_y == pytest.approx((s_1 * s_2) ** 0.5)
    prior = po.priors.Gaussian(torch.zeros(5, dtype=F64), torch.eye(5, dtype=F64))
    found = prior.posterior(A, A.join([y_1, y_2]), float(A.sigma_y))
    precision = torch.eye(5, dtype=F64) + sum(M.matrix.T @ M.matrix / s**2 for M, s in ((A_1, s_1), (A_2, s_2)))
    pull = sum((M.matrix.T @ y[0] / s**2 for M, y, s in ((A_1, y_1, s_1), (A_2, y_2, s_2))), torch.zeros(5, dtype=F64))
    torch.testing.assert_close(found.covariance, torch.linalg.inv(precision))
    torch.testing.assert_close(found.mean, torch.linalg.solve(precision, pull))


def test_split_undoes_join() -> None:
    """The parts of a simulated measurement would have another scale or order than those measured."""
    A = stack([Downsampling(2), CircularConvolution(KERNEL)], [0.1, torch.tensor([0.2, 0.4])], shape=(3, 4, 6))
    x = randn(2, 3, 4, 6)
    parts = [Downsampling(2)(x), CircularConvolution(KERNEL)(x)]
    for one, other in zip(A.split(A(x)), parts, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(A.join(parts), A(x))
    noisy = A.split(po.measure(A, 0 * x.repeat(1, 1, 1, 1), A.sigma_y, seed=0))
    assert [p.shape for p in noisy] == [p.shape for p in parts]


def test_noise_of_the_parts() -> None:
    """``measure`` on a stack must give every part the noise that was asked for: within 5 standard errors."""
    A = stack([Identity(), Weighting(torch.ones(100, 100))], [0.1, 0.7], shape=(1, 100, 100))
    parts = A.split(po.measure(A, torch.zeros(1, 1, 100, 100), A.sigma_y, seed=1))
    for part, sigma in zip(parts, (0.1, 0.7), strict=True):
        assert abs(float(part.square().mean().sqrt()) / sigma - 1) < 5 / (2 * 10_000) ** 0.5


def test_stack_after_an_operator() -> None:
    """Each part keeps its structure when something comes before all of them."""
    A = stack([CircularConvolution(KERNEL), Identity()], [0.1, 0.2], shape=(1, 4, 6)) @ CircularConvolution(KERNELS[0])
    assert isinstance(A, Stack)
    assert A.solver == "exact (fft)"
    blurred = CircularConvolution(KERNELS[0])(randn(1, 1, 4, 6))
    torch.testing.assert_close(A.split(A(randn(1, 1, 4, 6)))[1], blurred)


def test_every_combination_passes_the_check() -> None:
    """What users build has to pass the test that their own operators are given."""
    for A, shape in [
        (0.5 * Blur(KERNELS[0]), (1, 8, 8)),
        (Pad(1, 1) @ Blur(KERNELS[0]), (1, 8, 8)),
        (Downsampling(2) @ CircularConvolution(KERNEL), (3, 8, 8)),
        (stack([Downsampling(2), Identity()], [0.1, 0.2], shape=(3, 8, 8)), (3, 8, 8)),
    ]:
        check(A, shape)


def test_scaled_solves_in_single_precision() -> None:
    """Scaling a measurement changes nothing but its units: neither should the accuracy of the pivot."""
    A = CircularConvolution(torch.ones(5, 5) / 25)
    x_t = 80 * randn(1, 1, 32, 32).float()
    y = A(randn(1, 1, 32, 32, seed=1).float())
    for factor in (1e-3, 7.0, 1e3):
        scales = {"alpha_t": 1.0, "sigma_t": 80.0}
        plain = po.pivot(x_t.double(), y.double(), A, sigma_y=0.01, **scales)
        other = po.pivot(x_t, factor * y, factor * A, sigma_y=factor * 0.01, **scales)
        e = other.double() - plain
        whitened = ((e.square().sum() / 6400 + A(e).square().sum() / 1e-4) / e.numel()).sqrt()
        assert float(whitened) < 1e-2


@pytest.mark.parametrize(("make", "message"), [
    (lambda: 0 * Blur(KERNEL), "not 0"),
    (lambda: math.nan * Identity(), "finite"),
    (lambda: Crop(-1), "from 0 on"),
    (lambda: Crop(), "from 0 on"),
    (lambda: Crop(3, 3)(torch.zeros(1, 1, 6, 6)), "leave nothing"),
    (lambda: Crop.box((4, 0), (3, 3), (6, 6)), "does not lie inside"),
    (lambda: Crop.box((4,), (3, 3), (6, 6)), "one entry per dimension"),
    (lambda: Weighting(torch.ones(3)) @ Weighting(torch.ones(4)), "do not fit together"),
    (lambda: GaussianBlur([1, 2]) @ GaussianBlur([1, 2, 3]), "2 and 3 samples"),
    (lambda: stack([]), "at least one"),
    (lambda: stack([Identity()]), "give shape"),
    (lambda: stack([Identity()], [0.1, 0.2], shape=(1,)), "give one each"),
    (lambda: stack([Identity()], [0.0], shape=(1,)), "positive"),
    (lambda: stack([Identity()], shape=(3,)).join([torch.zeros(1, 4)]), "measurement 0 has shape"),
    (lambda: stack([Identity()], shape=(3,)).join([]), "got 0"),
    (lambda: stack([Identity()], shape=(3,)).adjoint(torch.zeros(1, 4)), "make it with join"),
    (lambda: stack([Identity()], shape=(3,))(torch.zeros(1, 4)), "acts on signals"),
])  # fmt: skip
def test_bad_combinations_are_refused(make: object, message: str) -> None:
    """Each would fail later with a message about tensors, or broadcast."""
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_operators_do_not_multiply_by_anything_else() -> None:
    """``A @ x`` is not how an operator is applied; a silent attempt would give something else."""
    with pytest.raises(TypeError):
        Identity() @ torch.ones(3)
    with pytest.raises(TypeError):
        "2" * Identity()
    torch.testing.assert_close(dense(np.float64(2) * Identity(), (3,), 1), 2 * torch.eye(3, dtype=F64)[None])


N = 24
HALF = (randn(N, N, seed=9) > 0).double()
SHAKE = motion_kernel(9, 0.5, 0).double(), motion_kernel(9, 0.5, 3).double()
NEARLY = {
    "mask after blur": lambda: Inpainting(HALF) @ GaussianBlur(1.5),
    "mask per sample after blur": lambda: Inpainting(torch.stack([HALF, 1 - HALF])[:, None]) @ GaussianBlur(1.5),
    "weights after circular blur": lambda: Weighting(0.5 + HALF) @ CircularConvolution(SHAKE[0]),
    "samples of a blur": lambda: Sampling(HALF > 0) @ GaussianBlur(1.5),
    "blur and mask": lambda: stack([GaussianBlur(1.5), Inpainting(HALF)], [0.02, 0.1], shape=(1, N, N)),
    "two shaken pictures": lambda: stack([PaddedConvolution(k) for k in SHAKE], [0.05, 0.06], shape=(1, N, N)),
}


@pytest.mark.parametrize("name", NEARLY)
def test_what_is_close_to_a_product_or_stack_saves_iterations(name: str) -> None:
    """It costs two changes of basis an iteration: a third of the iterations saved, or it should go. The answer is the
    same within the tolerance of both."""
    A, plain = NEARLY[name](), NEARLY[name]()
    assert isinstance(A, KrylovOperator)
    assert isinstance(plain, KrylovOperator)
    A.dense_entries = plain.dense_entries = 0
    plain.surrogate = lambda like: None  # type: ignore[method-assign]
    x, y = randn(2, 1, N, N), A(randn(2, 1, N, N, seed=1))
    found, slow = (B.solve(1e-4, 0.25, 1e-4 * x, 0.25 * y, unit=25e-6) for B in (A, plain))
    assert bool(found.converged.all())
    assert found.iterations < 0.67 * slow.iterations, (found.iterations, slow.iterations)
    assert float((found.x - slow.x).square().mean().sqrt()) < 2 * 2e-3 * 0.5  # two errors, at most sigma_t of each


def test_parts_with_nothing_in_common_have_no_surrogate() -> None:
    """A spectrum in one basis would be added to one in another."""
    like = torch.zeros(1, 1, N, N, dtype=F64)
    parts = [GaussianBlur(1.5), CircularConvolution(SHAKE[0])]
    for A in (stack(parts, shape=(1, N, N)), parts[0] @ parts[1], Crop(2) @ parts[1]):
        assert isinstance(A, KrylovOperator)
        assert A.surrogate(like) is None
