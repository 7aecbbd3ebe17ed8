r"""Priors whose posteriors are known: denoisers without network error, and oracles for every test.

For a mixture ``p(x_0) = sum_k w_k N(m_k, C_k)`` and a pivot ``mu = x_0 + N(0, S)``,

    E[x_0 | mu] = sum_k r_k (m_k + C_k (C_k + S)^-1 (mu - m_k)),     r_k ~ w_k N(mu; m_k, C_k + S),

and the posterior given ``y = A x_0 + sigma_y noise`` is again a mixture. Everything is dense: signals of up to a few
hundred entries. Keep the parameters in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from posteriori.denoise import Denoiser, Posterior
from posteriori.operators.base import LinearOperator, Scalar
from posteriori.pivot import noise_variance, pivot
from posteriori.schedule import VE, Schedule

__all__ = ["Gaussian", "GaussianMixture", "dense_matrix"]


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
        return torch.logsumexp(self._log_joint(x.flatten(1), self.covs.unsqueeze(0))[0], 1)

    def responsibilities(self, x: Tensor) -> Tensor:
        """Probability of every component given ``x`` ``(n, *shape)``, shape ``(n, K)``."""
        return torch.softmax(self._log_joint(x.flatten(1), self.covs.unsqueeze(0))[0], 1)

    def _log_joint(self, x: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``log w_k N(x; m_k, total_k)``, with the whitened differences and the Cholesky factors.

        ``x`` is ``(n, d)``, ``total`` ``(1 or n, K, d, d)``.
        """
        factor = torch.linalg.cholesky(total)
        difference = x[:, None, :] - self.means  # (n, K, d)
        if factor.shape[0] == 1:
            white = torch.linalg.solve_triangular(factor[0], difference.permute(1, 2, 0), upper=False).permute(2, 0, 1)
        else:
            white = torch.linalg.solve_triangular(factor, difference.unsqueeze(3), upper=False).squeeze(3)
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        d = x.shape[1]
        log_density = -0.5 * white.square().sum(-1) - log_det - 0.5 * d * math.log(2 * math.pi)
        return log_density + self.weights.log(), white, factor

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
        mu = solved_for.flatten(1)
        matrix = dense_matrix(A, self.shape, x_t.shape[0], mu)
        lam, v = torch.linalg.eigh(matrix.mT @ matrix)  # (1 or B, d), (1 or B, d, d)
        varies = any(torch.as_tensor(s).numel() > 1 for s in scales.values())
        rows = x_t.shape[0] if varies else lam.shape[0]
        reference = mu if rows > 1 else mu[:1]
        variance = noise_variance(A, reference, **scales)(lam.clamp_min(0).expand(rows, -1))
        noise = (v * variance.unsqueeze(1)) @ v.mT
        log_joint, white, factor = self._log_joint(mu, self.covs + noise.unsqueeze(1))
        r = torch.softmax(log_joint, 1)
        # C (C + S)^-1 (mu - m) = C L^-T white
        if factor.shape[0] == 1:
            solved = torch.linalg.solve_triangular(factor[0].mT, white.permute(1, 2, 0), upper=True)
            solved = (self.covs @ solved).permute(2, 0, 1)
        else:
            solved = torch.linalg.solve_triangular(factor.mT, white.unsqueeze(3), upper=True)
            solved = (self.covs @ solved).squeeze(3)
        mean = torch.einsum("nk,nkd->nd", r, self.means + solved)
        return Posterior(mean.reshape(x_t.shape).to(x_t.dtype), x_t, alpha, sigma, pivot=solved_for)

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
        cross = self.covs @ matrix.T  # (K, d, m)
        eye = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
        total = matrix @ cross + float(sigma_y) ** 2 * eye
        factor = torch.linalg.cholesky(total)
        difference = observation - self.means @ matrix.T  # (K, m)
        white = torch.linalg.solve_triangular(factor, difference.unsqueeze(2), upper=False)
        half = torch.linalg.solve_triangular(factor, cross.mT, upper=False)  # L^-1 A C
        means = self.means + (half.mT @ white).squeeze(2)
        covs = self.covs - half.mT @ half
        log_det = factor.diagonal(dim1=1, dim2=2).log().sum(1)
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
