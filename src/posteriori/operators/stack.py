r"""Several measurements of one signal, each with its own operator and noise:

    y_i = A_i x_0 + sigma_i noise_i,        i = 1, ..., k

Divided by ``sigma_i / sigma_y`` they are one measurement with white noise of one level ``sigma_y``,

    y = [ w_1 y_1, ..., w_k y_k ],    A = [ w_1 A_1; ...; w_k A_k ],    w_i = sigma_y / sigma_i,
    A^T A = sum_i w_i^2 A_i^T A_i.

Where all parts are diagonal in one basis the solve is exact with ``lam = sum_i w_i^2 lam_i``: masks and weights;
circular convolutions; one separable operator several times; each of them beside the signal itself, which is diagonal
in every basis. Matrices become one matrix. Everything else is solved by conjugate gradients.

``sigma_y`` is the geometric mean of the ``sigma_i``, a level between them that a network is likely to know.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from posteriori.operators.algebra import Scaled, compose, is_scalar
from posteriori.operators.base import (
    LinearOperator,
    Scalar,
    SpectralFunction,
    SpectralOperator,
    full_precision,
    name_of,
    per_sample,
)
from posteriori.operators.composition import acts_in_space, approximation
from posteriori.operators.dense import Matrix
from posteriori.operators.fourier import FourierOperator
from posteriori.operators.kronecker import Separable
from posteriori.operators.krylov import KrylovOperator, Surrogate
from posteriori.operators.products import Picking
from posteriori.operators.transforms import Transformed

__all__ = ["Stack", "stack"]


class Stack(LinearOperator):
    """Several operators on one signal; its measurement is flat, ``(B, m)``. Made by :func:`stack`.

    Attributes:
        operators: the ``A_i``.
        weights: ``w_i``, a number or one per sample.
        sigma_y: noise of the joint measurement, to be given with it to everything that asks for ``sigma_y``.
        shape: shape of a signal.
    """

    operators: tuple[LinearOperator, ...]
    weights: tuple[Scalar, ...]
    sigma_y: Scalar
    shape: tuple[int, ...]

    def _set(
        self,
        operators: tuple[LinearOperator, ...],
        weights: tuple[Scalar, ...],
        sigma_y: Scalar,
        shape: tuple[int, ...],
    ) -> None:
        self.operators, self.weights, self.sigma_y, self.shape = operators, weights, sigma_y, shape
        self._sizes: dict[torch.device, list[torch.Size]] = {}  # a memo: shapes of the parts' measurements

    def samples(self, ndim: int) -> int | None:
        own = [w.numel() for w in self.weights if isinstance(w, Tensor)]
        return next((s for A in self.operators if (s := A.samples(ndim)) is not None), own[0] if own else None)

    def _shapes(self, device: torch.device) -> list[torch.Size]:
        if device not in self._sizes:
            x = torch.zeros(self.samples(1 + len(self.shape)) or 1, *self.shape, device=device)
            with torch.no_grad():
                self._sizes[device] = [A(x).shape[1:] for A in self.operators]
        return self._sizes[device]

    def _parts(self, y: Tensor) -> list[Tensor]:
        """The parts' measurements, weighted."""
        shapes = self._shapes(y.device)
        lengths = [math.prod(s) for s in shapes]
        if y.ndim != 2 or y.shape[1] != sum(lengths):
            raise ValueError(
                f"a measurement of this stack has shape (B, {sum(lengths)}), got {tuple(y.shape)}: make it with join"
            )
        parts = y.split(lengths, 1)
        return [p.reshape(-1, *s) for p, s in zip(parts, shapes, strict=True)]

    def split(self, y: Tensor) -> list[Tensor]:
        """The measurements ``y_i``, each in its own shape and units, of a joint one ``(B, m)``."""
        return [p / per_sample(w, p) for p, w in zip(self._parts(y), self.weights, strict=True)]

    def join(self, measurements: Sequence[Tensor]) -> Tensor:
        """The joint measurement ``(B, m)`` of ``y_i`` ``(B, *measurement_i)``, whose noise has level ``sigma_y``.

        Raises:
            ValueError: when their number or a shape does not fit.
        """
        if len(measurements) != len(self.operators):
            raise ValueError(f"this stack has {len(self.operators)} measurements, got {len(measurements)}")
        for i, (y, shape) in enumerate(zip(measurements, self._shapes(measurements[0].device), strict=True)):
            if y.shape[1:] != shape:
                raise ValueError(f"measurement {i} has shape {tuple(y.shape)}, its operator gives (B, *{tuple(shape)})")
        return torch.cat(
            [(per_sample(w, y) * y).flatten(1) for w, y in zip(self.weights, measurements, strict=True)], 1
        )

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"this stack acts on signals of shape {self.shape}, got {tuple(x.shape[1:])}")
        return self.join([A(x) for A in self.operators])

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        return self.shape

    def measurement_ndim(self, ndim: int) -> int:
        return 2

    def observed(self, y: Tensor) -> Tensor | None:
        parts = self._parts(y)
        observed = [A.observed(p) for A, p in zip(self.operators, parts, strict=True)]
        if all(o is None for o in observed):
            return None
        full = [torch.ones_like(p) if o is None else o.expand(p.shape) for o, p in zip(observed, parts, strict=True)]
        return torch.cat([o.flatten(1) for o in full], 1)

    def __matmul__(self, other: object) -> LinearOperator:
        """``[A_1; A_2] B = [A_1 B; A_2 B]``: every part keeps its structure."""
        if not isinstance(other, LinearOperator):
            return NotImplemented
        shape = _signal_shape(other, self.shape)
        return _make(tuple(compose(A, other) for A in self.operators), self.weights, self.sigma_y, shape)

    def describe(self) -> str:
        names = ", ".join(map(name_of, self.operators))
        return f"Stack({names}) [{self.solver}]"


