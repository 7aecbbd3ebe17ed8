r"""The Lanczos process. With an orthonormal basis ``V_k`` of ``span{v, A^T A v, ..., (A^T A)^{k-1} v}`` and
``T_k = V_k^T A^T A V_k``,

    f(A^T A) v ~ |v| V_k f(T_k) e_1,        v^T f(A^T A) v ~ |v|^2 e_1^T f(T_k) e_1        (Gauss quadrature)

``k`` grows until the result stops changing. The error is estimated from the last two changes, over a quarter of the
dimension each, as the rest of the geometric series they start. It is an estimate, where that of a solve is a bound.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from posteriori.operators.base import SpectralFunction

__all__ = ["Lanczos"]


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
