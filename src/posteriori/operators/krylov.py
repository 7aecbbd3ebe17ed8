r"""Operators known through ``A`` and ``A^T`` only: conjugate gradients for solves, Lanczos for ``f(A^T A) v``."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from posteriori.operators.base import LinearOperator, Scalar, SpectralFunction, full_precision, per_sample
from posteriori.solve import Solution, conjugate_gradients, with_derivative

__all__ = ["KrylovOperator"]


class KrylovOperator(LinearOperator):
    """An operator known through ``A`` and ``A^T`` only: conjugate gradients for solves, Lanczos for ``f(A^T A) v``.

    Solves run in float64 and stop on a bound on the whitened error (see :mod:`posteriori.solve`).
    """

    tolerance: float = 1e-3
    max_iterations: int = 500
    krylov_dimension: int = 60

    @property
    def solver(self) -> str:
        return "cg"

    @property
    def solve_dtype(self) -> torch.dtype:
        return torch.float64

    def gram(self, v: Tensor) -> Tensor:
        """``A^T A v``."""
        return self.adjoint(self.forward(v))

    def solve(
        self, a: Scalar, b: Scalar, x: Tensor | None = None, y: Tensor | None = None, *, unit: Scalar = 1.0
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
                self.gram, rhs, a_, b_, unit=u, tolerance=self.tolerance, max_iterations=self.max_iterations
            )
        z = solution.x
        if torch.is_grad_enabled():
            # z = z + M^-1 (rhs - M z): the residual, all but 0, carries the derivative of everything
            z = with_derivative(z, rhs - a_ * z - b_ * self.gram(z), lambda g: self._solve_gradient(a_, b_, g))
        given = x if x is not None else y
        assert given is not None
        return Solution(z.to(given.dtype), solution.iterations, solution.bound, solution.converged)

    def _solve_gradient(self, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
        """``(a I + b A^T A)^-1 g`` to a small relative residual: a gradient has no units to be whitened in."""
        size = per_sample(g.flatten(1).norm(dim=1).clamp_min(torch.finfo(g.dtype).tiny), g)
        with torch.no_grad():
            solution = conjugate_gradients(
                self.gram, g / size, a, b, unit=1 / (a * g[0].numel()),
                tolerance=min(self.tolerance, 1e-6), max_iterations=self.max_iterations,
            )  # fmt: skip
        z = solution.x * size
        return with_derivative(z, g - a * z - b * self.gram(z), lambda h: self._solve_gradient(a, b, h))

    @full_precision
    def gram_solve(
        self, a: Scalar, b: Scalar, x: Tensor | None = None, y: Tensor | None = None, *, unit: Scalar = 1.0
    ) -> Tensor:
        solution = self.solve(a, b, x, y, unit=unit)
        if not bool(solution.converged.all()):
            warnings.warn(
                f"{self.describe()}: whitened error of the solve is only bounded by {float(solution.bound.max()):.1e} "
                f"after {solution.iterations} iterations (wanted {self.tolerance:.0e}): raise max_iterations, or use "
                "an operator with an exact solve",
                RuntimeWarning,
                stacklevel=3,
            )
        return solution.x

    @full_precision
    def spectral(self, f: SpectralFunction, v: Tensor) -> Tensor:
        """``f(A^T A) v`` by the Lanczos process with full reorthogonalisation (Saad 1992).

        Accuracy grows with ``krylov_dimension``; smooth ``f`` need few. Differentiable in ``v`` and in what ``f``
        holds, not in the operator's own parameters.
        """
        basis, lam, vectors, norm = self._lanczos(v.detach().to(self.solve_dtype))
        values = f(lam.reshape(*lam.shape, *[1] * (v.ndim - 2))).reshape(lam.shape)
        weights = vectors @ (values.to(vectors) * vectors[:, 0, :]).unsqueeze(2)
        result = torch.bmm(weights.transpose(1, 2), basis).reshape(v.shape)
        result = (per_sample(norm, result) * result).to(v.dtype)
        return with_derivative(result, v, lambda g: self.spectral(f, g))

    @torch.no_grad()
    def _lanczos(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Basis ``(B, k, n)``; eigenvalues and vectors of ``A^T A`` in it, ``(B, k)``, ``(B, k, k)``; norm of ``w``."""
        norm = w.flatten(1).norm(dim=1)
        tiny, vanishing = torch.finfo(w.dtype).tiny, 1e4 * torch.finfo(w.dtype).eps
        q = w / per_sample(norm.clamp_min(tiny), w)
        basis, diagonal, off = [q], [], []
        scale = torch.zeros_like(norm)  # size of A^T A, as far as seen
        for _ in range(min(self.krylov_dimension, w[0].numel())):
            w = self.gram(basis[-1])
            diagonal.append((w * basis[-1]).flatten(1).sum(1))
            stacked = torch.stack(basis, 1).flatten(2)  # (B, k, n)
            for _ in range(2):  # twice is enough (Giraud et al. 2005)
                overlap = torch.bmm(stacked, w.flatten(1).unsqueeze(2))
                w = w - torch.bmm(stacked.transpose(1, 2), overlap).reshape(w.shape)
            beta = w.flatten(1).norm(dim=1)
            off.append(beta)
            scale = torch.maximum(scale, torch.maximum(diagonal[-1], beta))
            # A vanishing beta means an invariant subspace: a zero vector then adds nothing.
            keep = beta > vanishing * scale
            basis.append(torch.where(per_sample(keep, w) > 0, w / per_sample(beta.clamp_min(tiny), w), 0 * w))
            if not bool(keep.any()):
                break
        k = len(diagonal)
        tridiagonal = torch.diag_embed(torch.stack(diagonal, 1))
        if k > 1:
            side = torch.diag_embed(torch.stack(off[: k - 1], 1), 1)
            tridiagonal = tridiagonal + side + side.transpose(1, 2)
        lam, vectors = torch.linalg.eigh(tridiagonal)
        return torch.stack(basis[:k], 1).flatten(2), lam.clamp_min(0), vectors, norm

    def spectral_diagonal(self, f: SpectralFunction, like: Tensor) -> Tensor:
        """The mean of the diagonal, by Hutchinson's estimator with a fixed probe: constant over the signal."""
        generator = torch.Generator().manual_seed(0)
        probe = torch.randint(0, 2, like.shape[1:], generator=generator).to(like) * 2 - 1
        probe = probe.expand(like.shape).contiguous()
        mean = (probe * self.spectral(f, probe)).flatten(1).mean(1)
        return per_sample(mean, like)

    def pinv(self, y: Tensor) -> Tensor:
        raise ValueError(f"{self.describe()} has no exact pseudo-inverse: give a positive sigma_y instead of 0")
