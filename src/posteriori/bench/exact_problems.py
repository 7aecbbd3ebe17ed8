r"""Problems whose posterior is known: priors, operators and measurements of the exact benchmark.

Signals are pictures of ``sqrt(d) x sqrt(d)`` pixels, of ``1 x 2`` for d = 2. Priors:

    gaussian   N(0, C),  C_ij = exp(-|i - j|/L)/4,  L a quarter of the side but at least 1
    mixture    components that differ by about 1.5 in directions the operator hardly sees, with covariances of random
               axes and variances from 1/4 down to 1/400: the posterior keeps several modes
    patches    a mixture fitted to patches of photos (:mod:`posteriori.bench.patches`)

Operators: ``selection`` of half of the pixels, Gaussian ``blur`` of one pixel, ``downsampling`` by averages of 2x2
pixels, ``projection`` on d/4 random directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from posteriori.operators import Downsampling, GaussianBlur, Inpainting, LinearOperator, Matrix
from posteriori.pivot import measure
from posteriori.priors import Gaussian, GaussianMixture, dense_matrix

__all__ = ["OPERATORS", "OperatorName", "PriorSpec", "ProblemSpec", "make_operator", "make_prior", "signal_shape"]

OperatorName = Literal["selection", "blur", "downsampling", "projection"]
OPERATORS: tuple[OperatorName, ...] = ("selection", "blur", "downsampling", "projection")
SEPARATION = 1.5


@dataclass(frozen=True)
class PriorSpec:
    """A prior by name.

    Attributes:
        kind: ``gaussian``, ``mixture`` or ``patches``.
        d: entries of a signal: 2, or the square of an even side.
        components: of a mixture.
    """

    kind: Literal["gaussian", "mixture", "patches"]
    d: int
    components: int = 5

    def __post_init__(self) -> None:
        side = math.isqrt(max(self.d, 0))
        if self.d != 2 and (side**2 != self.d or side % 2 or side == 0):
            raise ValueError(f"d must be 2 or the square of an even side (16, 64, 256), got {self.d}")
        if self.kind == "patches" and self.d == 2:
            raise ValueError("patches need d of at least 4")
        if self.components < 1:
            raise ValueError(f"components must be at least 1, got {self.components}")


@dataclass(frozen=True)
class ProblemSpec:
    """Everything that decides a problem but the fit of a patch mixture."""

    prior: PriorSpec
    operator: OperatorName
    sigma_y: float
    seed: int = 0


def signal_shape(d: int) -> tuple[int, int, int]:
    """Shape of a signal of ``d`` entries."""
    side = math.isqrt(d)
    return (1, 1, 2) if d == 2 else (1, side, side)


def make_operator(kind: OperatorName, d: int, seed: int = 0, width: float = 1.0) -> LinearOperator:
    """An operator on signals of ``d`` entries.

    Args:
        kind: see the module's head.
        d: entries.
        seed: of the mask or the directions.
        width: of the blur, in pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = signal_shape(d)
    if kind == "projection":
        m = max(1, d // 4)
        return Matrix(torch.randn(m, d, generator=generator, dtype=torch.float64) / d**0.5, shape)
    if kind == "selection":
        mask = torch.ones(d, dtype=torch.float64)
        mask[torch.randperm(d, generator=generator)[: d // 2]] = 0
        return Inpainting(mask.reshape(shape))
    if d == 2:  # two pixels have no room for the filters
        share = 1 / (1 + math.exp(-1 / (2 * width**2))) if kind == "blur" else 0.5
        rows = torch.tensor([[share, 1 - share], [1 - share, share]], dtype=torch.float64)
        return Matrix(rows if kind == "blur" else rows[:1], shape)
    return GaussianBlur(width) if kind == "blur" else Downsampling(2)


def make_prior(spec: PriorSpec, A: LinearOperator, seed: int = 0) -> GaussianMixture:
    """A synthetic prior; that of kind ``mixture`` depends on what ``A`` hardly sees."""
    d, shape = spec.d, signal_shape(spec.d)
    if spec.kind == "gaussian":
        rows, columns = torch.meshgrid(*[torch.arange(s, dtype=torch.float64) for s in shape[1:]], indexing="ij")
        points = torch.stack([rows, columns], -1).reshape(d, 2)
        cov = 0.25 * torch.exp(-torch.cdist(points, points) / max(1.0, shape[2] / 4))
        return Gaussian(torch.zeros(d, dtype=torch.float64), cov, shape=shape)
    if spec.kind != "mixture":
        raise ValueError(f"a prior of kind {spec.kind!r} is fitted, not made")
    generator = torch.Generator().manual_seed(seed)
    matrix = dense_matrix(A, shape, 1, torch.zeros(1, dtype=torch.float64))[0]
    vectors = torch.linalg.eigh(matrix.T @ matrix).eigenvectors
    hidden = vectors[:, : max(1, d // 2)]  # eigh sorts: the half that A sees least
    axes = torch.linalg.qr(torch.randn(spec.components, d, d, generator=generator, dtype=torch.float64)).Q
    covs = 0.25 * (axes * torch.logspace(0, -2, d, dtype=torch.float64)) @ axes.mT
    moves = torch.randn(spec.components, hidden.shape[1], generator=generator, dtype=torch.float64)
    if hidden.shape[1] > 1:
        moves = moves / moves.norm(dim=1, keepdim=True)
    weights = torch.rand(spec.components, generator=generator, dtype=torch.float64) + 0.3
    return GaussianMixture(weights, SEPARATION * moves @ hidden.T, covs, shape=shape)


def make_measurement(prior: GaussianMixture, A: LinearOperator, sigma_y: float, seed: int) -> tuple[Tensor, Tensor]:
    """A signal drawn from the prior, and its measurement; both ``(1, ...)``."""
    x_0 = prior.sample(1, torch.Generator().manual_seed(seed))
    return x_0, measure(A, x_0, sigma_y, seed=seed)