class SharedStack(Stack, SpectralOperator):
    """Parts that are diagonal in one basis, that of ``basis``."""

    def __init__(self, basis: SpectralOperator, parts: Sequence[tuple[Scalar, SpectralOperator]]) -> None:
        self.basis = basis
        self.parts = tuple(parts)  # with the factor of each, w_i times its own

    @property
    def solver(self) -> str:
        return self.basis.solver

    def eigenvalues(self, like: Tensor) -> Tensor:
        lam = self.basis.eigenvalues(like) * 0
        for factor, A in self.parts:
            # a multiple of the signal itself has the same eigenvalue in every basis
            own = A.eigenvalues(like.new_empty(1).reshape([1] * lam.ndim)) if is_scalar(A) else A.eigenvalues(like)
            lam = lam + _shaped(factor, lam) ** 2 * own
        return lam

    def coefficients(self, x: Tensor) -> Tensor:
        return self.basis.coefficients(x)

    def signal(self, c: Tensor, like_shape: Sequence[int]) -> Tensor:
        return self.basis.signal(c, like_shape)

    def adjoint_coefficients(self, y: Tensor) -> Tensor:
        terms = []
        for (factor, A), part in zip(self.parts, self._parts(y), strict=True):
            c = self.basis.coefficients(A.forward(part)) if is_scalar(A) else A.adjoint_coefficients(part)
            terms.append(_shaped(factor, c) * c)
        return sum(terms[1:], terms[0])

    def spectral_diagonal(self, f: SpectralFunction, like: Tensor) -> Tensor:
        return self.basis.spectral_diagonal(lambda _: f(self.eigenvalues(like)), like)


class DenseStack(Stack, Matrix):
    """Matrices below each other."""

    def __init__(self, matrix: Tensor, shape: Sequence[int]) -> None:
        Matrix.__init__(self, matrix, shape)


class IterativeStack(Stack, KrylovOperator):
    """Parts without a common structure."""

    def core(self, ndim: int) -> int:
        return 2 if ndim == 4 and all(acts_in_space(A) for A in self.operators) else ndim - 1

    def surrogate(self, like: Tensor) -> Surrogate | None:
        """The sum of what is close to the parts, where that is diagonal in one basis; masks are diluted over it."""
        shares, found = [], []
        for A, w in zip(self.operators, self.weights, strict=True):
            near = approximation(A, like)
            if near is None:
                return None
            square = _shaped(w, like) ** 2
            if isinstance(near, Surrogate):
                found.append(Surrogate(near.basis, square * near.lam))
            else:
                shares.append(square * near)
        if len({_basis(s.basis) for s in found}) != 1:
            return None
        return Surrogate(found[0].basis, sum([s.lam for s in found[1:]], found[0].lam) + sum(shares))

    @full_precision
    def adjoint(self, y: Tensor) -> Tensor:
        terms = [A.adjoint(per_sample(w, p) * p)
                 for A, w, p in zip(self.operators, self.weights, self._parts(y), strict=True)]  # fmt: skip
        return sum(terms[1:], terms[0])


def _shaped(factor: Scalar, like: Tensor) -> Tensor:
    real = like.real if like.is_complex() else like
    return torch.as_tensor(factor, dtype=real.dtype, device=like.device).reshape(-1, *[1] * (like.ndim - 1))


