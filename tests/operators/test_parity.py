"""Separable operators by even and odd halves: the suite of all operators, on axes short enough for dense oracles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from operator_suite import F64, OperatorSuite, randn

from posteriori.operators import Blur, Downsampling, GaussianBlur, LinearOperator, Separable, kronecker
from posteriori.operators.kronecker import ConvolutionAxis
from posteriori.operators.parity import Dense, Halves, blocks_of, fold, normalised, unfold


@pytest.fixture(autouse=True)
def _no_axis_is_short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kronecker, "SHORT_AXIS", 1)
    kronecker._shared_parts.cache_clear()
    yield
    kronecker._shared_parts.cache_clear()


class _Halved(OperatorSuite):
    def test_is_halved(self) -> None:
        """The suite would pass on dense factors, and say nothing of halves."""
        A, x = self.operator(2), self.x(2)
        assert isinstance(A, Separable)
        assert all(isinstance(p.v, Halves) for p in A._parts(x.shape, x))


class TestHalvedReflect(_Halved):
    shape = (2, 6, 7)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return GaussianBlur(0.7)


class TestHalvedZero(_Halved):
    shape = (2, 5, 8)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return GaussianBlur(0.7, boundary="zero")


class TestHalvedWidthPerSample(_Halved):
    shape = (1, 5, 6)
    tied = True

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return GaussianBlur([0.4 + 0.15 * i for i in samples])


class TestHalvedSignals(_Halved):
    shape = (9,)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return GaussianBlur(0.6, dims=1)


class TestHalvedVolume(_Halved):
    shape = (1, 4, 3, 5)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return GaussianBlur(0.6, dims=3)


class TestHalvedValid(_Halved):
    shape = (2, 7, 8)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return GaussianBlur(0.7, 3, "valid")


class TestHalvedBicubic(_Halved):
    shape = (2, 6, 9)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Downsampling(3, "bicubic")


@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("dim", [-1, -2])
def test_folding_is_orthonormal(n: int, dim: int) -> None:
    """Another length would make coefficients of other variance, and eigenvalues of another operator."""
    x = randn(2, n, n, seed=n)
    even, odd = (normalised(part, dim, n // 2) for part in fold(x, dim))
    torch.testing.assert_close(even.square().sum() + odd.square().sum(), x.square().sum())
    torch.testing.assert_close(unfold(normalised(even, dim, n // 2), normalised(odd, dim, n // 2), dim), x)
    torch.testing.assert_close(fold(x + x.flip(dim), dim)[1], torch.zeros_like(odd))


def test_what_treats_its_ends_differently_stays_whole() -> None:
    """Half of the answer would be missing."""
    assert blocks_of(ConvolutionAxis((0.2, 0.5, 0.3)).matrix(8)) is None
    A = Blur(torch.outer(torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.25, 0.5, 0.25])).double())
    x = randn(1, 1, 6, 7)
    assert isinstance(A, Separable)
    first, second = A._parts(x.shape, x)
    assert isinstance(first.v, Dense)
    assert isinstance(second.v, Halves)
    torch.testing.assert_close(A.gram_solve(0.3, 1.0, x=0.3 * x + A.adjoint(A(x))), x, rtol=1e-9, atol=1e-9)


def test_eigenvalues_are_those_of_the_matrix() -> None:
    """Even and odd singular values in the wrong order, or beside the wrong vectors."""
    matrix = ConvolutionAxis((0.1, 0.2, 0.4, 0.2, 0.1)).matrix(9)
    parts = GaussianBlur(1.0)._parts((1, 9, 9), randn(1, 9, 9))
    assert parts[0].s.dtype == F64
    blocks = blocks_of(matrix)
    assert blocks is not None
    found = torch.cat([torch.linalg.svdvals(b) for b in blocks]).sort(descending=True).values
    torch.testing.assert_close(found, torch.linalg.svdvals(matrix))
