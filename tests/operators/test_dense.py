"""Matrices of every form, and operators given as functions."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from operator_suite import KrylovSuite, OperatorSuite, randn

from posteriori.operators import Callable, KrylovOperator, LinearOperator, Matrix


class TestWide(OperatorSuite):
    shape = (7,)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Matrix(randn(4, 7))


class TestTall(OperatorSuite):
    shape = (5,)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Matrix(randn(9, 5))


class TestSquare(OperatorSuite):
    shape = (6,)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Matrix(randn(6, 6))


class TestRankDeficient(OperatorSuite):
    shape = (6,)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Matrix(randn(5, 2) @ randn(2, 6, seed=1))


class TestImageShaped(OperatorSuite):
    shape = (2, 3, 4)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Matrix(randn(10, 24), shape=(2, 3, 4))


class TestSmallUnits(OperatorSuite):
    """Measurements in units a million times larger: what the matrix sees does not change."""

    shape = (5,)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Matrix(1e-6 * randn(3, 5))


class TestSingle(OperatorSuite):
    """One number measured of one entry."""

    shape = (1,)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Matrix(torch.tensor([[2.0]]))


MATRIX = randn(6, 8, seed=3) / 3


class TestCallableWithAdjoint(KrylovSuite):
    shape = (8,)

    def build(self) -> KrylovOperator:
        return Callable(lambda x: x @ MATRIX.to(x).T, lambda y: y @ MATRIX.to(y), shape=(8,))


class TestCallableWithoutAdjoint(KrylovSuite):
    shape = (2, 2, 3)

    def build(self) -> KrylovOperator:
        # running sums of a picture: not symmetric, not separable into known structures
        return Callable(lambda x: x.flatten(1).cumsum(1)[:, ::2] / 4, shape=(2, 2, 3))


class TestCallableThatSeesLittle(KrylovSuite):
    """Repeated eigenvalues and a null space: the Krylov space is exhausted after two steps."""

    shape = (2, 4)

    def build(self) -> KrylovOperator:
        return Callable(lambda x: x[..., :2], lambda y: torch.nn.functional.pad(y, (0, 2)), shape=(2, 4))


def test_bad_matrices_are_refused() -> None:
    """Each would fail deep inside an SVD."""
    for bad in (torch.ones(3), torch.full((2, 2), float("inf")), torch.ones(2, 2, 2)):
        with pytest.raises(ValueError, match="finite \\(m, n\\) matrix"):
            Matrix(bad)
    with pytest.raises(ValueError, match="does not act on signals"):
        Matrix(torch.ones(2, 5), shape=(2, 3))
    with pytest.raises(ValueError, match="positive sizes"):
        Callable(lambda x: x, shape=())


def test_single_precision_solves_of_nothing() -> None:
    """A zero signal is 0 by any function of A, not NaN (in float32, 1e-300 is 0)."""
    A = Callable(lambda x: 2 * x, shape=(3,), dtype=torch.float32)
    zero = torch.zeros(2, 3)
    assert A.spectral(lambda lam: lam.sqrt(), zero).tolist() == zero.tolist()
    assert A.gram_solve(1.0, 1.0, zero).tolist() == zero.tolist()


def test_spectral_is_homogeneous() -> None:
    """The size of a signal must not decide when the Lanczos process stops."""
    A = Callable(lambda x: x @ MATRIX.to(x).T, shape=(8,))
    v = randn(2, 8)

    def f(lam: torch.Tensor) -> torch.Tensor:
        return torch.rsqrt(lam + 1e-3)

    for factor in (1e-12, 1e12):
        torch.testing.assert_close(A.spectral(f, factor * v) / factor, A.spectral(f, v), rtol=1e-9, atol=1e-9)


def test_batch_of_matrices_in_lower_precision() -> None:
    """Null space content at sigma_t = 80 must not leak into the measured directions in float32: 1e-6 of its size."""
    matrix = randn(20, 64)
    A = Matrix(matrix)
    v = torch.linalg.svd(matrix)[2]
    hidden = (80 * randn(3, 44) @ v[20:]).float()
    a, b = 1e-6, 6400.0
    leaked = A.gram_solve(a, b, a * hidden).double() @ v[:20].T
    assert float(leaked.abs().max()) < 80 * 1e-6
