r"""Figures of an operator: its spectrum, how exact its solve is, how long it takes, how much memory it needs.

The pivot at noise levels ``(sigma_y, sigma_t)`` (``alpha_t = 1``) is ``gram_solve(sigma_y^2, sigma_t^2, sigma_y^2 x_t,
sigma_t^2 y)``. Its error ``e`` in float32 is judged by its whitened size ``sqrt((|e/sigma_t|^2 + |A e/sigma_y|^2)/n)``,
against a reference for the same ``x_t`` and ``y``: a dense SVD in float64 for small signals, else the operator's own
solve in float64 with its certificate ``sigma_t |rho| / sqrt(n)`` (``rho`` the residual of ``Lambda mu = h``), which is
added to the error. Of iterative solves of large signals the bound that they return is added to the error of rounding.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from posteriori.operators.base import LinearOperator, SpectralOperator
from posteriori.operators.krylov import KrylovOperator
from posteriori.operators.lanczos import Lanczos

__all__ = ["SIGMA_T", "SIGMA_Y", "PivotError", "Profile", "Spectrum", "peak_memory", "profile"]

SIGMA_Y = (1e-3, 1e-2, 0.05, 0.5)
SIGMA_T = (0.002, 0.1, 1.0, 10.0, 80.0)
#: Signals with up to this many entries are compared with a dense SVD.
DENSE = 768


@dataclass(frozen=True)
class Spectrum:
    """Singular values of ``A``: the largest, the smallest that is not 0, and how many are not 0.

    ``method`` is ``"exact"``, ``"dense"`` or ``"lanczos"``; Lanczos bounds the largest from below, the smallest from
    above, and does not know the rank.
    """

    largest: float
    smallest: float
    rank: int | None
    method: str


@dataclass(frozen=True)
class PivotError:
    """Whitened error of the float32 pivot; ``bound`` is what an iterative solve claims, ``None`` for exact ones.

    ``measured`` tells whether ``error`` was measured, or holds the bound for want of a reference.
    """

    sigma_y: float
    sigma_t: float
    error: float
    bound: float | None
    measured: bool


@dataclass(frozen=True)
class Profile:
    """Figures of an operator; times in milliseconds for one signal (one batch, for parameters per sample), and the most
    memory that one of its calls takes, in MiB (see :func:`peak_memory`)."""

    shape: tuple[int, ...]
    measurement: tuple[int, ...]
    batch: int
    spectrum: Spectrum
    errors: list[PivotError]
    forward_ms: float
    adjoint_ms: float
    solve_ms: float
    memory: float

    @property
    def skipped(self) -> int:
        """Pairs of noise levels that were left out because iterative solves took too long."""
        return len(SIGMA_Y) * len(SIGMA_T) - len(self.errors)


def profile(operator: LinearOperator, shape: Sequence[int], *, seed: int = 0, seconds: float = 4.0) -> Profile:
    """Measure an operator.

    Args:
        operator: one that passes :func:`posteriori.operators.check`.
        shape: shape of a signal without the batch.
        seed: of the signals.
        seconds: spent at most on the errors of iterative solves, easy noise levels first.
    """
    shape = tuple(shape)
    batch = operator.samples(1 + len(shape)) or 1
    dtype = getattr(operator, "solve_dtype", torch.float64)
    generator = torch.Generator().manual_seed(seed)
    x_0 = torch.rand(batch, *shape, generator=generator) * 2 - 1
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a solve that does not converge is told by its bound
        svd = _dense_svd(operator, x_0.to(dtype)) if x_0[0].numel() <= DENSE else None
        y = operator(x_0)
        errors = _pivot_errors(operator, x_0, svd, generator, dtype, seconds)
        forward_ms = _milliseconds(lambda: operator(x_0))
        adjoint_ms = _milliseconds(lambda: operator.adjoint(y))

        def solve() -> Tensor:
            return operator.gram_solve(0.05**2, 1.0, 0.05**2 * x_0, y, unit=0.05**2)

        solve_ms = _milliseconds(solve)
        memory = max(peak_memory(f) for f in (lambda: operator(x_0), lambda: operator.adjoint(y), solve))
        spectrum = _spectrum(operator, x_0.to(dtype), svd)
    return Profile(shape, tuple(y.shape[1:]), batch, spectrum, errors, forward_ms, adjoint_ms, solve_ms, memory)


# -- singular values --------------------------------------------------------------------------------------------------


def _dense_svd(operator: LinearOperator, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(U, s, V^T)`` of the first sample's matrix, ``V`` square, from its columns."""
    n = like[0].numel()
    columns = []
    for j in range(n):
        e = torch.zeros(like.shape[0], n, dtype=like.dtype)
        e[:, j] = 1
        columns.append(operator(e.reshape(like.shape))[0].flatten())
    return torch.linalg.svd(torch.stack(columns, 1).double(), full_matrices=True)


