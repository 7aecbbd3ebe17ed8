"""Sparse matrices from SciPy and PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from operator_suite import F64, KrylovSuite, dense, randn

from posteriori.operators import KrylovOperator, SparseMatrix


def random_sparse(m: int, n: int, seed: int = 0) -> scipy.sparse.csr_array:
    return scipy.sparse.random_array((m, n), density=0.4, format="csr", rng=np.random.default_rng(seed))


class TestSciPy(KrylovSuite):
    shape = (2, 5)

    def build(self) -> KrylovOperator:
        return SparseMatrix(random_sparse(7, 10), shape=(2, 5))


class TestTallTorch(KrylovSuite):
    shape = (6,)

    def build(self) -> KrylovOperator:
        return SparseMatrix((randn(11, 6) * (randn(11, 6, seed=1) > 0)).to_sparse_coo() / 3)


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "bsr", "lil", "dok"])
def test_every_scipy_format_is_the_same_matrix(form: str) -> None:
    """A format whose indices were misread would give another operator without a word."""
    m = random_sparse(6, 8)
    A = SparseMatrix(m.asformat(form))
    torch.testing.assert_close(dense(A, (8,), 1)[0], torch.from_numpy(m.toarray()), rtol=0, atol=0)


@pytest.mark.parametrize(
    "convert", [torch.Tensor.to_sparse_coo, torch.Tensor.to_sparse_csr, torch.Tensor.to_sparse_csc]
)
def test_every_torch_layout_is_the_same_matrix(convert: object) -> None:
    """As for SciPy's formats."""
    m = torch.from_numpy(random_sparse(6, 8).toarray())
    A = SparseMatrix(convert(m))  # type: ignore[operator]
    torch.testing.assert_close(dense(A, (8,), 1)[0], m, rtol=0, atol=0)


def test_entries_given_twice_are_added() -> None:
    """Assembled matrices (finite elements, rays) list contributions; keeping the last one would lose the rest."""
    m = scipy.sparse.coo_array(([1.0, 2.0, 4.0], ([0, 0, 1], [1, 1, 0])), shape=(2, 2))
    assert dense(SparseMatrix(m), (2,), 1)[0].tolist() == [[0, 3], [4, 0]]


def test_whole_numbers_and_empty_rows() -> None:
    """Counts are numbers too, and a row without entries is a measurement of nothing."""
    A = SparseMatrix(scipy.sparse.csr_array(np.array([[0, 0, 0], [1, 0, 2]])))
    assert A(torch.tensor([[1.0, 2.0, 3.0]], dtype=F64)).tolist() == [[0, 7]]


def test_dense_solves_the_same_system() -> None:
    """The exact operator that is offered instead must be the same one."""
    A = SparseMatrix(random_sparse(7, 10), shape=(2, 5))
    A.tolerance = 1e-11
    x, y = randn(3, 2, 5), randn(3, 7, seed=2)
    torch.testing.assert_close(A.dense().gram_solve(0.3, 1.2, x, y), A.gram_solve(0.3, 1.2, x, y), rtol=0, atol=1e-7)


def test_bad_matrices_are_refused() -> None:
    """Each would fail later, or give another operator than was meant."""
    m = random_sparse(4, 6)
    with pytest.raises(ValueError, match="use Matrix"):
        SparseMatrix(torch.ones(2, 2))
    with pytest.raises(ValueError, match="use Matrix"):
        SparseMatrix(m.toarray())
    with pytest.raises(ValueError, match="real and finite"):
        SparseMatrix(m * 1j)
    with pytest.raises(ValueError, match="real and finite"):
        SparseMatrix(m * np.inf)
    with pytest.raises(ValueError, match="does not take signals"):
        SparseMatrix(m, shape=(2, 4))
    with pytest.raises(ValueError, match="takes batches"):
        SparseMatrix(m)(torch.ones(2, 5, dtype=F64))
    with pytest.raises(ValueError, match="two-dimensional"):
        SparseMatrix(torch.ones(2, 2, 2).to_sparse_coo())
