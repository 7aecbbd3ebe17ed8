r"""Operators known through ``A`` and ``A^T`` only: conjugate gradients for solves, Lanczos for ``f(A^T A) v``.

What is hard for them (the pivot at high noise and a precise measurement takes as many iterations as a signal has
entries, and more by rounding) dense linear algebra does where signal or measurement are small enough: there ``A`` is
taken apart, once (:mod:`posteriori.operators.decomposition`). The result preconditions the same iteration, so that the
same bound is returned.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from posteriori.operators.base import (
    LinearOperator,
    Scalar,
    SpectralFunction,
    SpectralOperator,
    full_precision,
    per_sample,
)
from posteriori.operators.decomposition import Decomposition, decompose, rows
from posteriori.operators.lanczos import Lanczos
from posteriori.solve import Preconditioner, Solution, conjugate_gradients, with_derivative

__all__ = ["Evaluation", "KrylovOperator", "Surrogate"]


@dataclass(frozen=True)
class Evaluation:
    """``f(A^T A) v`` by Lanczos.

    Attributes:
        value: shape of ``v``.
        dimension: of the Krylov space of the slowest sample; how many entries were taken apart where that was done.
        error: ``(B,)``, estimate of the error over the norm of ``value``.
        converged: ``(B,)`` booleans, whether ``error`` is within ``spectral_tolerance``.
    """

    value: Tensor
    dimension: int
    error: Tensor
    converged: Tensor


@dataclass(frozen=True)
class Surrogate:
    """``V diag(lam) V^T`` close to ``A^T A``.

    Attributes:
        basis: an operator with the basis ``V``, as its ``coefficients`` and ``signal``.
        lam: eigenvalues in it, laid out as those of ``basis``.
    """

    basis: SpectralOperator
    lam: Tensor

    @staticmethod
    def of(S: SpectralOperator, like: Tensor) -> Surrogate:
        """``S^T S`` on signals like ``like``."""
        return Surrogate(S, S.eigenvalues(like))

    def solve(self, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
        """``(a I + b V diag(lam) V^T)^-1 v``."""
        return self.basis.signal(self.basis.coefficients(v) / (a + b * self.lam), v.shape).to(v.dtype)


class KrylovOperator(LinearOperator):
    """An operator known through ``A`` and ``A^T`` only: conjugate gradients for solves, Lanczos for ``f(A^T A) v``.

    Solves run in float64 and stop on a bound on the whitened error (see :mod:`posteriori.solve`). A subclass that knows
    something close to ``A^T A`` with an exact solve returns it from :meth:`surrogate`, which saves iterations.

    Attributes:
        tolerance: whitened error at which solves stop.
        max_iterations: iterations after which a solve gives up with a warning.
        spectral_tolerance: relative error at which ``spectral`` stops.
        krylov_dimension: largest Krylov space of ``spectral``, which keeps that many signals in memory.
        surrogate_error: how far the surrogate may be from ``A^T A``, as a part of its largest eigenvalue; see
            :meth:`surrogate`.
        dense_entries: an operator is taken apart where its signals or its measurements have at most so many entries,
            channels that it treats alike counted once, and only once many iterations would be needed. The largest
            matrix has this squared: 134 MB, and from seconds to a minute of a processor. 0 never does it.
    """

    tolerance: float = 1e-3
    max_iterations: int = 2000
    spectral_tolerance: float = 1e-3
    krylov_dimension: int = 200
    surrogate_error: float = 3e-2
    dense_entries: int = 4096

    @property
    def solver(self) -> str:
        return "cg"

    @property
    def solve_dtype(self) -> torch.dtype:
        return torch.float64

    def core(self, ndim: int) -> int:
        """How many of the last dimensions of signals, in batches of ``ndim`` dimensions, ``A`` mixes: it does the same
        along those before them."""
        return ndim - 1

    def surrogate(self, like: Tensor) -> Surrogate | None:
        """Something close to ``A^T A`` on signals like ``like``, ``(B, ...)``; ``None`` without.

        Solves of ``A`` are preconditioned by ``(a + b d) I + b V diag(lam) V^T``, ``d`` being ``surrogate_error`` times
        the largest of ``lam``: what the surrogate leaves open but ``A`` measures would be inflated by the ratio of
        ``b`` to ``a`` without it.
        """
        return None

    def solve(
        self,
        a: Scalar,
        b: Scalar,
        x: Tensor | None = None,
        y: Tensor | None = None,
        *,
        unit: Scalar = 1.0,
        guess: Tensor | None = None,
    ) -> Solution:
        """:meth:`gram_solve` with the iterations spent and the bound on the whitened error of every sample."""
        if x is None and y is None:
            raise ValueError("gram_solve needs x, y or both")
        dtype = self.solve_dtype
        terms = [] if x is None else [x.to(dtype)]
        terms += [] if y is None else [self.adjoint(y.to(dtype))]
        rhs = sum(terms[1:], terms[0])
        a_, b_, u = per_sample(a, rhs), per_sample(b, rhs), per_sample(unit, rhs)
        start = None if guess is None else guess.detach().to(rhs)
        solution = self._iterate(rhs, a_, b_, u, start, self.tolerance)
        z = solution.x
        if torch.is_grad_enabled():
            # z = z + M^-1 (rhs - M z): the residual, all but 0, carries the derivative of everything
            z = with_derivative(z, rhs - a_ * z - b_ * self.gram(z), lambda g: self._solve_gradient(a_, b_, g))
        given = x if x is not None else y
        assert given is not None
        return Solution(z.to(given.dtype), solution.iterations, solution.bound, solution.converged)

    @torch.no_grad()
    def _iterate(
        self, rhs: Tensor, a: Tensor, b: Tensor, unit: Tensor, guess: Tensor | None, tolerance: float,
        quadrature: bool = True,
    ) -> Solution:  # fmt: skip
        """Conjugate gradients with this operator's preconditioner."""
        return conjugate_gradients(
            self.gram, rhs, a, b, unit=unit, guess=guess, preconditioner=self._preconditioner(a, b, rhs),
            tolerance=tolerance, max_iterations=self.max_iterations, quadrature=quadrature,
        )  # fmt: skip

    @cached_property
    def _known(self) -> dict[tuple[object, ...], Any]:
        """Sizes and decompositions by shape and device: derived from the operator alone."""
        return {}

    def _measurement(self, like: Tensor) -> tuple[int, ...]:
        """Shape of a measurement of signals like these, without the batch."""
        key = ("measurement", *like.shape[1:], like.device)
        if key not in self._known:
            x = like.new_zeros(self.samples(like.ndim) or 1, *like.shape[1:], dtype=self.solve_dtype)
            with torch.no_grad():
                self._known[key] = tuple(self.forward(x).shape[1:])
        return self._known[key]

    def _dense_size(self, like: Tensor) -> int | None:
        """Side of the matrix that takes ``A`` apart; ``None`` where it is too large."""
        core, samples = self.core(like.ndim), self.samples(like.ndim) or 1
        if not self.dense_entries:
            return None
        n = math.prod(like.shape[-core:])
        m = rows(like.shape[1:], self._measurement(like), core)
        size = n if m is None else min(m, n)
        return size if samples * size**2 <= self.dense_entries**2 else None

    def _dimension(self, like: Tensor) -> int:
        """Largest Krylov space to try before ``A`` is taken apart."""
        size = self._dense_size(like)
        return self.krylov_dimension if size is None else min(self.krylov_dimension, max(50, size // 20))

    def _decomposition(self, like: Tensor) -> Decomposition | None:
        """``None`` where ``A`` is too large, or while its parameters are being fitted: it would have to be taken apart
        anew every time."""
        if self._dense_size(like) is None:
            return None
        key = ("decomposition", *like.shape[1:], like.device)
        if key not in self._known:
            samples = self.samples(like.ndim) or 1
            with torch.inference_mode(False):  # what is kept must serve training too
                one = torch.zeros(samples, *like.shape[1:], dtype=self.solve_dtype, device=like.device)
                with torch.enable_grad():
                    if self.gram(one).requires_grad:
                        return None
                with torch.no_grad():
                    self._known[key] = decompose(
                        self.forward, self.adjoint, one.shape[1:], self._measurement(one), self.core(like.ndim),
                        samples=samples, like=one,
                    )  # fmt: skip
        return self._known[key]

    def _largest(self, like: Tensor) -> Tensor:
        """Largest eigenvalue of ``A^T A`` of every sample, a little too small, broadcastable to ``like``."""
        key = ("largest", *like.shape[1:], like.device)
        if key not in self._known:
            with torch.inference_mode(False), torch.no_grad():  # what is kept must serve training too
                probe = torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(0))
                probe = probe.to(like.device, self.solve_dtype).expand(self.samples(like.ndim) or 1, *probe.shape)
                process = Lanczos(self.gram, torch.sqrt, probe, 0.0)
                for _ in range(min(12, probe[0].numel())):
                    process.extend()
                self._known[key] = process.ritz_values()[:, -1]
        return self._known[key].reshape(-1, *[1] * (like.ndim - 1))

    def _preconditioner(self, a: Tensor, b: Tensor, like: Tensor) -> Preconditioner | None:
        """That of the surrogate; ``A`` itself taken apart for samples that are expected to need many iterations, about
        the root of the condition number, where it is small enough."""
        near, size = self._near(a, b, like), self._dense_size(like)
        if size is None:
            return near
        hard = b * self._largest(like) > a * max(200, size // 8) ** 2
        if not bool(hard.any()) or (parts := self._decomposition(like)) is None:
            return near

        def solve(v: Tensor) -> Tensor:
            exact = parts.apply(lambda lam: 1 / (a + b * lam), v)
            return exact if bool(hard.all()) else torch.where(hard, exact, v if near is None else near.solve(v))

        one = torch.ones_like(a) if near is None else near.largest
        return Preconditioner(solve, torch.where(hard, a + b * parts.largest(like), one))

    def _near(self, a: Tensor, b: Tensor, like: Tensor) -> Preconditioner | None:
        S = self.surrogate(like)
        if S is None:
            return None
        largest = S.lam.flatten(1).amax(1).reshape(-1, *[1] * (like.ndim - 1))
        raised = a + b * self.surrogate_error * largest
        return Preconditioner(lambda v: S.solve(raised, b, v), raised + b * largest)

    def _solve_gradient(self, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
        """``(a I + b A^T A)^-1 g`` to a small relative residual: a gradient has no units to be whitened in."""
        size = per_sample(g.flatten(1).norm(dim=1).clamp_min(torch.finfo(g.dtype).tiny), g)
        unit = 1 / (a * g[0].numel())
        z = size * self._iterate(g / size, a, b, unit, None, min(self.tolerance, 1e-6), quadrature=False).x
        return with_derivative(z, g - a * z - b * self.gram(z), lambda h: self._solve_gradient(a, b, h))

    @full_precision
    def gram_solve(
        self,
        a: Scalar,
        b: Scalar,
        x: Tensor | None = None,
        y: Tensor | None = None,
        *,
        unit: Scalar = 1.0,
        guess: Tensor | None = None,
    ) -> Tensor:
        solution = self.solve(a, b, x, y, unit=unit, guess=guess)
        if not bool(solution.converged.all()):
            warnings.warn(
                f"{self.describe()}: whitened error of the solve is only bounded by {float(solution.bound.max()):.1e} "
                f"after {solution.iterations} iterations (wanted {self.tolerance:.0e}): raise max_iterations or "
                "tolerance, give it a surrogate, or use an operator with an exact solve (Matrix for a small signal)",
                RuntimeWarning,
                stacklevel=3,
            )
        return solution.x

    @full_precision
    def spectral(self, f: SpectralFunction, v: Tensor) -> Tensor:
        """``f(A^T A) v`` by the Lanczos process with full reorthogonalisation (Saad 1992).

        Stops where the estimated relative error is within ``spectral_tolerance``. Where ``krylov_dimension`` comes
        first the operator is taken apart if it is small enough, and a warning given if not; smooth ``f`` need few
        dimensions. Differentiable in ``v`` and in what ``f`` holds, not in the operator's own parameters.
        """
        found = self.evaluate(f, v)
        if not bool(found.converged.all()):
            warnings.warn(
                f"{self.describe()}: f(A^T A) v has an estimated relative error of {float(found.error.max()):.1e} "
                f"after {found.dimension} Lanczos steps (wanted {self.spectral_tolerance:.0e}): raise "
                "krylov_dimension or spectral_tolerance, or use a denoiser with preconditioning='scalar'",
                RuntimeWarning,
                stacklevel=3,
            )
        return found.value

    def evaluate(self, f: SpectralFunction, v: Tensor) -> Evaluation:
        """:meth:`spectral` with the dimension spent and the estimated error of every sample."""
        rows = v.detach().to(self.solve_dtype)
        process = Lanczos(self.gram, f, rows, self.spectral_tolerance)
        error = process.run(self._dimension(v))
        late = error > self.spectral_tolerance
        parts = self._decomposition(v) if bool(late.any()) else None
        if parts is None and bool(late.any()) and process.dimension < self.krylov_dimension:
            error = process.run(self.krylov_dimension)  # parameters are being fitted
        result = process.combine(process.weights()).reshape(v.shape)
        result = (per_sample(process.norm, result) * result).to(v.dtype)
        dimension = process.dimension
        if parts is not None:
            result = torch.where(per_sample(late, v) > 0, parts.apply(f, rows).to(v.dtype), result)
            error = torch.where(late, parts.error(self.gram, rows), error)
            dimension = parts.lam.shape[1]
        value = with_derivative(result, v, lambda g: self.spectral(f, g))
        return Evaluation(value, dimension, error, error <= self.spectral_tolerance)

    @full_precision
    def spectral_diagonal(self, f: SpectralFunction, like: Tensor) -> Tensor:
        """The mean of the diagonal, by Hutchinson's estimator with a fixed probe: constant over the signal. Where the
        Lanczos process does not get there and ``A`` is taken apart, the diagonal itself.

        A probe's mean is off by ``sqrt(2 sum of squares off the diagonal) / n``, little for an image. Its single
        entries are off by a column's norm off the diagonal: 60 % where the diagonal of a motion blur itself varies by
        15 %. Sixteen probes would cost sixteen times as much and hand a network as much noise as signal.
        """
        generator = torch.Generator().manual_seed(0)
        probe = torch.randint(0, 2, like.shape[1:], generator=generator).to(like) * 2 - 1
        count = self.samples(like.ndim) or 1  # one probe serves all samples of one operator
        probe = probe.expand(count, *like.shape[1:]).to(self.solve_dtype).contiguous()
        process = Lanczos(self.gram, f, probe, self.spectral_tolerance, like.shape[0], quadrature=True)
        late = process.run(self._dimension(like)) > self.spectral_tolerance
        mean = per_sample(process.weights()[:, 0].to(like.dtype), like)
        if bool(late.any()) and (parts := self._decomposition(like)) is not None:
            return torch.where(per_sample(late, like) > 0, parts.diagonal(f, like), mean)
        return mean.expand(like.shape[0], *[1] * (like.ndim - 1))

    def pinv(self, y: Tensor) -> Tensor:
        raise ValueError(f"{self.describe()} has no exact pseudo-inverse: give a positive sigma_y instead of 0")
