r"""Operators made of operators: ``B @ A`` and ``s * A``. For ``[A_1; A_2]`` see :mod:`posteriori.operators.stack`.

Where a structure survives, so does the exact solve:

    diag(v) diag(w) = diag(v w)                                      masks, weights, crops, samples, mosaics
    diag(v) diag(w) T = diag(v w) T                                  masks and weights after a transform
    F* K' F F* K F = F* (K' K) F                                     circular convolutions
    (B_h (x) B_w)(A_h (x) A_w) = (B_h A_h) (x) (B_w A_w)             separable operators with crops and paddings
    M (x) S                                                          channel mixing, and what acts on channels alike
    T A  with  T^T T = s^2 I:   (T A)^T T A = s^2 A^T A              scaled and padded measurements of any operator
    B M                                                              matrices

Everything else is a :class:`Composition`, solved by conjugate gradients with ``A^T B^T``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from posteriori.operators.base import (
    LinearOperator,
    Scalar,
    SpectralFunction,
    SpectralOperator,
    full_precision,
    name_of,
    per_sample,
)
from posteriori.operators.channels import ChannelMixing
from posteriori.operators.composition import Composition, factors, only_in_space
from posteriori.operators.cropping import Crop, CropAxis, Pad, PadAxis
from posteriori.operators.dense import Matrix
from posteriori.operators.diagonal import Identity, Inpainting, Weighting
from posteriori.operators.fourier import CircularConvolution
from posteriori.operators.kronecker import Axis, ConvolutionAxis, Separable
from posteriori.operators.products import ChannelProduct, ConvolutionProduct, Picking, PickingProduct, ProductAxis
from posteriori.operators.transforms import Transformed

__all__ = ["Composition", "Padded", "Permuted", "Scaled", "compose", "is_scalar", "scale"]


class _Conformal(LinearOperator):
    """``T A`` with ``T^T T = s^2 I``: solves are those of ``A``, with ``s^2 lam`` for ``lam``."""

    operator: LinearOperator

    @property
    def square(self) -> Scalar:
        """``s^2``."""
        return 1.0

    @abstractmethod
    def outer(self, y: Tensor) -> Tensor:
        """``T y``."""

    @abstractmethod
    def outer_adjoint(self, y: Tensor) -> Tensor:
        """``T^T y``."""

    @property
    def solver(self) -> str:
        return self.operator.solver

    def samples(self, ndim: int) -> int | None:
        return self.operator.samples(ndim)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.operator(x))

    @full_precision
    def adjoint(self, y: Tensor) -> Tensor:
        return self.operator.adjoint(self.outer_adjoint(y))

    def gram(self, v: Tensor) -> Tensor:
        return per_sample(self.square, v) * self.operator.gram(v)

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        return self.operator.signal_shape(measurement_shape)

    def measurement_ndim(self, ndim: int) -> int:
        return self.operator.measurement_ndim(ndim)

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
        z = None if y is None else self.outer_adjoint(y)
        square, like = self.square, x if x is not None else z
        if isinstance(square, Tensor) and like is not None:
            square, b = square.to(like), per_sample(b, like).reshape(-1)
        return self.operator.gram_solve(a, square * b, x, z, unit=unit, guess=guess)

    def _of_own(self, f: SpectralFunction) -> SpectralFunction:
        def function(lam: Tensor) -> Tensor:
            square = torch.as_tensor(self.square, dtype=lam.dtype, device=lam.device)
            return f(square.reshape(-1, *[1] * (lam.ndim - 1)) * lam)

        return function

    def spectral(self, f: SpectralFunction, v: Tensor) -> Tensor:
        return self.operator.spectral(self._of_own(f), v)

    def spectral_diagonal(self, f: SpectralFunction, like: Tensor) -> Tensor:
        return self.operator.spectral_diagonal(self._of_own(f), like)

    def pinv(self, y: Tensor) -> Tensor:
        z = self.outer_adjoint(y)
        return self.operator.pinv(z / per_sample(self.square, z))

    def null_projection(self, v: Tensor) -> Tensor:
        return self.operator.null_projection(v)


class Scaled(_Conformal):
    """``s A``.

    Args:
        factor: ``s``, a number or one per sample ``(B,)``; finite and not 0.
        operator: ``A``.
    """

    def __init__(self, factor: Scalar, operator: LinearOperator) -> None:
        f = torch.as_tensor(factor, dtype=None if isinstance(factor, Tensor) else torch.float64)
        if not bool(torch.isfinite(f).all()) or bool((f == 0).any()):
            raise ValueError("the factor of an operator is finite and not 0: for no measurement use Nothing()")
        self.factor: Scalar = f.reshape(-1) if f.numel() > 1 else float(f)
        self.operator = operator

    @property
    def square(self) -> Scalar:
        return self.factor**2

    def samples(self, ndim: int) -> int | None:
        own = self.factor.numel() if isinstance(self.factor, Tensor) else None
        return own or self.operator.samples(ndim)

    def outer(self, y: Tensor) -> Tensor:
        return per_sample(self.factor, y) * y

    outer_adjoint = outer

    def observed(self, y: Tensor) -> Tensor | None:
        return self.operator.observed(y)

    def describe(self) -> str:
        factor = "per-sample" if isinstance(self.factor, Tensor) else f"{self.factor:g}"
        return f"{factor} * {self.operator.describe()}"


class Padded(_Conformal):
    """``Pad A``: the measurement inside a larger frame, whose margins are no measurements."""

    def __init__(self, pad: Pad, operator: LinearOperator) -> None:
        self.pad = pad
        self.operator = operator

    def outer(self, y: Tensor) -> Tensor:
        return self.pad(y)

    def outer_adjoint(self, y: Tensor) -> Tensor:
        return self.pad.adjoint(y)

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        return self.operator.signal_shape(self.pad.signal_shape(measurement_shape))

    def observed(self, y: Tensor) -> Tensor | None:
        inside = self.pad.adjoint(y)
        observed = self.operator.observed(inside)
        return self.pad.observed(y) if observed is None else self.pad(observed.expand(-1, *inside.shape[1:]))

    def describe(self) -> str:
        return f"Pad @ {self.operator.describe()}"


class Permuted(_Conformal):
    """``A`` with the dimensions of its measurements in another order.

    Args:
        order: which dimension of ``A``'s measurement, the batch not counted, comes first, second, ...
        operator: ``A``.
    """

    def __init__(self, order: Sequence[int], operator: LinearOperator) -> None:
        self.order = tuple(order)
        self.operator = operator
        self._back = tuple(sorted(range(len(self.order)), key=self.order.__getitem__))

    def outer(self, y: Tensor) -> Tensor:
        return y.permute(0, *[1 + i for i in self.order])

    def outer_adjoint(self, y: Tensor) -> Tensor:
        return y.permute(0, *[1 + i for i in self._back])

    def signal_shape(self, measurement_shape: Sequence[int]) -> tuple[int, ...]:
        return self.operator.signal_shape([measurement_shape[i] for i in self._back])

    def observed(self, y: Tensor) -> Tensor | None:
        inner = self.outer_adjoint(y)
        observed = self.operator.observed(inner)
        return None if observed is None else self.outer(observed.expand(-1, *inner.shape[1:]))

    def describe(self) -> str:
        return self.operator.describe()


def is_scalar(A: LinearOperator) -> bool:
    """Whether ``A`` is a multiple of the identity, the same for all samples: diagonal in every basis."""
    return isinstance(A, Weighting) and A.weights.numel() == 1


def scale(factor: Scalar, A: LinearOperator) -> LinearOperator:
    """``factor * A``, with ``A``'s solver. ``factor`` is a number or one per sample ``(B,)``.

    Raises:
        ValueError: when a factor is 0 or not finite.
    """
    if isinstance(A, Scaled):
        return scale(_times(factor, A.factor), A.operator)
    scaled = Scaled(factor, A)
    if isinstance(scaled.factor, Tensor):
        return scaled
    if scaled.factor == 1:
        return A
    return Weighting(scaled.factor * A.weights) if isinstance(A, Weighting) and scaled.factor > 0 else scaled


def _times(u: Scalar, v: Scalar) -> Scalar:
    return u * v.to(u.device) if isinstance(u, Tensor) and isinstance(v, Tensor) else u * v


def compose(B: LinearOperator, A: LinearOperator) -> LinearOperator:
    """``B A``: the operator that does ``A``, then ``B``; exact where a structure survives (see the module's head)."""
    total: Scalar = 1.0
    chain = [*factors(B), *factors(A)]
    i = 0
    while i < len(chain):
        current = chain[i]
        if isinstance(current, Scaled):
            total = _times(total, current.factor)
            chain[i : i + 1] = factors(current.operator)
        elif i + 1 < len(chain) and (product := _product(current, chain[i + 1])) is not None:
            chain[i : i + 2] = [product]
        else:
            i += 1
            continue
        i = max(i - 1, 0)  # what became of it may fit what stands before
    return scale(total, chain[0] if len(chain) == 1 else Composition(*chain))


def _product(B: LinearOperator, A: LinearOperator) -> LinearOperator | None:
    """``B A`` as one operator with a structure, or ``None``."""
    if isinstance(B, Identity) or isinstance(A, Identity):
        return A if isinstance(B, Identity) else B
    if isinstance(B, Weighting) and isinstance(A, Weighting):
        return _weights(B, A)
    if isinstance(B, Weighting) and isinstance(A, Transformed):
        return A.weighted(_weights(B, A.selection))
    for one, other in ((B, A), (A, B)):
        if isinstance(one, Weighting) and is_scalar(one) and float(one.weights) > 0:
            return scale(float(one.weights), other)
        if isinstance(one, ChannelMixing) and only_in_space(other):
            assert isinstance(other, SpectralOperator)
            return ChannelProduct(one, other)
    if isinstance(B, ChannelMixing) and isinstance(A, ChannelMixing):
        return ChannelMixing(B.matrix @ A.matrix.to(B.matrix))
    if isinstance(B, Picking) and isinstance(A, Picking):
        return PickingProduct(B, A)
    if isinstance(B, Matrix) and isinstance(A, Matrix):
        return Matrix(B.matrix @ A.matrix.to(B.matrix), A.shape)
    if isinstance(B, Weighting) and isinstance(A, Matrix) and B.weights.ndim == 1 and bool((B.weights > 0).all()):
        return Matrix(B.weights.to(A.matrix)[:, None] * A.matrix, A.shape)
    if isinstance(B, Matrix) and isinstance(A, Weighting) and A.weights.ndim <= len(B.shape):
        return Matrix(B.matrix * A.weights.to(B.matrix).expand(B.shape).reshape(-1), B.shape)
    if isinstance(B, Pad):  # whatever A is, the frame is known to be no measurement
        return Padded(B, A)
    return _separable(B, A) or _convolutions(B, A)


def _weights(B: Weighting, A: Weighting) -> Weighting:
    try:
        product = B.weights.to(A.weights.device) * A.weights
    except RuntimeError:
        shapes = f"{tuple(B.weights.shape)} and {tuple(A.weights.shape)}"
        raise ValueError(f"weights (or masks) of {shapes} do not fit together: give both the signal's shape") from None
    return Inpainting(product) if bool(((product == 0) | (product == 1)).all()) else Weighting(product)


def _convolutions(B: LinearOperator, A: LinearOperator) -> LinearOperator | None:
    parts: list[CircularConvolution] = []
    for operator in (B, A):
        operator = _as_circular(operator) or operator
        if isinstance(operator, ConvolutionProduct):
            parts += operator.convolutions
        elif isinstance(operator, CircularConvolution):
            parts.append(operator)
        else:
            return None
    return ConvolutionProduct(*parts) if len({p.axes for p in parts}) == 1 else None


def _as_circular(A: LinearOperator) -> CircularConvolution | None:
    """A separable blur with a circular boundary as a convolution, for the company of others."""
    if not isinstance(A, Separable):
        return None
    kernels = []
    for axes in zip(*A.axes, strict=True):
        kernel = torch.ones((), dtype=torch.float64)
        for axis in axes:
            if not (isinstance(axis, ConvolutionAxis) and axis.boundary == "circular" and axis.stride == 1):
                return None
            kernel = kernel[..., None] * torch.tensor(axis.taps, dtype=torch.float64)
        kernels.append(kernel)
    if len({k.shape for k in kernels}) > 1:
        return None
    return CircularConvolution(torch.stack(kernels), per_sample=True)


def _separable(B: LinearOperator, A: LinearOperator) -> Separable | None:
    """What both do along each axis; crops and paddings beside a separable operator are separable too."""
    outer, inner = _axes(B), _axes(A)
    if outer is None or inner is None or not (isinstance(B, Separable) or isinstance(A, Separable)):
        return None
    rank, samples = max(len(outer), len(inner)), max(len(outer[0]), len(inner[0]))
    if {len(outer[0]), len(inner[0])} - {1, samples}:
        raise ValueError(f"operators of {len(outer[0])} and {len(inner[0])} samples do not fit together")
    axes = []
    for pair in zip(*([((CropAxis(0, 0),),) * (rank - len(v)) + tuple(v) for v in (outer, inner)]), strict=True):
        o, i = (tuple(v) * (samples if len(v) == 1 else 1) for v in pair)
        axes.append([ProductAxis(*both) for both in zip(o, i, strict=True)])
    return Separable(*axes, name=" @ ".join(name_of(f) for f in (B, A)))


def _axes(A: LinearOperator) -> tuple[tuple[Axis, ...], ...] | None:
    if isinstance(A, Separable):
        return A.axes
    if isinstance(A, Crop):
        return tuple((CropAxis(*m),) for m in A.margins)
    return tuple((PadAxis(*m),) for m in A.margins) if isinstance(A, Pad) else None
