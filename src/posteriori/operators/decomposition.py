r"""Small operators taken apart, once: dense linear algebra where iterations do not get there.

    f(A^T A) v = f(0) v + V (f(lam) - f(0)) V^T v,         A^T A = V diag(lam) V^T,     lam > 0

``V`` comes from the smaller of two matrices: from ``A^T A`` itself, or from ``A A^T = U diag(lam) U^T`` as
``V = A^T U diag(lam)^-1/2``. Where ``A`` does the same along the first dimensions of a signal (an image's channels),
the matrices are those of the last ``core`` dimensions alone. Eigenvalues below 1e-14 of the largest are rounding and
count as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posteriori.operators.base import SpectralFunction

__all__ = ["Decomposition", "decompose"]

_BATCH = 64  # vectors that are multiplied at once


@dataclass(frozen=True)
class Decomposition:
    """``A^T A`` on the last ``core`` dimensions of a signal.

    Attributes:
        vectors: ``V``, ``(S, n, r)`` with the samples of the operator (or 1) first, float64.
        lam: ``(S, r)``, ascending; 0 where a sample has fewer than ``r``.
    """

    vectors: Tensor
    lam: Tensor

    def apply(self, f: SpectralFunction, v: Tensor) -> Tensor:
        """``f(A^T A) v`` for ``(B, *signal)``; ``f`` as in :meth:`LinearOperator.spectral`."""
        flat, vectors = v.reshape(v.shape[0], -1, self.vectors.shape[1]).double(), self.vectors.to(v.device)
        at_zero, values = self._values(f, v)
        seen = ((flat @ vectors) * (values - at_zero)) @ vectors.mT
        return (at_zero * flat + seen).reshape(v.shape).to(v.dtype)

    def diagonal(self, f: SpectralFunction, like: Tensor) -> Tensor:
        """Diagonal of ``f(A^T A)``, broadcastable to ``like``."""
        at_zero, values = self._values(f, like)
        found = at_zero + (values - at_zero) @ (self.vectors.to(like.device) ** 2).mT  # (B, 1, n)
        sizes = like.shape[1:]
        while math.prod(sizes) > found.shape[-1]:
            sizes = sizes[1:]
        return found.reshape(-1, *[1] * (like.ndim - 1 - len(sizes)), *sizes).to(like.dtype)

    def _values(self, f: SpectralFunction, like: Tensor) -> tuple[Tensor, Tensor]:
        """``f(0)``, ``(B or 1, 1, 1)``, and ``f(lam)``, ``(B or 1, 1, r)``."""
        lam = self.lam.to(like.device).reshape(*self.lam.shape, *[1] * (like.ndim - 2))
        zero = lam.new_zeros(lam.shape[0], *[1] * (like.ndim - 1))
        at_zero, values = (f(u).flatten(1).unsqueeze(1) for u in (zero, lam))
        return at_zero, values

    def error(self, gram: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """How far ``V diag(lam) V^T v`` is from ``A^T A v``, over ``|A^T A| |v|``; ``(B,)``."""
        off = (self.apply(lambda lam: lam, v) - gram(v)).flatten(1).norm(dim=1)
        size = self.lam[:, -1].to(off) * v.flatten(1).norm(dim=1)
        return off / size.clamp_min(torch.finfo(off.dtype).tiny)

    def largest(self, like: Tensor) -> Tensor:
        """Largest eigenvalue of every sample, broadcastable to ``like``."""
        return self.lam[:, -1].to(like).reshape(-1, *[1] * (like.ndim - 1))


def decompose(
    forward: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    signal: Sequence[int],
    measurement: Sequence[int],
    core: int,
    *,
    samples: int,
    like: Tensor,
) -> Decomposition:
    """Take an operator apart.

    Args:
        forward, adjoint: ``A`` and ``A^T``.
        signal, measurement: shapes without the batch.
        core: number of the signal's last dimensions that ``A`` mixes.
        samples: batch size that the operator's parameters are for, or 1.
        like: gives device and precision of what ``forward`` takes.
    """
    lead, n = tuple(signal[: len(signal) - core]), math.prod(signal[len(signal) - core :])
    m = rows(signal, measurement, core)
    short = m is not None and m < n

    def gram(v: Tensor) -> Tensor:
        return forward(adjoint(v)) if short else adjoint(forward(v))

    shape, k = (measurement, m) if short else (signal, n)
    assert k is not None
    columns = [_along_first(gram, shape, lead, samples, part, like) for part in _units(k, like)]
    matrix = torch.cat(columns, 1).double()
    lam, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    kept = lam > 1e-14 * lam[:, -1:]
    if short:
        back = [_along_first(adjoint, shape, lead, samples, part, like) for part in vectors.mT.split(_BATCH, 1)]
        vectors = torch.cat(back, 1).double().mT / lam.clamp_min(torch.finfo(lam.dtype).tiny).sqrt()[:, None]
    most = int(kept.sum(1).max())  # eigh sorts: the rest is 0 for every sample
    lam, kept = lam[:, -most:], kept[:, -most:]
    return Decomposition((vectors[..., -most:] * kept[:, None]).contiguous(), torch.where(kept, lam, 0))


def rows(signal: Sequence[int], measurement: Sequence[int], core: int) -> int | None:
    """Entries of a measurement of the last ``core`` dimensions, where those before them are laid out alike."""
    lead = len(signal) - core
    fits = len(measurement) > lead and tuple(measurement[:lead]) == tuple(signal[:lead])
    return math.prod(measurement[lead:]) if fits else None


def _units(k: int, like: Tensor) -> list[Tensor]:
    eye = torch.eye(k, dtype=like.dtype, device=like.device).unsqueeze(0)
    return list(eye.split(_BATCH, 1))


def _along_first(
    function: Callable[[Tensor], Tensor], shape: Sequence[int], lead: tuple[int, ...], samples: int, v: Tensor,
    like: Tensor,
) -> Tensor:  # fmt: skip
    """``function`` of vectors ``(S or 1, count, k)`` of each sample's core, ``(S, count, k')``; the vectors are put at
    the first place of the leading dimensions, of signals that are 0 elsewhere."""
    first: tuple[Any, ...] = (slice(None), *(0,) * len(lead))
    v = v.to(like).expand(samples, -1, -1)
    groups = [v.squeeze(0)] if samples == 1 else list(v.unbind(1))  # one vector at a time for operators tied to a batch
    found = []
    for group in groups:
        x = group.new_zeros(group.shape[0], *shape)
        x[first] = group.reshape(-1, *shape[len(lead) :])
        found.append(function(x)[first].flatten(1))
    return found[0].unsqueeze(0) if samples == 1 else torch.stack(found, 1)
