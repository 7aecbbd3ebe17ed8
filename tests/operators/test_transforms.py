"""Cosine and Hadamard transforms of every length, against SciPy; precision where it is hardest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch
from operator_suite import F64, OperatorSuite, randn
from torch import Tensor

from posteriori.operators import DCT, Hadamard, LinearOperator
from posteriori.pivot import measure, pivot


def mask(*size: int, seed: int = 0) -> Tensor:
    return (torch.rand(*size, generator=torch.Generator().manual_seed(seed)) > 0.5).float()


class TestDCTOfLinesMaskPerSample(OperatorSuite):
    shape = (7,)
    tied = True

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return DCT(torch.stack([mask(7, seed=i) for i in range(7)])[list(samples)], dims=1, scramble=2)


class TestDCTWithAnAxisOfOne(OperatorSuite):
    shape = (1, 1, 6)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return DCT(mask(1, 6, seed=1))


class TestHadamardOfVolumes(OperatorSuite):
    shape = (2, 1, 4)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Hadamard(mask(2, 1, 4, seed=5), dims=3, scramble=3)


@pytest.mark.parametrize("size", [(1,), (2,), (3,), (8,), (9,), (1000,), (5, 6), (3, 4, 5)])
def test_cosines_are_scipys(size: tuple[int, ...]) -> None:
    """Coefficients in another order or scale; odd lengths fold differently from even ones."""
    x = randn(2, *size)
    axes = tuple(range(1, 1 + len(size)))
    found = DCT(torch.ones(size), dims=len(size))(x)
    np.testing.assert_allclose(found.numpy(), scipy.fft.dctn(x.numpy(), norm="ortho", axes=axes), atol=1e-12)
    np.testing.assert_allclose(
        DCT(torch.ones(size), dims=len(size)).adjoint(x).numpy(),
        scipy.fft.idctn(x.numpy(), norm="ortho", axes=axes), atol=1e-12,
    )  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 64, 1024])
def test_hadamard_is_scipys(n: int) -> None:
    """Patterns of a single-pixel camera come from there."""
    x = randn(2, n)
    expected = x.numpy() @ scipy.linalg.hadamard(n).T / n**0.5
    np.testing.assert_allclose(Hadamard(torch.ones(n), dims=1)(x).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("transform", [DCT, Hadamard])
def test_single_precision_at_the_largest_noise(transform: type[DCT] | type[Hadamard], dims: int) -> None:
    """At sigma_t = 80 and sigma_y = 1e-3 what is not measured is 80,000 times the noise of what is: rounded in float32
    it would leak. Whitened error of the pivot at most 1e-2, against float64."""
    size = (256, 256) if dims == 2 else (4096,)
    A = transform(mask(*size), dims=dims)
    x_0 = randn(1, *size).clamp(-1, 1).float()
    sigma_t, sigma_y = 80.0, 1e-3
    y, x_t = measure(A, x_0, sigma_y, seed=0), x_0 + sigma_t * randn(1, *size, seed=1).float()
    scales = {"alpha_t": 1.0, "sigma_t": sigma_t, "sigma_y": sigma_y}
    e = pivot(x_t, y, A, **scales).double() - pivot(x_t.double(), y.double(), A, **scales)
    whitened = ((e / sigma_t).square().sum() + (A(e) / sigma_y).square().sum()) / x_0.numel()
    assert float(whitened.sqrt()) <= 1e-2


def test_long_lines_need_no_matrix() -> None:
    """A recording of a minute would ask for terabytes."""
    n = 2**20
    x = randn(1, n)
    A = DCT((torch.arange(n) % 3 == 0).float(), dims=1)
    assert float((A.gram_solve(1.0, 0.0, x) - x).abs().max()) <= 1e-10
    assert A.spectral_diagonal(lambda lam: lam, x).dtype == F64