def _unscaled(A: LinearOperator) -> tuple[Scalar, LinearOperator]:
    return (A.factor, A.operator) if isinstance(A, Scaled) else (1.0, A)


def _basis(A: LinearOperator) -> Hashable:
    """Equal for operators whose ``A^T A`` is diagonal in the same basis."""
    if isinstance(A, Picking):
        return "signal"
    if isinstance(A, FourierOperator):
        return "fourier", A.axes
    if isinstance(A, Transformed):
        return type(A), A.dims, A.scramble
    return ("separable", A.axes) if isinstance(A, Separable) else id(A)


def _signal_shape(A: LinearOperator, measurement_shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(A.signal_shape(measurement_shape))


def _make(
    operators: tuple[LinearOperator, ...], weights: tuple[Scalar, ...], sigma_y: Scalar, shape: tuple[int, ...]
) -> Stack:
    parts = []
    for A, w in zip(operators, weights, strict=True):
        factor, inner = _unscaled(A)
        parts.append((factor * w.to(factor.device) if isinstance(factor, Tensor) and isinstance(w, Tensor)
                      else factor * w, inner))  # fmt: skip
    made: Stack
    spectral = [(f, A) for f, A in parts if isinstance(A, SpectralOperator) and not isinstance(A, Stack)]
    shared = [A for _, A in spectral if not is_scalar(A)]
    fixed = [(f, A) for f, A in parts if isinstance(A, Matrix) and not isinstance(f, Tensor)]
    if len(fixed) == len(parts):
        made = DenseStack(torch.cat([f * A.matrix.double() for f, A in fixed]), shape)
    elif len(spectral) == len(parts) and len({_basis(A) for A in shared}) <= 1:
        made = SharedStack(shared[0] if shared else spectral[0][1], spectral)
    else:
        made = IterativeStack()
        iterative = [A for A in operators if isinstance(A, KrylovOperator)]
        made.tolerance = min((A.tolerance for A in iterative), default=made.tolerance)
        made.max_iterations = max((A.max_iterations for A in iterative), default=made.max_iterations)
        made.dense_entries = min((A.dense_entries for A in iterative), default=made.dense_entries)
    made._set(operators, weights, sigma_y, shape)
    return made


def stack(
    operators: Sequence[LinearOperator],
    sigmas: Sequence[Scalar] | None = None,
    *,
    shape: Sequence[int] | None = None,
) -> Stack:
    """Several measurements of one signal as one operator.

        A = stack([Blur(kernel), Identity()], sigmas=[0.02, 0.2], shape=(3, 256, 256))
        posterior = ExactPosterior(denoiser, A, A.join([y_blurred, y_noisy]), A.sigma_y)

    Args:
        operators: the ``A_i``.
        sigmas: standard deviations of their noises, each a number or one per sample ``(B,)``; equal when left out,
            and then ``sigma_y`` is the user's (``A.sigma_y`` is 1).
        shape: shape of a signal without the batch; needed unless one of the operators knows it.

    Returns:
        An operator with flat measurements ``(B, m)``: ``A.join`` makes them, ``A.split`` takes them apart, and
        ``A.sigma_y`` is their noise.

    Raises:
        ValueError: when nothing is stacked, a noise is not positive, or the shape is unknown.
    """
    parts = tuple(operators)
    if not parts:
        raise ValueError("a stack needs at least one operator")
    if shape is None:
        shape = next((s for A in parts if (s := getattr(_unscaled(A)[1], "shape", None)) is not None), None)
    if shape is None:
        raise ValueError("none of these operators knows the size of a signal: give shape, such as (3, 256, 256)")
    if sigmas is None:
        return _make(parts, (1.0,) * len(parts), 1.0, tuple(shape))
    if len(sigmas) != len(parts):
        raise ValueError(f"{len(sigmas)} noise levels for {len(parts)} operators: give one each")
    levels = [torch.as_tensor(s, dtype=torch.float64) for s in sigmas]
    if not all(bool((torch.isfinite(s) & (s > 0)).all()) for s in levels):
        raise ValueError("the noise of every measurement of a stack is positive and finite")
    mean = torch.exp(torch.stack([s.log().reshape(-1) for s in torch.broadcast_tensors(*levels)]).mean(0))
    weights = [mean / s.reshape(-1) for s in levels]
    plain = mean.numel() == 1
    return _make(
        parts,
        tuple(float(w) if plain else w for w in weights),
        float(mean) if plain else mean,
        tuple(shape),
    )
