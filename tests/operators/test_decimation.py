"""Circular downsampling with any kernel, solved by its polyphase structure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from operator_suite import F64, OperatorSuite, dense, randn
from scipy import ndimage
from test_convolution import kernel
from torch import Tensor

from posteriori.operators import CircularConvolution, CircularDownsampling, Downsampling, LinearOperator, Separable
from posteriori.pivot import pivot


class TestBy2(OperatorSuite):
    shape = (2, 4, 6)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        A = Downsampling(2, kernel(3, 3), "circular")
        assert isinstance(A, CircularDownsampling)
        return A


class TestBy3EvenKernel(OperatorSuite):
    shape = (1, 9, 6)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Downsampling(3, kernel(4, 5), "circular")


class TestBy4(OperatorSuite):
    shape = (1, 8, 4)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Downsampling(4, kernel(4, 4), "circular")


class TestOfOneAxis(OperatorSuite):
    """A factor of 1 beside another: that axis is blurred only."""

    shape = (1, 4, 6)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Downsampling((1, 3), kernel(3, 4), "circular")


class TestBy1(OperatorSuite):
    """Nothing is decimated, so nothing is hidden."""

    shape = (1, 4, 5)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return CircularDownsampling(kernel(2, 3), 1)


class Test1dBy2(OperatorSuite):
    shape = (8,)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return CircularDownsampling(kernel(5), 2)


class TestVolume(OperatorSuite):
    shape = (4, 2, 6)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Downsampling(2, kernel(3, 2, 3), "circular")


class TestKernelPerSample(OperatorSuite):
    shape = (1, 4, 6)
    tied = True

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return CircularDownsampling(torch.stack([kernel(3, 3, seed=i) for i in samples]), 2, per_sample=True)


class TestSilentFrequencies(OperatorSuite):
    """A difference over blocks: constants, and every alias of theirs, are measured as 0."""

    shape = (1, 4, 4)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        k = torch.zeros(3, 3, dtype=F64)
        k[0, 0], k[2, 0], k[0, 2], k[2, 2] = 1.0, -1.0, -1.0, 1.0
        return CircularDownsampling(k, 2)


@pytest.mark.parametrize("taps", [(3, 3), (4, 4), (5, 2), (7, 6)], ids=str)
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_is_blur_and_decimation(factor: int, taps: tuple[int, int]) -> None:
    """Blocks seen half a pixel or a pixel aside, or a flipped kernel: SciPy's convolution, every ``factor``-th entry
    (float64, 1e-12)."""
    x, k = randn(1, 2, 3 * factor * 2, 2 * factor * 2), randn(*taps, seed=3)
    blurred = np.stack([ndimage.convolve(p.numpy(), k.numpy(), mode="wrap") for p in x[0]])
    # the centre of k taps is entry k // 2; on a block of f entries the taps begin at (f - k) // 2
    o = [(factor - t) // 2 + (t - 1) // 2 for t in taps]
    expected = np.roll(blurred, (-o[0], -o[1]), (1, 2))[:, ::factor, ::factor]
    np.testing.assert_allclose(CircularDownsampling(k, factor)(x)[0].numpy(), expected, atol=1e-12)


def test_agrees_with_the_kronecker_form() -> None:
    """Two structures for one operator: measurements and solves are the same (float64, 1e-10)."""
    k = torch.outer(kernel(4), kernel(5, seed=1))
    separable, polyphase = Downsampling(3, k, "circular"), CircularDownsampling(k, 3)
    assert isinstance(separable, Separable)
    x, y = randn(2, 1, 9, 12), randn(2, 1, 3, 4, seed=1)
    torch.testing.assert_close(polyphase(x), separable(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        polyphase.gram_solve(1e-4, 2.0, x, y), separable.gram_solve(1e-4, 2.0, x, y), rtol=0, atol=1e-8
    )
    torch.testing.assert_close(CircularDownsampling(k, 1)(x), CircularConvolution(k)(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sigma_t", [0.002, 1.0, 80.0])
def test_single_precision_does_not_cancel(sigma_t: float) -> None:
    """The textbook solution loses the measurement at high noise: whitened error of the float32 pivot at
    sigma_y = 1e-3 against a float64 solve of the dense system, at most 1e-2."""
    shape, sigma_y = (1, 32, 32), 1e-3
    A = CircularDownsampling(kernel(9, 9), 4)
    x_0 = randn(1, *shape, dtype=torch.float32)
    y = A(x_0) + sigma_y * randn(1, 1, 8, 8, seed=1, dtype=torch.float32)
    x_t = x_0 + sigma_t * randn(1, *shape, seed=2, dtype=torch.float32)
    found = pivot(x_t, y, A, alpha_t=1.0, sigma_t=sigma_t, sigma_y=sigma_y).double().flatten()
    matrix = dense(A, shape, 1)[0]
    system = sigma_t**2 * matrix.T @ matrix + sigma_y**2 * torch.eye(matrix.shape[1], dtype=F64)
    rhs = sigma_y**2 * x_t.double().flatten() + sigma_t**2 * matrix.T @ y.double().flatten()
    e = found - torch.linalg.solve(system, rhs)
    whitened = ((e / sigma_t).square().sum() + (matrix @ e / sigma_y).square().sum()) / math.prod(shape)
    assert float(whitened.sqrt()) <= 1e-2


def test_gradient_of_a_kernel() -> None:
    """Blind super-resolution fits the kernel through the solve; a remembered spectrum would keep an old graph."""
    k, x, y = kernel(3, 3).requires_grad_(), randn(1, 1, 4, 4), randn(1, 1, 2, 2, seed=1)

    def solve(k: Tensor) -> Tensor:
        A = CircularDownsampling(k, 2)
        return A.gram_solve(0.4, 1.0, x, y) + A.adjoint(A(x))

    torch.autograd.gradcheck(solve, (k,))
    A = CircularDownsampling(k, 2)
    for _ in range(2):
        A(x).square().sum().backward()


def test_bad_filters_and_factors_are_refused() -> None:
    """Each would fail from deep inside, or drop the last rows."""
    for bad in (torch.tensor(1.0), torch.ones(0, 2), torch.full((2, 2), float("inf"))):
        with pytest.raises(ValueError, match="filter"):
            CircularDownsampling(bad, 2)
    for factors in (0, 1.5, (2, 2, 2)):
        with pytest.raises(ValueError, match="factor"):
            CircularDownsampling(kernel(3, 3), factors)  # type: ignore[arg-type]
    A = CircularDownsampling(kernel(3, 3), 2)
    for call, message in [
        (lambda: A(torch.zeros(1, 1, 5, 4)), "not a multiple"),
        (lambda: A(torch.zeros(4, 4)), "do not fit"),
        (lambda: A.adjoint(torch.zeros(1, 1)), "do not fit|does not fit"),
        (lambda: A(torch.zeros(1, 1, 2, 2)), "crop the kernel"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
