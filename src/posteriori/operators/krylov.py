r"""Operators known through ``A`` and ``A^T`` only: conjugate gradients for solves, Lanczos for ``f(A^T A) v``.

Lanczos: with an orthonormal basis ``V_k`` of ``span{v, A^T A v, ..., (A^T A)^{k-1} v}`` and ``T_k = V_k^T A^T A V_k``,

    f(A^T A) v ~ |v| V_k f(T_k) e_1,        v^T f(A^T A) v ~ |v|^2 e_1^T f(T_k) e_1        (Gauss quadrature)

``k`` grows until the result stops changing. The error is estimated from the last two changes, over a quarter of the
dimension each, as the rest of the geometric series they start. It is an estimate, where that of a solve is a bound.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

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
from posteriori.solve import Preconditioner, Solution, conjugate_gradients, with_derivative

__all__ = ["Evaluation", "KrylovOperator", "Lanczos"]


@dataclass(frozen=True)
class Evaluation:
    """``f(A^T A) v`` by Lanczos.

    Attributes:
        value: shape of ``v``.
        dimension: of the Krylov space of the slowest sample.
        error: ``(B,)``, estimate of the error over the norm of ``value``.
        converged: ``(B,)`` booleans, whether ``error`` is within ``spectral_tolerance``.
    """

    value: Tensor
    dimension: int
    error: Tensor
    converged: Tensor


class KrylovOperator(LinearOperator):
    """An operator known through ``A`` and ``A^T`` only: conjugate gradients for solves, Lanczos for ``f(A^T A) v``.

    Solves run in float64 and stop on a bound on the whitened error (see :mod:`posteriori.solve`). A subclass that knows
    an operator like itself with an exact solve returns it from :meth:`surrogate`, which saves iterations.

    Attributes:
        tolerance: whitened error at which solves stop.
        max_iterations: iterations after which a solve gives up with a warning.
        spectral_tolerance: relative error at which ``spectral`` stops.
        krylov_dimension: largest Krylov space of ``spectral``, which keeps that many signals in memory.
        surrogate_error: how far ``S^T S`` may be from ``A^T A``, as a part of its largest eigenvalue; see
            :meth:`surrogate`.
    """

    tolerance: float = 1e-3
    max_iterations: int = 2000
    spectral_tolerance: float = 1e-3
    krylov_dimension: int = 200
    surrogate_error: float = 3e-2

    @property
    def solver(self) -> str:
        return "cg"

    @property
    def solve_dtype(self) -> torch.dtype:
        return torch.float64

    def gram(self, v: Tensor) -> Tensor:
        """``A^T A v``."""
        return self.adjoint(self.forward(v))

    def surrogate(self, like: Tensor) -> SpectralOperator | None:
        """An operator ``S`` with ``S^T S`` close to ``A^T A`` on signals like ``like``, ``(B, ...)``; ``None`` without.

        Solves of ``A`` are preconditioned by ``(a + b d) I + b S^T S``. ``d`` is ``surrogate_error`` times the largest
        eigenvalue of ``S^T S``: what ``S`` leaves open but ``A`` measures would be inflated by the ratio of ``b`` to
        ``a`` without it.
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
        with torch.no_grad():
            solution = conjugate_gradients(
                self.gram, rhs, a_, b_, unit=u, guess=None if guess is None else guess.detach().to(rhs),
                preconditioner=self._preconditioner(a_, b_, rhs),
                tolerance=self.tolerance, max_iterations=self.max_iterations,
            )  # fmt: skip
        z = solution.x
        if torch.is_grad_enabled():
            # z = z + M^-1 (rhs - M z): the residual, all but 0, carries the derivative of everything
            z = with_derivative(z, rhs - a_ * z - b_ * self.gram(z), lambda g: self._solve_gradient(a_, b_, g))
        given = x if x is not None else y
        assert given is not None
        return Solution(z.to(given.dtype), solution.iterations, solution.bound, solution.converged)

    def _preconditioner(self, a: Tensor, b: Tensor, like: Tensor) -> Preconditioner | None:
        S = self.surrogate(like)
        if S is None:
            return None
        lam = S.eigenvalues(like)
        largest = lam.flatten(1).amax(1).reshape(-1, *[1] * (like.ndim - 1))
        raised = a + b * self.surrogate_error * largest
        return Preconditioner(lambda v: S.gram_solve(raised, b, v), raised + b * largest)

    def _solve_gradient(self, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
        """``(a I + b A^T A)^-1 g`` to a small relative residual: a gradient has no units to be whitened in."""
        size = per_sample(g.flatten(1).norm(dim=1).clamp_min(torch.finfo(g.dtype).tiny), g)
        with torch.no_grad():
            solution = conjugate_gradients(
                self.gram, g / size, a, b, unit=1 / (a * g[0].numel()), quadrature=False,
                preconditioner=self._preconditioner(a, b, g),
                tolerance=min(self.tolerance, 1e-6), max_iterations=self.max_iterations,
            )  # fmt: skip
        z = solution.x * size
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

        Stops where the estimated relative error is within ``spectral_tolerance``, and warns where ``krylov_dimension``
        comes first; smooth ``f`` need few dimensions. Differentiable in ``v`` and in what ``f`` holds, not in the
        operator's own parameters.
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
        process = Lanczos(self.gram, f, v.detach().to(self.solve_dtype), self.spectral_tolerance)
        error = process.run(self.krylov_dimension)
        result = process.combine(process.weights()).reshape(v.shape)
        result = (per_sample(process.norm, result) * result).to(v.dtype)
        value = with_derivative(result, v, lambda g: self.spectral(f, g))
        return Evaluation(value, process.dimension, error, error <= self.spectral_tolerance)

    @full_precision
    def spectral_diagonal(self, f: SpectralFunction, like: Tensor) -> Tensor:
        """The mean of the diagonal, by Hutchinson's estimator with a fixed probe: constant over the signal.

        A probe's mean is off by ``sqrt(2 sum of squares off the diagonal) / n``, little for an image. Its single
        entries are off by a column's norm off the diagonal: 60 % where the diagonal of a motion blur itself varies by
        15 %. Sixteen probes would cost sixteen times as much and hand a network as much noise as signal.
        """
        generator = torch.Generator().manual_seed(0)
        probe = torch.randint(0, 2, like.shape[1:], generator=generator).to(like) * 2 - 1
        count = self.samples(like.ndim) or 1  # one probe serves all samples of one operator
        probe = probe.expand(count, *like.shape[1:]).to(self.solve_dtype).contiguous()
        process = Lanczos(self.gram, f, probe, self.spectral_tolerance, like.shape[0], quadrature=True)
        process.run(self.krylov_dimension)
        mean = process.weights()[:, 0].to(like.dtype)
        return per_sample(mean, like).expand(like.shape[0], *[1] * (like.ndim - 1))

    def pinv(self, y: Tensor) -> Tensor:
        raise ValueError(f"{self.describe()} has no exact pseudo-inverse: give a positive sigma_y instead of 0")


class Lanczos:
    """The process for a batch, each sample up to its own dimension.

    Args:
        gram: ``v -> A^T A v``.
        f: the function.
        v: ``(R, ...)``, in the precision to work in, with one row for each sample or one for all.
        tolerance: relative error to reach.
        batch: samples that ``f`` is for, when ``v`` has one row for all.
        quadrature: whether only the quadratic form ``e_1^T f(T) e_1`` is wanted.
    """

    def __init__(
        self,
        gram: Callable[[Tensor], Tensor],
        f: SpectralFunction,
        v: Tensor,
        tolerance: float,
        batch: int | None = None,
        *,
        quadrature: bool = False,
    ) -> None:
        self.gram, self.f, self.tolerance, self.quadrature = gram, f, tolerance, quadrature
        self.shape, self.n, self.batch = v.shape, v[0].numel(), batch or v.shape[0]
        self.norm = v.flatten(1).norm(dim=1)
        self.dimension = 0
        start = v.flatten(1) / self.norm.clamp_min(torch.finfo(v.dtype).tiny)[:, None]
        self._basis = start.new_zeros(v.shape[0], 32, self.n)  # grows by doubling
        self._basis[:, 0] = start
        self._diagonal: list[Tensor] = []
        self._off: list[Tensor] = []
        self._scale = torch.zeros_like(self.norm)  # size of A^T A, as far as seen
        self._stop: Tensor | None = None  # dimension at which every sample ended

    @torch.no_grad()
    def run(self, most: int) -> Tensor:
        """Grow the space until all samples are done; returns their estimated relative errors, ``(B,)``."""
        most = min(most, self.n)
        stop = torch.zeros(self.batch, dtype=torch.long, device=self.norm.device)
        error = torch.full((self.batch,), torch.inf, dtype=self.norm.dtype, device=self.norm.device)
        found: list[Tensor] = []
        checks = {k for j in range(40) if (k := round(most * 0.8**j)) >= 8} | {most}
        while True:
            alive = self.extend()
            k = self.dimension
            if k not in checks and bool(alive.any()):
                continue
            found.append(self._coefficients(stop.new_full(self.norm.shape, k)))
            estimate = self._estimate(found)
            if k == self.n:
                estimate = torch.zeros_like(estimate)
            estimate = torch.where(alive.expand_as(estimate), estimate, torch.zeros_like(estimate))
            open_ = stop == 0
            error = torch.where(open_, estimate, error)
            stop = torch.where(open_ & (estimate <= self.tolerance), k, stop)
            if bool((stop > 0).all()) or k >= most:
                self._stop = torch.where(stop > 0, stop, k)
                return error

    def _estimate(self, found: list[Tensor]) -> Tensor:
        """Relative error of the last of several results at growing dimensions."""
        if len(found) < 3:
            return torch.full_like(found[-1][:, 0], torch.inf)
        last, before, first = found[-1], found[-2], found[-3]

        def change(u: Tensor, v: Tensor) -> Tensor:
            return (u - torch.nn.functional.pad(v, (0, u.shape[1] - v.shape[1]))).norm(dim=1)

        size = last.norm(dim=1).clamp_min(torch.finfo(last.dtype).tiny)
        new, old = change(last, before) / size, change(before, first) / size
        ratio = (new / old.clamp_min(torch.finfo(last.dtype).tiny)).clamp_max(0.98)
        return new * (ratio / (1 - ratio)).clamp_min(1)

    def extend(self) -> Tensor:
        """One more dimension; returns which rows have more to come, ``(R,)``."""
        k = self.dimension
        tiny, vanishing = torch.finfo(self.norm.dtype).tiny, 1e4 * torch.finfo(self.norm.dtype).eps
        last = self._basis[:, k]
        w = self.gram(last.reshape(self.shape)).flatten(1)
        self._diagonal.append((w * last).sum(1))
        known = self._basis[:, : k + 1]
        for _ in range(2):  # twice is enough (Giraud et al. 2005)
            w = w - torch.bmm(torch.bmm(known, w.unsqueeze(2)).mT, known).squeeze(1)
        beta = w.norm(dim=1)
        self._scale = torch.maximum(self._scale, torch.maximum(self._diagonal[-1], beta))
        # A vanishing beta means an invariant subspace: a zero vector then adds nothing.
        alive = beta > vanishing * self._scale
        self._off.append(torch.where(alive, beta, 0))
        self.dimension = k + 1
        if self._basis.shape[1] == self.dimension:
            self._basis = torch.cat([self._basis, torch.zeros_like(self._basis)], 1)
        self._basis[:, k + 1] = torch.where(alive[:, None], w / beta.clamp_min(tiny)[:, None], 0)
        return alive

    def weights(self) -> Tensor:
        """``f(T) e_1`` of every sample at its own dimension, ``(B, k)``; ``(B, 1)`` for a quadratic form."""
        assert self._stop is not None
        return self._coefficients(self._stop)

    def ritz_values(self) -> Tensor:
        """Eigenvalues of ``T``, ``(R, k)``: within the spectrum of ``A^T A``, its ends first."""
        return torch.linalg.eigvalsh(self._tridiagonal(torch.ones_like(self.norm, dtype=torch.bool)[:, None]))

    def _tridiagonal(self, coupled: Tensor) -> Tensor:
        side = torch.diag_embed(torch.stack(self._off, 1)[:, : self.dimension - 1] * coupled, 1)
        return torch.diag_embed(torch.stack(self._diagonal, 1)) + side + side.mT

    def _coefficients(self, stop: Tensor) -> Tensor:
        # Coupled up to a sample's own dimension; what lies beyond does not reach e_1.
        coupled = torch.arange(1, self.dimension, device=stop.device) < stop[:, None]
        lam, vectors = torch.linalg.eigh(self._tridiagonal(coupled))
        lam = lam.clamp_min(0).reshape(*lam.shape, *[1] * (len(self.shape) - 2))
        values = self.f(lam)
        weighted = values.expand(torch.broadcast_shapes(values.shape, lam.shape)).flatten(1).to(vectors) * vectors[:, 0]
        if self.quadrature:
            return (weighted * vectors[:, 0]).sum(1, keepdim=True).expand(self.batch, 1)
        return (vectors @ weighted.unsqueeze(2)).squeeze(2)

    def combine(self, weights: Tensor) -> Tensor:
        """``V w``, ``(B, n)``."""
        return torch.bmm(weights.unsqueeze(1), self._basis[:, : self.dimension]).squeeze(1)
