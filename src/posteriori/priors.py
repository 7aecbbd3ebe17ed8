r"""Priors whose posteriors are known: denoisers without network error, and oracles for every test.

For a mixture ``p(x_0) = sum_k w_k N(m_k, C_k)`` and a pivot ``mu = x_0 + N(0, S)``,

    E[x_0 | mu] = sum_k r_k (m_k + C_k (C_k + S)^-1 (mu - m_k)),     r_k ~ w_k N(mu; m_k, C_k + S),

and the posterior given ``y = A x_0 + sigma_y noise`` is again a mixture. Everything is dense: signals of up to a few
hundred entries. Keep the parameters in float64.

No matrix is factored again when the noise changes. Of all pairs that have the pivot ``mu`` at ``q = sigma_t/alpha_t``,
take the one with the measurement ``y``: ``u = mu + (q^2/sigma_y^2) A^T (A mu - y)`` (no more than ``x_t/alpha_t``, had
the pivot been solved for exactly). With ``N(m'_k, C'_k)``, ``w'_k`` the posterior given ``y`` and
``C'_k = V_k diag(v_k) V_k^T``, which is kept for the last few ``(A, sigma_y)``,

    E[x_0 | mu] = sum_k r_k (m'_k + V_k diag(v_k/(v_k + q^2)) V_k^T (u - m'_k)),   r_k ~ w'_k N(u; m'_k, C'_k + q^2 I).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from posteriori.denoise import Denoiser, Posterior
from posteriori.operators.base import LinearOperator, Scalar
from posteriori.operators.diagonal import Nothing
from posteriori.pivot import pivot
from posteriori.schedule import VE, Schedule

__all__ = ["Gaussian", "GaussianMixture", "dense_matrix"]

MEMORY = 4  # pairs (A, sigma_y) kept by a prior
ENTRIES = 2**22  # samples x components x entries evaluated at once
NEGLIGIBLE = 1e-18  # responsibility


def dense_matrix(A: LinearOperator, shape: Sequence[int], batch: int, like: Tensor) -> Tensor:
    """The matrix of an operator, column by column: ``(1 or batch, m, n)``, one per sample only where they differ."""
    n = math.prod(shape)
    if A.samples(1 + len(shape)) is None:
        eye = torch.eye(n, dtype=like.dtype, device=like.device)
        return A(eye.reshape(n, *shape)).flatten(1).T.unsqueeze(0)
    columns = []
    for j in range(n):
        e = torch.zeros(batch, n, dtype=like.dtype, device=like.device)
        e[:, j] = 1
        columns.append(A(e.reshape(batch, *shape)).flatten(1))
    return torch.stack(columns, 2)


@dataclass(frozen=True)
class _Measured:
    """A mixture given ``(A, sigma_y)``, whatever the noise level and ``y``; ``G`` is 1, or the number of samples.

    Attributes:
        A: held, so that no other operator gets its identity.
        matrix: ``M = A/sigma_y``, ``(G, m, d)``.
        variances, axes: ``C'_k = V diag(v) V^T``, ``(G, K, d)`` and ``(G, K, d, d)``.
        centre: ``V^T m_k``, ``(G, K, d)``.
        half, factor: ``L^-1 M C_k V`` ``(G, K, m, d)`` and ``L`` ``(G, K, m, m)``, ``L L^T = M C_k M^T + I``.
        log_weights: ``log w_k - log det L``, ``(G, K)``.
    """

    A: LinearOperator
    matrix: Tensor
    variances: Tensor
    axes: Tensor
    centre: Tensor
    half: Tensor
    factor: Tensor
    log_weights: Tensor

    def part(self, part: slice) -> _Measured:
        """That of some samples."""
        return _Measured(self.A, *[_part(getattr(self, f.name), part) for f in fields(self)[1:]])


def _part(values: Tensor, part: slice) -> Tensor:
    """Rows of per-sample values; one row stands for all."""
    return values if len(values) == 1 else values[part]


def _rotate(x: Tensor, axes: Tensor) -> Tensor:
    """``V_k^T x`` for ``x`` ``(n, d)`` and ``V`` ``(G, K, d, d)``: ``(n, K, d)``; one product when ``G = 1``."""
    k, d = axes.shape[1:3]
    if axes.shape[0] == 1:
        return (x @ axes[0].permute(1, 0, 2).reshape(d, k * d)).reshape(-1, k, d)
    return (x[:, None, None] @ axes).squeeze(2)


def _rotate_back(c: Tensor, axes: Tensor) -> Tensor:
    """``sum_k V_k c_k`` for ``c`` ``(n, K, d)``: ``(n, d)``."""
    k, d = axes.shape[1:3]
    if axes.shape[0] == 1:
        return c.reshape(-1, k * d) @ axes[0].mT.reshape(k * d, d)
    return (axes @ c[..., None]).sum(1).squeeze(2)


class GaussianMixture(Denoiser):
    """``p(x_0) = sum_k w_k N(m_k, C_k)``.

    Args:
        weights: ``(K,)``, non-negative, normalised to sum to 1.
        means: ``(K, d)``.
        covs: ``(K, d, d)``, symmetric positive semi-definite; or ``(K,)`` variances of isotropic components.
        schedule: interpolant it denoises on; VE when left out.
        shape: shape of a signal when it is not ``(d,)``.

    Raises:
        ValueError: when shapes do not agree, a weight is negative, or a covariance has a negative eigenvalue.
    """

    weights: Tensor
    means: Tensor
    covs: Tensor

    warm = True

    def __init__(
        self,
        weights: Tensor,
        means: Tensor,
        covs: Tensor,
        schedule: Schedule | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        weights, means, covs = torch.as_tensor(weights), torch.as_tensor(means), torch.as_tensor(covs)
        if means.ndim != 2 or weights.shape != means.shape[:1]:
            raise ValueError(f"need weights (K,) and means (K, d), got {tuple(weights.shape)}, {tuple(means.shape)}")
        k, d = means.shape
        if covs.shape == (k,):
            covs = covs.reshape(k, 1, 1) * torch.eye(d, dtype=means.dtype, device=means.device)
        if covs.shape != (k, d, d):
            raise ValueError(f"need covs of shape {(k, d, d)} or {(k,)}, got {tuple(covs.shape)}")
        if bool((weights < 0).any()) or float(weights.sum()) <= 0:
            raise ValueError("weights must be non-negative with a positive sum")
        smallest = float(torch.linalg.eigvalsh(covs.double()).min())
        if smallest < -1e-8 * float(covs.abs().max()):
            raise ValueError(f"a covariance has the negative eigenvalue {smallest:.1e}")
        self.shape = tuple(shape) if shape is not None else (d,)
        if math.prod(self.shape) != d:
            raise ValueError(f"signals of shape {self.shape} do not have {d} entries")
        self.schedule = schedule or VE()
        self.register_buffer("weights", weights / weights.sum())
        self.register_buffer("means", means)
        self.register_buffer("covs", covs)
        squares = means.square().sum(1) + covs.diagonal(dim1=1, dim2=2).sum(1)  # E |x_0|^2 of every component
        self.data_std = float((self.weights.to(squares) * squares).sum() / d) ** 0.5
        self._memory: dict[tuple[object, ...], _Measured] = {}

    @property
    def mean(self) -> Tensor:
        """Mean of the mixture, ``(d,)``."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        """Covariance of the mixture, ``(d, d)``."""
        centred = self.means - self.mean
        return torch.einsum("k,kij->ij", self.weights, self.covs) + (centred.T * self.weights) @ centred

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` exact samples, ``(n, *shape)``."""
        d = self.means.shape[1]
        pick = torch.multinomial(self.weights.cpu(), n, replacement=True, generator=generator).to(self.means.device)
        z = torch.randn(n, d, generator=generator, dtype=self.means.dtype).to(self.means.device)
        lam, v = torch.linalg.eigh(self.covs)  # roots by eigh: covariances may be singular
        root = v * lam.clamp_min(0).sqrt().unsqueeze(1)
        x = self.means[pick].clone()
        for k in range(len(self.weights)):  # per component: gathering (n, d, d) roots would not fit
            rows = pick == k
            x[rows] += z[rows] @ root[k].T
        return x.reshape(n, *self.shape)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density of ``x`` ``(n, *shape)``, shape ``(n,)``; covariances must be positive definite."""
        return torch.logsumexp(self._log_joint(x.flatten(1)), 1)

    def responsibilities(self, x: Tensor) -> Tensor:
        """Probability of every component given ``x`` ``(n, *shape)``, shape ``(n, K)``."""
        return torch.softmax(self._log_joint(x.flatten(1)), 1)

    def _log_joint(self, x: Tensor) -> Tensor:
        """``log w_k N(x; m_k, C_k)`` of ``x`` ``(n, d)``, shape ``(n, K)``."""
        factor = torch.linalg.cholesky(self.covs)
        difference = (x[:, None, :] - self.means).permute(1, 2, 0)
        white = torch.linalg.solve_triangular(factor, difference, upper=False)
        log_det = factor.diagonal(dim1=1, dim2=2).log().sum(1)
        constant = self.weights.log() - log_det - 0.5 * x.shape[1] * math.log(2 * math.pi)
        return constant - 0.5 * white.square().sum(1).T

    def _measured(self, A: LinearOperator, sigma_y: Tensor, batch: int) -> _Measured:
        """What does not depend on the noise level, from the memory of the last few ``(A, sigma_y)``."""
        levels = tuple(sigma_y.tolist())
        kind: object = "nothing" if isinstance(A, Nothing) else id(A)
        key = (kind, levels, self.means.device, self.means.dtype, batch if A.samples(1 + len(self.shape)) else None)
        if key not in self._memory:
            with torch.no_grad(), torch.inference_mode(False):
                matrix = dense_matrix(A, self.shape, batch, self.means) / sigma_y[:, None, None]
                half, log_det, factor = self._update(matrix, 1.0)
                v, axes = torch.linalg.eigh(self.covs - half.mT @ half)
                centre = (axes.mT @ self.means[..., None]).squeeze(-1)
                log_weights = self.weights.log() - log_det
                self._memory[key] = _Measured(A, matrix, v.clamp_min(0), axes, centre, half @ axes, factor, log_weights)
            while len(self._memory) > MEMORY:
                self._memory.pop(next(iter(self._memory)))
        return self._memory[key]

    def _update(self, matrix: Tensor, variance: float) -> tuple[Tensor, Tensor, Tensor]:
        """``L^-1 A C_k`` and ``log det L`` with ``L L^T = A C_k A^T + variance I``, and ``L``; ``A`` is ``(G, m, d)``.

        Component ``k`` has the covariance ``C_k - half^T half`` given the measurement."""
        cross = self.covs @ matrix.unsqueeze(-3).mT  # (G, K, d, m)
        eye = torch.eye(matrix.shape[-2], dtype=matrix.dtype, device=matrix.device)
        factor = torch.linalg.cholesky(matrix.unsqueeze(-3) @ cross + variance * eye)
        half = torch.linalg.solve_triangular(factor, cross.mT, upper=False)
        return half, factor.diagonal(dim1=-2, dim2=-1).log().sum(-1), factor

    def forward(
        self,
        x_t: Tensor,
        t: Scalar,
        A: LinearOperator,
        y: Tensor,
        sigma_y: Scalar,
        previous: Posterior | None = None,
    ) -> Posterior:
        alpha, sigma = self.scales(x_t, t)
        if bool((torch.as_tensor(sigma_y) <= 0).any()):
            raise ValueError("exact priors denoise with a positive sigma_y; use .posterior for sigma_y = 0")
        scales = {"alpha_t": alpha.reshape(-1), "sigma_t": sigma.reshape(-1), "sigma_y": sigma_y}
        near = previous.pivot_at((sigma / alpha).reshape(-1)) if previous else None
        solved_for = pivot(x_t, y, A, **scales, guess=near)
        level = torch.as_tensor(sigma_y, dtype=torch.float64).to(self.means).reshape(-1)
        given = self._measured(A, level, x_t.shape[0])
        mu, white_y = solved_for.flatten(1).to(self.means), y.flatten(1).to(self.means) / level[:, None]
        variance = (sigma / alpha).reshape(-1, 1).to(mu) ** 2  # q^2, (1 or B, 1)
        surprise = (given.matrix @ mu[..., None]).squeeze(-1) - white_y
        u = mu + variance * (surprise[:, None] @ given.matrix).squeeze(1)
        if bool((white_y == white_y[:1]).all()):
            white_y = white_y[:1]  # many samples of one measurement: its posterior is computed once
        rows = max(1, ENTRIES // self.means.numel())
        parts = [slice(i, i + rows) for i in range(0, len(u), rows)]
        mean = torch.cat([self._mean(u[p], _part(white_y, p), _part(variance, p), given.part(p)) for p in parts])
        return Posterior(mean.reshape(x_t.shape).to(x_t.dtype), x_t, alpha, sigma, pivot=solved_for)

    def _mean(self, u: Tensor, white_y: Tensor, variance: Tensor, given: _Measured) -> Tensor:
        """``E[x_0 | u, y]`` by the formula of the module's head; ``white_y`` is ``y/sigma_y``, ``variance`` ``q^2``."""
        difference = white_y[:, None] - self.means @ given.matrix.mT  # (1 or n, K, m)
        if given.factor.shape[0] == 1:  # solve for all measurements at once
            white = torch.linalg.solve_triangular(given.factor[0], difference.permute(1, 2, 0), upper=False)
            shift = (given.half[0].mT @ white).permute(2, 0, 1)
            white = white.permute(2, 0, 1)
        else:
            white = torch.linalg.solve_triangular(given.factor, difference[..., None], upper=False).squeeze(-1)
            shift = (given.half.mT @ white[..., None]).squeeze(-1)
        centre = given.centre + shift  # V^T m'
        c = _rotate(u, given.axes) - centre
        total = given.variances + variance[:, None]  # of C'_k + q^2 I
        log_joint = given.log_weights - 0.5 * (white.square().sum(2) + (c.square() / total + total.log()).sum(2))
        r = torch.softmax(log_joint, 1)
        near = ~(r <= NEGLIGIBLE).all(0)  # most components are out of the question when the noise is small; NaN is not
        answer = (centre + given.variances / total * c)[:, near]
        return _rotate_back(r[:, near, None] * answer, given.axes[:, near])

    def posterior(self, A: LinearOperator, y: Tensor, sigma_y: float) -> GaussianMixture:
        """``p(x_0 | y)`` of one measurement, exactly.

        Args:
            A: the operator.
            y: ``(1, *measurement)`` (or without the leading dimension).
            sigma_y: noise standard deviation; 0 is allowed when the measured part has a non-singular covariance.

        Raises:
            ValueError: on several measurements at once.
        """
        matrix = dense_matrix(A, self.shape, 1, self.means)[0]
        observation = torch.as_tensor(y).to(self.means).reshape(-1)
        if observation.numel() != matrix.shape[0]:
            raise ValueError(
                f"y has {observation.numel()} entries, one measurement has {matrix.shape[0]}: "
                "ask for one posterior at a time"
            )
        seen = matrix.abs().sum(1) > 0  # filler entries of a masked measurement say nothing
        matrix, observation = matrix[seen], observation[seen]
        half, log_det, factor = self._update(matrix, float(sigma_y) ** 2)  # L^-1 A C
        difference = observation - self.means @ matrix.T  # (K, m)
        white = torch.linalg.solve_triangular(factor, difference.unsqueeze(2), upper=False)
        means = self.means + (half.mT @ white).squeeze(2)
        covs = self.covs - half.mT @ half
        log_weights = self.weights.log() - 0.5 * white.square().sum((1, 2)) - log_det
        covs = 0.5 * (covs + covs.mT)
        return GaussianMixture(torch.softmax(log_weights, 0), means, covs, self.schedule, self.shape)


class Gaussian(GaussianMixture):
    """``p(x_0) = N(mean, cov)``.

    Args:
        mean: ``(d,)``.
        cov: ``(d, d)``.
        schedule, shape: as for :class:`GaussianMixture`.
    """

    def __init__(
        self, mean: Tensor, cov: Tensor, schedule: Schedule | None = None, shape: Sequence[int] | None = None
    ) -> None:
        mean = torch.as_tensor(mean)
        one = torch.ones(1, dtype=mean.dtype, device=mean.device)
        super().__init__(one, mean.unsqueeze(0), torch.as_tensor(cov).unsqueeze(0), schedule, shape)
