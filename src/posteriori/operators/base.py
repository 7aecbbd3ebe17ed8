r"""What a linear operator ``A`` is, and the few solves every method is made of.

    y = A x_0 + sigma_y noise,      x_0: (B, *signal),      y: (B, *measurement)

With ``A^T A = V diag(lam) V^T``:

    A.gram_solve(a, b, x, y) = (a I + b A^T A)^-1 (x + A^T y)      the pivot, the linear estimate, proximal steps
    A.spectral(f, v)         = V f(lam) V^T v                      square roots of covariances, preconditioning
    A.pinv(y)                = A^+ y

:class:`SpectralOperator` derives them from an exact, cheap ``V``. ``x`` and ``A^T y`` are then combined per
coefficient: summed in signal space first, float32 rounding of the one would leak into the null space of ``A``.
``KrylovOperator`` (:mod:`posteriori.operators.krylov`) needs ``A`` and ``A^T`` only, solves iteratively, and knows its
error.

Operators are immutable: calling one never changes it. Per-sample parameters (one mask or kernel per sample) carry
the batch as their first dimension; scalars that differ per sample (``a``, ``b``, ``sigma_y``) are tensors of shape
``(B,)``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

Scalar = float | Tensor
SpectralFunction = Callable[[Tensor], Tensor]
F = TypeVar("F", bound=Callable[..., Any])

__all__ = ["LinearOperator", "Scalar", "SpectralOperator", "full_precision", "name_of", "per_sample", "transpose"]


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
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        # a per-sample scalar may be on the CPU beside signals that are not
        device = next((t for v in tensors if (t := v.device.type) != "cpu"), "cpu")
        half = any(v.dtype in (torch.float16, torch.bfloat16) for v in tensors)
        if not half and not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)

        def lift(v: Any) -> Any:
            return v.float() if isinstance(v, Tensor) and v.dtype in (torch.float16, torch.bfloat16) else v

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

    def measurement_ndim(self, ndim: int) -> int:
        """Dimensions of a batch of measurements, from the ``ndim`` of a batch of signals."""
        return ndim

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

    def gram(self, v: Tensor) -> Tensor:
        """``A^T A v`` for ``v`` of shape ``(B, *signal)``; structures have cheaper ways than one after the other."""
        return self.adjoint(self.forward(v))

    @abstractmethod
    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the signals whose measurements have this shape, neither with the batch dimension."""

    @abstractmethod
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
        """``(a I + b A^T A)^-1 (x + A^T y)``; either term may be left out.

        Args:
            a, b: non-negative numbers, or one per sample, shape ``(B,)``.
            x: ``(B, *signal)``.
            y: ``(B, *measurement)``.
            unit: ``(a I + b A^T A) / unit`` is the precision an iterative solve's error is judged in; exact solves
                do not need it.
            guess: ``(B, *signal)``, where an iterative solve starts: it changes the cost, not the answer.

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

    def __matmul__(self, other: object) -> LinearOperator:
        """``B @ A`` does ``A``, then ``B``; exact where a structure survives (:mod:`posteriori.operators.algebra`)."""
        from posteriori.operators.algebra import compose

        return compose(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, factor: object) -> LinearOperator:
        """``s * A``; ``s`` is a number or one per sample ``(B,)``."""
        from posteriori.operators.algebra import scale

        return scale(factor, self) if isinstance(factor, int | float | Tensor) else NotImplemented

    __rmul__ = __mul__

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
        self,
        a: Scalar,
        b: Scalar,
        x: Tensor | None = None,
        y: Tensor | None = None,
        *,
        unit: Scalar = 1.0,
        guess: Tensor | None = None,
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


def name_of(A: LinearOperator) -> str:
    """What an operator is called, without its solver."""
    return A.describe().rpartition(" [")[0] or A.describe()
