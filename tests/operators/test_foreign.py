"""Operators of other libraries keep every promise of ours; expected values come from those libraries themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from operator_suite import F64, KrylovSuite, OperatorSuite, dense, randn
from scipy import sparse
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from scipy.sparse.linalg import aslinearoperator

from posteriori.adapters import from_pylops, from_scipy, to_pylops, to_scipy
from posteriori.adapters.arrays import DENSE
from posteriori.operators import Callable, GaussianBlur, Inpainting, KrylovOperator, LinearOperator, Matrix

MATRIX = randn(9, 12, seed=8).numpy()


class TestScipyOperator(KrylovSuite):
    shape = (3, 4)

    def build(self) -> KrylovOperator:
        A = from_scipy(aslinearoperator(MATRIX), self.shape)
        assert isinstance(A, KrylovOperator)
        return A

    def test_it_is_the_matrix(self) -> None:
        """Rows and columns of the batch mixed up."""
        self.close(dense(self.build(), self.shape, 2)[1], torch.from_numpy(MATRIX))


class TestComplexScipyOperator(KrylovSuite):
    """Real signals, complex measurements: real and imaginary part are two measurements."""

    shape = (6,)

    def build(self) -> KrylovOperator:
        def forward(x: np.ndarray) -> np.ndarray:
            return np.fft.fft(x, axis=0)

        def adjoint(y: np.ndarray) -> np.ndarray:
            return 6 * np.fft.ifft(y, axis=0)

        transform = ScipyOperator((6, 6), dtype=np.complex128, matvec=forward, rmatvec=adjoint)
        A = from_scipy(transform)
        assert isinstance(A, KrylovOperator)
        return A

    def test_it_is_the_transform(self) -> None:
        """Imaginary parts dropped, or in another place."""
        x = self.x(2)
        torch.testing.assert_close(torch.view_as_complex(self.build()(x)), torch.fft.fft(x))


class TestSparseMatrix(OperatorSuite):
    """Small matrices are solved exactly."""

    shape = (12,)

    def make(self, samples: object) -> LinearOperator:
        return from_scipy(sparse.csr_array(MATRIX * (np.abs(MATRIX) > 0.5)))


class TestPylops(KrylovSuite):
    shape = (5, 4)

    def build(self) -> KrylovOperator:
        pylops = pytest.importorskip("pylops")
        A = from_pylops(pylops.FirstDerivative((5, 4), axis=0, kind="forward"))
        assert isinstance(A, KrylovOperator)
        return A

    def test_it_is_the_difference(self) -> None:
        """The dimensions of the model swapped."""
        x = self.x(2)
        torch.testing.assert_close(self.build()(x)[:, :-1], x.diff(dim=1))


def test_large_sparse_matrices_are_not_made_dense() -> None:
    """A sparse matrix of a photo's size would fill the memory."""
    A = from_scipy(sparse.eye_array(DENSE + 1, format="csr") * 3.0)
    assert isinstance(A, Callable)
    x = randn(2, DENSE + 1)
    torch.testing.assert_close(A.gram_solve(1.0, 1.0, x), x / 10)


def test_shapes_that_do_not_fit_are_refused() -> None:
    """Another number of entries would be reshaped into nonsense, or fail deep inside scipy."""
    for op in (MATRIX, aslinearoperator(MATRIX)):
        with pytest.raises(ValueError, match="12 columns"):
            from_scipy(op, (3, 5))
    with pytest.raises(ValueError, match="acts on signals of shape"):
        from_scipy(aslinearoperator(MATRIX))(randn(2, 11))


@pytest.mark.parametrize("A", [GaussianBlur(1.0), Inpainting((torch.arange(30) % 3 > 0).reshape(5, 6))], ids=repr)
def test_ours_in_scipy(A: LinearOperator) -> None:
    """scipy's solvers would be given another matrix, or its transpose (float64, 1e-12; lsqr's own answer 1e-6)."""
    from scipy.sparse.linalg import lsqr

    shape = (2, 5, 6)
    op = to_scipy(A, shape)
    matrix = dense(A, shape, 1)[0].numpy()
    np.testing.assert_allclose(op @ np.eye(60), matrix, atol=1e-12)
    np.testing.assert_allclose(op.rmatmat(np.eye(op.shape[0])), matrix.T, atol=1e-12)
    y = randn(op.shape[0]).numpy()
    np.testing.assert_allclose(op.rmatvec(y), matrix.T @ y, atol=1e-12)
    ours = A.gram_solve(0.25, 1.0, y=torch.from_numpy(y).reshape(1, *shape)).flatten().numpy()
    np.testing.assert_allclose(lsqr(op, y, damp=0.5, atol=1e-12, btol=1e-12)[0], ours, atol=1e-6)


def test_ours_in_pylops_and_back() -> None:
    """dims and dimsd that pylops would reshape by, and a round trip that must change nothing (1e-12)."""
    pylops = pytest.importorskip("pylops")
    from pylops.utils import dottest

    A = Matrix(randn(7, 12), (3, 4))
    op = to_pylops(A, (3, 4))
    assert (op.dims, op.dimsd) == ((3, 4), (7,))
    assert dottest(op, 7, 12)
    x = randn(3, 3, 4)
    torch.testing.assert_close(from_pylops(op)(x), A(x))
    assert isinstance(op, pylops.LinearOperator)


def test_parameters_per_sample_are_no_matrix() -> None:
    """Every signal would get the first sample's mask."""
    with pytest.raises(ValueError, match="parameters for every sample"):
        to_scipy(Inpainting(torch.ones(3, 1, 4, 4)), (1, 4, 4))


def test_gradients_of_any_order_pass_through_numpy() -> None:
    """Methods that differentiate through the operator would stop with an error, or go wrong (finite differences)."""
    A = from_scipy(aslinearoperator(MATRIX))
    x = randn(2, 12).requires_grad_()
    torch.autograd.gradcheck(A, (x,))
    torch.autograd.gradgradcheck(lambda x: A(x).square(), (x,))
    assert A(x.float()).dtype == torch.float32
    assert A(x).dtype == F64