def _spectrum(
    operator: LinearOperator, like: Tensor, svd: tuple[Tensor, Tensor, Tensor] | None, steps: int = 40
) -> Spectrum:
    if isinstance(operator, SpectralOperator):
        lam = operator.eigenvalues(like)[:1]
        seen = lam[~operator.unseen(lam)]
        count = operator.spectral_diagonal(lambda v: (~operator.unseen(v)).to(v.dtype), like).expand(like.shape)
        smallest = float(seen.min().sqrt()) if seen.numel() else 0.0
        return Spectrum(float(lam.max().sqrt()), smallest, round(float(count[0].sum())), "exact")
    if svd is not None:
        s = svd[1]
        kept = s[s > 1e-5 * s.max()] if float(s.max()) > 0 else s[:0]
        smallest = float(kept.min()) if kept.numel() else 0.0
        return Spectrum(float(s.max()), smallest, kept.numel(), "dense")

    # Started in the range of A^T A: nothing of its null space comes in.
    generator = torch.Generator().manual_seed(0)
    start = operator.gram(torch.randn(like.shape, generator=generator, dtype=like.dtype))
    process = Lanczos(operator.gram, lambda lam: lam, start, 0.0)
    while bool(process.extend()[0]) and process.dimension < steps:
        pass
    lam = process.ritz_values()[0].clamp_min(0)
    return Spectrum(float(lam.max().sqrt()), float(lam.min().sqrt()), None, "lanczos")


# -- the pivot --------------------------------------------------------------------------------------------------------


def _pivot_errors(
    operator: LinearOperator,
    x_0: Tensor,
    svd: tuple[Tensor, Tensor, Tensor] | None,
    generator: torch.Generator,
    dtype: torch.dtype,
    seconds: float,
) -> list[PivotError]:
    n = x_0[0].numel()
    a_x = operator(x_0)
    observed = operator.observed(a_x)
    began = time.perf_counter()
    rows = []
    # the ratio of the noise levels is what iterations pay for
    for sigma_t, sigma_y in sorted(((t, y) for t in SIGMA_T for y in SIGMA_Y), key=lambda pair: pair[0] / pair[1]):
        y = a_x + sigma_y * torch.randn(a_x.shape, generator=generator)
        y = y if observed is None else y * observed
        x_t = x_0 + sigma_t * torch.randn(x_0.shape, generator=generator)
        if isinstance(operator, KrylovOperator) and time.perf_counter() - began > seconds:
            continue
        v_y, v_t = sigma_y**2, sigma_t**2
        x, b = x_t.to(dtype), y.to(dtype)
        bound, certificate = None, 0.0
        if svd is None and isinstance(operator, KrylovOperator):
            solution = operator.solve(v_y, v_t, v_y * x, v_t * b, unit=v_y * v_t)
            bound = certificate = float(solution.bound.max())
            exact, found = solution.x, solution.x.float()
        else:
            if isinstance(operator, KrylovOperator):
                bound = float(operator.solve(v_y, v_t, v_y * x_t, v_t * y, unit=v_y * v_t).bound.max())
            found = operator.gram_solve(v_y, v_t, v_y * x_t, v_t * y, unit=v_y * v_t)
            if svd is None:
                exact = operator.gram_solve(v_y, v_t, v_y * x, v_t * b, unit=v_y * v_t)
                rho = (x - exact) / v_t + operator.adjoint(b - operator(exact)) / v_y
                certificate = sigma_t * float(rho.flatten(1).norm(dim=1).max()) / n**0.5
            else:
                # of the first sample; the others are not looked at
                exact = found.to(dtype).clone()
                exact[:1] = _by_svd(svd, x[:1], b[:1], sigma_t, sigma_y)
        e = found.to(dtype) - exact
        parts = (e / sigma_t).flatten(1).square().sum(1) + (operator(e) / sigma_y).flatten(1).square().sum(1)
        error = float((parts / n).sqrt().max()) + certificate
        rows.append(PivotError(sigma_y, sigma_t, error, bound, svd is not None or bound is None))
    return rows


def _by_svd(svd: tuple[Tensor, Tensor, Tensor], x_t: Tensor, y: Tensor, sigma_t: float, sigma_y: float) -> Tensor:
    """The pivot of one sample in float64, combined per singular vector."""
    u, s, vt = svd
    full = torch.zeros(vt.shape[0], dtype=torch.float64)
    full[: s.numel()] = s
    c = sigma_y**2 * (vt @ x_t.double().flatten())
    c[: s.numel()] += sigma_t**2 * s * (u.T @ y.double().flatten())[: s.numel()]
    return (vt.T @ (c / (sigma_y**2 + sigma_t**2 * full**2))).reshape(x_t.shape).to(x_t)


# -- cost -------------------------------------------------------------------------------------------------------------


def _milliseconds(function: Callable[[], object], budget: float = 0.15) -> float:
    """Median of up to 20 calls after one to warm up, stopped after ``budget`` seconds."""
    function()
    spent: list[float] = []
    while len(spent) < 20 and (not spent or sum(spent) < budget):
        began = time.perf_counter()
        function()
        spent.append(time.perf_counter() - began)
    return 1e3 * statistics.median(spent)


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that were made under it and are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {self._key(t) for t in tree_leaves((args, kwargs)) if self._counts(t)}
        result = func(*args, **(kwargs or {}))
        self.alive = {k: (ref, size) for k, (ref, size) in self.alive.items() if not ref.expired()}
        for t in tree_leaves(result):
            if self._counts(t) and self._key(t) not in given | self.alive.keys():
                storage = t.untyped_storage()
                self.alive[self._key(t)] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result

    @staticmethod
    def _counts(t: object) -> bool:
        """Sparse tensors have no storage of their own; what they are made of is counted."""
        return isinstance(t, Tensor) and t.layout == torch.strided

    @staticmethod
    def _key(t: Tensor) -> int:
        return int(t.untyped_storage()._cdata)


def peak_memory(function: Callable[[], object]) -> float:
    """MiB of the tensors that a call keeps at most at one time beside those it is given, what it returns included; not
    what a single operation of PyTorch, or numpy, takes for itself."""
    with _LiveTensors() as live:
        function()
    return live.peak / 2**20
