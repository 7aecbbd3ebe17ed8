r"""What a linear operator ``A`` is, and the few solves every method is made of.

    y = A x_0 + sigma_y noise,      x_0: (B, *signal),      y: (B, *measurement)

With ``A^T A = V diag(lam) V^T``:

    A.gram_solve(a, b, x, y) = (a I + b A^T A)^-1 (x + A^T y)      the pivot, the linear estimate, proximal steps
    A.spectral(f, v)         = V f(lam) V^T v                      square roots of covariances, preconditioning
    A.pinv(y)                = A^+ y

:class:`SpectralOperator` derives them from an exact, cheap ``V``. ``x`` and ``A^T y`` are then combined per
coefficient: summed in signal space first, float32 rounding of the one would leak into the null space of ``A``.
:class:`KrylovOperator` needs ``A`` and ``A^T`` only, solves iteratively, and knows its error.

Operators are immutable: calling one never changes it. Per-sample parameters (one mask or kernel per sample) carry
the batch as their first dimension; scalars that differ per sample (``a``, ``b``, ``sigma_y``) are tensors of shape
``(B,)``.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from posteriori.solve import Solution, conjugate_gradients, with_derivative

Scalar = float | Tensor
SpectralFunction = Callable[[Tensor], Tensor]
F = TypeVar("F", bound=Callable[..., Any])

__all__ = ["KrylovOperator", "LinearOperator", "Scalar", "SpectralOperator", "full_precision", "per_sample"]


@overload
def per_sample(value: Scalar, like: Tensor) -> Tensor: ...
@overload
def per_sample(value: None, like: Tensor) -> None: ...
def per_sample(value: Scalar | None, like: Tensor) -> Tensor | None:
    """Shape a scalar, or one value per sample, so that it broadcasts along the batch of ``like`` and nothing else.

    Args:
        value: a number, a 0-d tensor, or ``(B,)`` / ``(B, 1, ...)`` values for the ``B`` samples of ``like``.
        like: tensor of shape ``(B, ...)`` that gives device and dtype.

    Raises:
        ValueError: when ``value`` has another number of entries than ``like`` has samples.
    """
    if value is None:
        return None
    # Straight to the target's precision: by way of PyTorch's default a Python float would lose half its digits.
    dtype = like.real.dtype if like.is_complex() else like.dtype
    v = torch.as_tensor(value, dtype=dtype, device=like.device)
    if v.numel() not in (1, like.shape[0]) or (v.ndim > 0 and v.numel() != v.shape[0]):
        raise ValueError(
            f"a per-sample value of shape {tuple(v.shape)} does not fit a batch of {like.shape[0]}: "
            f"give one number, or a tensor of shape ({like.shape[0]},)"
        )
    return v.reshape(-1, *[1] * (like.ndim - 1))


def full_precision(function: F) -> F:
    """Run a solve in float32 or better whatever autocast says: half precision would drown the measurement."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        def lift(v: Any) -> Any:
            half = isinstance(v, Tensor) and v.dtype in (torch.float16, torch.bfloat16)
            return v.float() if half else v

        # a per-sample scalar may be on the CPU beside signals that are not
        devices = (v.device.type for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        device = next((d for d in devices if d != "cpu"), "cpu")
        with torch.autocast(device, enabled=False):
            return function(*map(lift, args), **{k: lift(v) for k, v in kwargs.items()})

    wrapped.__doc__, wrapped.__name__ = function.__doc__, function.__name__
    return wrapped  # type: ignore[return-value]


def _largest(lam: Tensor) -> Tensor:
    """Largest entry of every sample, shaped to broadcast against ``lam``."""
    return lam.amax(tuple(range(1, lam.ndim)), keepdim=True)


class LinearOperator(ABC):
    """A linear map from signals ``(B, *signal)`` to measurements ``(B, *measurement)``."""

    @property
    @abstractmethod
    def solver(self) -> str:
        """How solves are done: ``"exact (diagonal)"``, ``"exact (fft)"``, ..., or ``"cg"``."""

    def samples(self, ndim: int) -> int | None:
        """Batch size that the operator's own parameters are for (one mask per sample, say), acting on batches of
        ``ndim`` dimensions; ``None`` when any batch fits."""
        return None

    @property
    def exact(self) -> bool:
        """Whether solves are exact up to rounding."""
        return self.solver.startswith("exact")

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """``A x`` for ``x`` of shape ``(B, *signal)``."""

    @full_precision
    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """``A^T y`` for ``y`` of shape ``(B, *measurement)``."""

    @abstractmethod
    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the signals whose measurements have this shape, neither with the batch dimension."""

    @abstractmethod
    def gram_solve(
        self, a: Scalar, b: Scalar, x: Tensor | None = None, y: Tensor | None = None, *, unit: Scalar = 1.0
    ) -> Tensor:
        """``(a I + b A^T A)^-1 (x + A^T y)``; either term may be left out.

        Args:
            a, b: non-negative numbers, or one per sample, shape ``(B,)``.
            x: ``(B, *signal)``.
            y: ``(B, *measurement)``.
            unit: ``(a I + b A^T A) / unit`` is the precision an iterative solve's error is judged in; exact solves
                do not need it.

        Raises:
            ValueError: when both terms are missing or shapes do not fit.
        """

    @abstractmethod
    def spectral(self, f: SpectralFunction, v: Tensor) -> Tensor:
        """``f(A^T A) v``.

        Args:
            f: elementwise function of the eigenvalues. It gets them with as many dimensions as ``v``, the batch
                first, so that a per-sample parameter from :func:`per_sample` broadcasts. Values must be finite.
            v: ``(B, *signal)``.
        """

    @abstractmethod
    def spectral_diagonal(self, f: SpectralFunction, like: Tensor) -> Tensor:
        """Diagonal of ``f(A^T A)`` in signal space, broadcastable to ``like`` of shape ``(B, *signal)``."""

    @abstractmethod
    def pinv(self, y: Tensor) -> Tensor:
        """Pseudo-inverse ``A^+ y``, a least-squares solution.

        Raises:
            ValueError: when the operator has no stable pseudo-inverse.
        """

    def null_projection(self, v: Tensor) -> Tensor:
        """``(I - A^+ A) v``, the part of ``v`` that ``A`` does not see."""
        return self.spectral(lambda lam: self.unseen(lam).to(lam.dtype), v)

    def unseen(self, lam: Tensor) -> Tensor:
        """Which eigenvalues of ``A^T A`` count as zero: those up to 1e-10 of the sample's largest, so that neither the
        units of the measurement nor the other samples of a batch decide what ``A`` sees."""
        return lam <= 1e-10 * _largest(lam)

    def observed(self, y: Tensor) -> Tensor | None:
        """1 where an entry of ``y`` is a measurement and 0 where it is filler, broadcastable to ``y``;
        ``None`` when every entry is a measurement."""
        return None

    def measurement_count(self, y: Tensor) -> Tensor:
        """Number of measurements of every sample, shape ``(B,)``."""
        observed = self.observed(y)
        if observed is None:
            return torch.full((y.shape[0],), float(y[0].numel()), device=y.device)
        return observed.expand(y.shape).flatten(1).sum(1).float()

    def describe(self) -> str:
        """One line for reports."""
        return f"{type(self).__name__} [{self.solver}]"

    def __repr__(self) -> str:
        return self.describe()


def transpose(forward: Callable[[Tensor], Tensor], shape: Sequence[int], y: Tensor) -> Tensor:
    """``A^T y`` of a linear function on signals ``(B, *shape)``, by automatic differentiation."""
    with torch.enable_grad():
        pull_back = torch.func.vjp(forward, y.new_zeros(y.shape[0], *shape))[1]
    result: Tensor = pull_back(y)[0]
    return result


class SpectralOperator(LinearOperator):
    """An operator whose ``A^T A`` is diagonal in a basis that is cheap to change to.

    Subclasses give the change of basis; everything else follows. Parameters are kept as they were given (or in
    float64 when derived) and cast to the precision and device of what they act on.
    """

    @abstractmethod
    def eigenvalues(self, like: Tensor) -> Tensor:
        """Eigenvalues of ``A^T A``, real, broadcastable to ``coefficients(like)`` with as many dimensions."""

    @abstractmethod
    def coefficients(self, x: Tensor) -> Tensor:
        """``V^T x``: coefficients ``(B, ...)`` of a signal."""

    @abstractmethod
    def signal(self, c: Tensor, like_shape: Sequence[int]) -> Tensor:
        """``V c``: the signal ``(B, *signal)`` with these coefficients; ``like_shape`` is its shape with batch."""

    @abstractmethod
    def adjoint_coefficients(self, y: Tensor) -> Tensor:
        """``V^T A^T y``."""

    def _x_shape(self, y: Tensor) -> tuple[int, ...]:
        return (y.shape[0], *self.signal_shape(y.shape[1:]))

    @full_precision
    def adjoint(self, y: Tensor) -> Tensor:
        return self.signal(self.adjoint_coefficients(y), self._x_shape(y)).to(y.dtype)

    @full_precision
    def gram_solve(
        self, a: Scalar, b: Scalar, x: Tensor | None = None, y: Tensor | None = None, *, unit: Scalar = 1.0
    ) -> Tensor:
        if x is None and y is None:
            raise ValueError("gram_solve needs x, y or both")
        shape: Sequence[int]
        if y is None:
            assert x is not None
            c, shape, like = self.coefficients(x), x.shape, x
        else:
            c, shape, like = self.adjoint_coefficients(y), self._x_shape(y), y
            if x is not None:
                if tuple(x.shape) != tuple(shape):
                    raise ValueError(f"x has shape {tuple(x.shape)}, but y belongs to signals of {tuple(shape)}")
                c = c + self.coefficients(x)
                like = x
        lam = self.eigenvalues(like.new_empty(1).expand(shape))
        return self.signal(c / (per_sample(a, c) + per_sample(b, c) * lam), shape).to(like.dtype)

    @full_precision
    def spectral(self, f: SpectralFunction, v: Tensor) -> Tensor:
        return self.signal(f(self.eigenvalues(v)) * self.coefficients(v), v.shape).to(v.dtype)

    @full_precision
    def pinv(self, y: Tensor) -> Tensor:
        shape = self._x_shape(y)
        lam = self.eigenvalues(y.new_empty(1).expand(shape))
        self._check_pinv(lam)
        unseen = self.unseen(lam)
        c = self.adjoint_coefficients(y)
        seen_c = torch.where(unseen, torch.zeros_like(c), c / torch.where(unseen, torch.ones_like(lam), lam))
        return self.signal(seen_c, shape).to(y.dtype)

    def _check_pinv(self, lam: Tensor) -> None:
        """The ratio of the largest to the smallest kept singular value bounds how much ``A^+`` amplifies."""
        smallest = -_largest(torch.where(self.unseen(lam), -math.inf, -lam))
        condition = float((_largest(lam) / smallest).max().sqrt())  # 0 where nothing is kept
        if condition > 1e4:
            raise ValueError(
                f"{self.describe()} has no stable pseudo-inverse (condition number {condition:.1e}): "
                "give a positive sigma_y instead of 0"
            )


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
