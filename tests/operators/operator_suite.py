"""The suite that every operator inherits: each promise of the protocol against a dense float64 matrix.

The matrix is built column by column from ``forward``; everything else (adjoint, solves, square roots, pseudo-inverse)
is then dense linear algebra that shares no code with the operator. A subclass gives ``shape`` and ``make``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from posteriori.operators import KrylovOperator, LinearOperator, per_sample

F64 = torch.float64


def randn(*size: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense(A: LinearOperator, shape: Sequence[int], batch: int) -> Tensor:
    """The matrix of every sample, ``(batch, m, n)``, column by column from ``forward``."""
    columns = []
    for j in range(math.prod(shape)):
        e = torch.zeros(batch, math.prod(shape), dtype=F64)
        e[:, j] = 1
        columns.append(A(e.reshape(batch, *shape)).flatten(1))
    return torch.stack(columns, 2)


def dense_function(matrix: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """``f(M^T M)`` of every sample by a dense eigendecomposition; ``f`` sees the eigenvalues, ``(batch, n)``."""
    lam, v = torch.linalg.eigh(matrix.mT @ matrix)
    return (v * f(lam.clamp_min(0)).unsqueeze(1)) @ v.mT


def apply(matrix: Tensor, v: Tensor) -> Tensor:
    return (matrix @ v.flatten(1).unsqueeze(2)).squeeze(2)


def public_state(A: LinearOperator) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in vars(A).items() if not k.startswith("_")}


def per_sample_scalars(batch: int) -> tuple[Tensor, Tensor]:
    """A different ``a`` and ``b`` for every sample, both spread over two orders of magnitude."""
    steps = torch.arange(batch, dtype=F64) / batch
    return 0.05 * 100**steps, 3.0 * 0.01**steps


def _shaped(a: Tensor, lam: Tensor) -> Tensor:
    """``a``, one per sample, against eigenvalues that may be shared by all samples."""
    return per_sample(a, lam.new_empty(a.shape[0], *lam.shape[1:]))


class OperatorSuite(ABC):
    """Inherited by one test class per operator."""

    shape: ClassVar[tuple[int, ...]]
    #: How close to the dense answer, relative to its largest entry. Float64 rounding for exact solves.
    tolerance: ClassVar[float] = 1e-9
    #: Whether every sample has parameters of its own.
    tied: ClassVar[bool] = False

    @abstractmethod
    def make(self, samples: Sequence[int]) -> LinearOperator:
        """The operator for these samples; those without parameters per sample ignore which."""

    def operator(self, batch: int) -> LinearOperator:
        return self.make(range(batch))

    def x(self, batch: int, seed: int = 1) -> Tensor:
        return randn(batch, *self.shape, seed=seed)

    def y(self, A: LinearOperator, batch: int, seed: int = 2) -> Tensor:
        return randn(*A(self.x(batch)).shape, seed=seed)

    def close(self, actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
        scale = float(expected.abs().max().clamp_min(1e-12))
        error = float((actual.flatten() - expected.flatten()).abs().max()) / scale
        assert error <= (tolerance or self.tolerance), f"relative error {error:.1e}"

    @property
    def batches(self) -> list[int]:
        """1, several, and as many as a signal is wide: a scalar per sample may then broadcast along the width."""
        return [1, 3, self.shape[-1]]

    # -- the map and its transpose ------------------------------------------------------------------------------------

    def test_adjoint_is_the_transpose(self) -> None:
        """Every gradient, solve and baseline would pull residuals back the wrong way."""
        for batch in self.batches:
            A = self.operator(batch)
            y = self.y(A, batch)
            back = A.adjoint(y)
            assert back.shape == (batch, *self.shape)
            self.close(back, apply(dense(A, self.shape, batch).mT, y))

    def test_gram_is_the_transpose_after_the_map(self) -> None:
        """The smooth estimate and every Krylov space would be those of another operator."""
        for batch in self.batches:
            A = self.operator(batch)
            matrix, v = dense(A, self.shape, batch), self.x(batch)
            gram = A.gram(v)
            assert gram.shape == v.shape
            self.close(gram, apply(matrix.mT @ matrix, v))

    def test_linear(self) -> None:
        """An offset, a clamp or a rounding in forward: the theory is for linear measurements."""
        A = self.operator(3)
        x, z = self.x(3), self.x(3, seed=5)
        self.close(A(2.5 * x - 0.5 * z), 2.5 * A(x) - 0.5 * A(z))

    def test_shapes_either_way(self) -> None:
        """Samplers size the signal from the measurement alone; a product would take parameters of another batch."""
        A = self.operator(3)
        y = A(self.x(3))
        assert A.signal_shape(y.shape[1:]) == self.shape
        assert A.measurement_ndim(1 + len(self.shape)) == y.ndim

    # -- solves -------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("scalars", ["numbers", "per-sample"])
    @pytest.mark.parametrize("terms", ["x", "y", "x and y"])
    def test_gram_solve(self, terms: str, scalars: str) -> None:
        """A wrong pivot: the one solve all methods are made of, for every way to call it."""
        for batch in self.batches:
            A = self.operator(batch)
            a, b = (0.3, 1.7) if scalars == "numbers" else per_sample_scalars(batch)
            x = self.x(batch) if "x" in terms else None
            y = self.y(A, batch) if "y" in terms else None
            matrix = dense(A, self.shape, batch)
            rhs = torch.zeros(batch, math.prod(self.shape), dtype=F64)
            rhs = rhs if x is None else rhs + x.flatten(1)
            rhs = rhs if y is None else rhs + apply(matrix.mT, y)
            a_, b_ = (torch.as_tensor(v, dtype=F64).reshape(-1, 1, 1) for v in (a, b))
            system = a_ * torch.eye(rhs.shape[1], dtype=F64) + b_ * matrix.mT @ matrix
            solved = A.gram_solve(a, b, x, y)
            assert solved.shape == (batch, *self.shape)
            self.close(solved, torch.linalg.solve(system, rhs.unsqueeze(2)))

    def test_gram_solve_needs_a_term(self) -> None:
        """With neither term there is no batch to answer for."""
        with pytest.raises(ValueError, match="needs x, y or both"):
            self.operator(2).gram_solve(1.0, 1.0)

    def test_scalars_of_another_batch_are_refused(self) -> None:
        """Values for a wrong number of samples would broadcast along the image instead."""
        A = self.operator(3)
        wrong = torch.ones(self.shape[-1] + 4, dtype=F64)
        with pytest.raises(ValueError, match="does not fit a batch of 3"):
            A.gram_solve(wrong, 1.0, self.x(3))
        with pytest.raises(ValueError, match="does not fit a batch of 3"):
            A.gram_solve(1.0, wrong, self.x(3))

    # -- functions of A^T A -------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("name", ["root", "rational", "per-sample"])
    def test_spectral(self, name: str) -> None:
        """Square roots of covariances and the preconditioning would be those of another operator."""
        for batch in self.batches:
            A = self.operator(batch)
            a, _ = per_sample_scalars(batch)
            functions: dict[str, Callable[[Tensor], Tensor]] = {
                "root": lambda lam: torch.rsqrt(lam + 0.3),
                "rational": lambda lam: lam / (lam + 0.7),
                "per-sample": lambda lam, a=a: (_shaped(a, lam) + lam).sqrt(),
            }
            f = functions[name]
            v = self.x(batch, seed=3)
            expected = apply(dense_function(dense(A, self.shape, batch), f), v)
            self.close(A.spectral(f, v), expected)

    def test_spectral_diagonal(self) -> None:
        """The uncertainty channel of the network would not be the pixel variance."""
        for batch in self.batches:
            A = self.operator(batch)
            x = self.x(batch)
            a, _ = per_sample_scalars(batch)

            def f(lam: Tensor, a: Tensor = a) -> Tensor:
                return 1 / (_shaped(a, lam) + lam)

            expected = dense_function(dense(A, self.shape, batch), f).diagonal(dim1=1, dim2=2)
            diagonal = A.spectral_diagonal(f, x)
            assert torch.broadcast_shapes(diagonal.shape, x.shape) == x.shape
            self.close(diagonal.expand(x.shape), expected)

    # -- the limit of no noise ----------------------------------------------------------------------------------------

    def test_pinv(self) -> None:
        """Noiseless measurements would be fitted wrongly, or an unstable inverse given without a word."""
        for batch in self.batches:
            A = self.operator(batch)
            matrix = dense(A, self.shape, batch).numpy()
            y = self.y(A, batch)
            s = np.linalg.svd(matrix, compute_uv=False)
            kept = np.where(s > 1e-5 * s.max(1, keepdims=True), s, np.inf)
            condition = float((s.max(1) / kept.min(1)).max())
            if condition > 1e4:
                with pytest.raises(ValueError, match="no stable pseudo-inverse"):
                    A.pinv(y)
            else:
                inverse = torch.from_numpy(np.linalg.pinv(matrix, rcond=1e-5))
                self.close(A.pinv(y), apply(inverse, y), self.tolerance * max(condition, 1.0))

    def test_null_projection(self) -> None:
        """What the measurement leaves open would be filled from the wrong directions."""
        batch = 3
        A = self.operator(batch)
        matrix = dense(A, self.shape, batch).numpy()
        v = self.x(batch, seed=4)
        hidden = A.null_projection(v)
        s = np.linalg.svd(matrix, compute_uv=False)
        largest = s.max(1, keepdims=True)
        if ((s > 1e-7 * largest) & (s < 1e-4 * largest)).any():
            # Where the numerical rank is a matter of taste (pinv refuses): at least nothing that A sees is left.
            assert float(A(hidden).abs().max()) <= 1e-4 * float(largest.max() * v.flatten(1).norm(dim=1).max())
        else:
            seen = torch.from_numpy(np.linalg.pinv(matrix, rcond=1e-5) @ matrix)
            self.close(hidden.flatten(1) + apply(seen, v), v)

    # -- batches, precision, gradients --------------------------------------------------------------------------------

    def every_call(self, A: LinearOperator, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        def root(lam: Tensor) -> Tensor:
            return (_shaped(a, lam) + lam).sqrt()

        return {
            "forward": A(x),
            "adjoint": A.adjoint(y),
            "gram_solve": A.gram_solve(a, b, x, y),
            "spectral": A.spectral(root, x),
            "spectral_diagonal": A.spectral_diagonal(root, x).expand(x.shape),
        }

    def test_batch_equals_loop(self) -> None:
        """A restored photo would depend on which other photos were restored with it."""
        batch = 3
        A = self.operator(batch)
        x, y = self.x(batch), self.y(A, batch)
        a, b = per_sample_scalars(batch)
        together = self.every_call(A, x, y, a, b)
        for i in range(batch):
            s = slice(i, i + 1)
            alone = self.every_call(self.make([i]), x[s], y[s], a[s], b[s])
            for name, value in alone.items():
                self.close(together[name][s], value)

    def test_other_batches_are_refused_or_fit(self) -> None:
        """Parameters of 3 samples must not be broadcast over a batch of 2."""
        A = self.operator(3)
        if self.tied:
            assert A.samples(1 + len(self.shape)) == 3
            with pytest.raises(ValueError, match=r"fit|samples"):
                A(self.x(2))
            with pytest.raises(ValueError, match=r"fit|samples"):
                A.gram_solve(1.0, 1.0, self.x(2))
        else:
            assert A.samples(1 + len(self.shape)) is None
            assert A(self.x(2)).shape[0] == 2

    def test_precision_follows_the_signal(self) -> None:
        """Float64 studies would be done in float32, or float32 images come back twice as large."""
        batch = 3
        A = self.operator(batch)
        x, y = self.x(batch), self.y(A, batch)
        a, b = per_sample_scalars(batch)
        double = self.every_call(A, x, y, a, b)
        single = self.every_call(A, x.float(), y.float(), a, b)
        for name, value in double.items():
            assert value.dtype == F64, name
            assert single[name].dtype == torch.float32, name
            self.close(single[name].double(), value, 2e-4)

    def test_autocast_changes_nothing(self) -> None:
        """In half precision the measurement drowns in rounding, whatever the network runs in."""
        batch = 3
        A = self.operator(batch)
        x, y = self.x(batch).float(), self.y(A, batch).float()
        a, b = per_sample_scalars(batch)
        plain = self.every_call(A, x, y, a, b)
        with torch.autocast("cpu", torch.bfloat16):
            cast = self.every_call(A, x, y, a, b)
        for name, value in plain.items():
            assert torch.equal(value, cast[name]), name

    def test_gradients_of_solves(self) -> None:
        """Methods that differentiate through a solve would descend along something else (finite differences,
        float64)."""
        A = self.operator(2)
        x, y = self.x(2).requires_grad_(), self.y(A, 2).requires_grad_()
        a, b = (v.requires_grad_() for v in per_sample_scalars(2))
        torch.autograd.gradcheck(lambda x, y: A.gram_solve(0.6, 1.1, x, y), (x, y), fast_mode=True)
        torch.autograd.gradcheck(lambda a, b: A.gram_solve(a, b, x, y), (a, b))
        torch.autograd.gradcheck(lambda v: A.spectral(lambda lam: torch.rsqrt(lam + 0.4), v), (x,), fast_mode=True)
        torch.autograd.gradcheck(lambda x: A.adjoint(A(x)), (x,), fast_mode=True)

    def test_calls_change_nothing(self) -> None:
        """An operator that remembers its last call gives answers that depend on the order of calls."""
        batch = 3
        A = self.operator(batch)
        before = public_state(A)
        x, y = self.x(batch), self.y(A, batch)
        x_kept, y_kept = x.clone(), y.clone()
        a, b = per_sample_scalars(batch)
        first = self.every_call(A, x, y, a, b)
        self.every_call(A, x.float(), y.float(), b, a)
        second = self.every_call(A, x, y, a, b)
        for name, value in first.items():
            assert torch.equal(value, second[name]), name
        assert torch.equal(x, x_kept)
        assert torch.equal(y, y_kept)
        after = public_state(A)
        assert before.keys() == after.keys()
        for key, value in before.items():
            same = torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key]
            assert same, key

    def test_inference_mode_leaves_no_trace(self) -> None:
        """Tensors kept from a call under inference_mode would break training with the same operator."""
        A = self.operator(2)
        with torch.inference_mode():
            y = self.y(A, 2)
            self.every_call(A, self.x(2), y, *per_sample_scalars(2))
        x = self.x(2).requires_grad_()
        (A.gram_solve(0.5, 1.0, x, y.clone()).sum() + A(x).sum()).backward()
        assert bool(torch.isfinite(x.grad).all())


class KrylovSuite(OperatorSuite):
    """Operators solved iteratively: their answers are as good as the tolerance that is asked for."""

    tolerance = 1e-7

    @abstractmethod
    def build(self) -> KrylovOperator:
        """The operator at its default tolerance."""

    def make(self, samples: Sequence[int]) -> KrylovOperator:
        A = self.build()
        A.tolerance = A.spectral_tolerance = 1e-11
        return A

    def test_error_is_within_its_bound(self) -> None:
        """A solve would claim an accuracy that it does not have: the true whitened error at the default tolerance, over
        all noise levels; where ``A^T A`` weighs up to 1e5 times the rest it must be reached too."""
        A, batch = self.build(), 3
        matrix = dense(A, self.shape, batch)
        x, y = self.x(batch), self.y(A, batch)
        n = x[0].numel()
        for sigma_t, sigma_y in [(t, y) for t in (0.002, 0.1, 1.0, 10.0, 80.0) for y in (1e-3, 1e-2, 0.05, 0.5)]:
            a, b, unit = sigma_y**2, sigma_t**2, sigma_t**2 * sigma_y**2
            solution = A.solve(a, b, a * x, b * y, unit=unit)
            system = a * torch.eye(n, dtype=F64) + b * matrix.mT @ matrix
            truth = torch.linalg.solve(
                system, a * x.flatten(1).unsqueeze(2) + b * matrix.mT @ y.flatten(1).unsqueeze(2)
            )
            e = solution.x.flatten(1).unsqueeze(2) - truth
            whitened = ((e.mT @ system @ e).flatten() / unit / n).sqrt()
            assert bool((whitened <= solution.bound * (1 + 1e-2) + 1e-12).all()), (sigma_t, sigma_y)
            assert bool((solution.converged == (solution.bound <= 2 * A.tolerance)).all())
            assert bool(solution.converged.all()) or b > 1e5 * a

    def test_guess_changes_the_cost_alone(self) -> None:
        """A warm start would change the samples, or cost what a cold one does."""
        A, batch = self.build(), 3
        x, y = self.x(batch), self.y(A, batch)
        cold = A.solve(0.01, 4.0, x, y, unit=0.04)
        near = cold.x + 1e-4 * self.x(batch, seed=7)
        warm = A.solve(0.01, 4.0, x, y, unit=0.04, guess=near)
        assert bool(cold.converged.all())
        assert bool(warm.converged.all())
        assert warm.iterations <= cold.iterations + 1  # as many as A has eigenvalues, if these are few
        right = self.operator(batch).gram_solve(0.01, 4.0, x, y, unit=0.04)
        assert A.solve(0.01, 4.0, x, y, unit=0.04, guess=right).iterations == 0
        e = warm.x - cold.x
        whitened = (0.25 * e.square().flatten(1).sum(1) + 100 * A(e).square().flatten(1).sum(1)) / x[0].numel()
        assert bool((whitened.sqrt() <= warm.bound + cold.bound).all())

    def test_every_sample_stops_for_itself(self) -> None:
        """An easy sample beside a hard one would get another answer than alone."""
        A, batch = self.build(), 3
        x, y = self.x(batch), self.y(A, batch)
        a, b = per_sample_scalars(batch)
        a = a * torch.tensor([1e-4, 1.0, 1e2], dtype=F64)
        x, y = per_sample(a, x) * x, per_sample(b, y) * y
        together = A.solve(a, b, x, y, unit=a * b)
        v = together.x
        evaluated = A.evaluate(lambda lam: torch.rsqrt(_shaped(a, lam) + lam), v)
        spent = []
        if self.tied:
            return
        for i in range(batch):
            s = slice(i, i + 1)
            alone = A.solve(a[s], b[s], x[s], y[s], unit=a[s] * b[s])
            spent.append(alone.iterations)
            self.close(together.x[s], alone.x, 1e-6)
            single = A.evaluate(lambda lam, s=s: torch.rsqrt(_shaped(a[s], lam) + lam), v[s])
            self.close(evaluated.value[s], single.value, 1e-6)
        assert abs(together.iterations - max(spent)) <= 1 + max(spent) // 20  # up to rounding

    def test_spectral_knows_its_error(self) -> None:
        """``f(A^T A) v`` would claim an accuracy that it does not have, by more than a factor of 4, or none at all."""
        A, batch = self.build(), 3
        v = self.x(batch, seed=3)
        matrix = dense(A, self.shape, batch)
        for width in (1.0, 1e-2, 1e-4):
            found = A.evaluate(lambda lam, w=width: torch.rsqrt(lam + w), v)
            exact = apply(dense_function(matrix, lambda lam, w=width: torch.rsqrt(lam + w)), v)
            error = (found.value.flatten(1) - exact).norm(dim=1) / exact.norm(dim=1)
            assert bool((error <= 4 * found.error + 1e-8).all())
            assert bool(found.converged.all())
            assert found.dimension <= v[0].numel()

    def test_spectral_diagonal(self) -> None:
        """The mean of the diagonal is estimated by one random probe: within 4 of Hutchinson's standard deviations,
        ``sqrt(2 sum of squares off the diagonal) / n``."""
        batch = 2
        A = self.operator(batch)
        x = self.x(batch)
        matrix = dense_function(dense(A, self.shape, batch), lambda lam: 1 / (0.5 + lam))
        n = matrix.shape[1]
        off = matrix - torch.diag_embed(matrix.diagonal(dim1=1, dim2=2))
        deviation = (2 * off.square().sum((1, 2))).sqrt() / n
        diagonal = A.spectral_diagonal(lambda lam: 1 / (0.5 + lam), x)
        assert diagonal.shape == (batch, *[1] * len(self.shape))
        error = (diagonal.flatten() - matrix.diagonal(dim1=1, dim2=2).mean(1)).abs()
        assert bool((error <= 4 * deviation + 1e-9).all())

    def test_pinv(self) -> None:
        """Conjugate gradients cannot tell a small singular value from none: sigma_y = 0 must be refused."""
        A = self.operator(2)
        with pytest.raises(ValueError, match="pseudo-inverse"):
            A.pinv(self.y(A, 2))

    def test_null_projection(self) -> None:
        """Part of sigma_y = 0, which these operators refuse (see test_pinv)."""
        assert not self.operator(2).exact

    def test_gradients_where_the_iteration_stops_at_once(self) -> None:
        """A signal of 0, or one that is an eigenvector, ends the iteration before its derivative has converged: the
        gradient was 0, or NaN. All samples have the same linear map, so all have the same gradient."""
        A = self.operator(3)
        matrix = dense(A, self.shape, 1)
        n = matrix.shape[2]
        v = self.x(3)
        v[0] = 0
        v[1] = torch.linalg.eigh(matrix[0].T @ matrix[0])[1][:, -1].reshape(self.shape)
        v.requires_grad_()
        solve = torch.linalg.inv(0.2 * torch.eye(n, dtype=F64) + 1.3 * matrix.mT @ matrix)
        for value, expected in [
            (A.gram_solve(0.2, 1.3, v), solve),
            (A.spectral(lambda lam: (lam + 0.1).sqrt(), v), dense_function(matrix, lambda lam: (lam + 0.1).sqrt())),
        ]:
            (gradient,) = torch.autograd.grad(value.sum(), v)
            self.close(gradient, expected.sum(1).expand(3, n), 1e-5)
