"""The pivot and its relatives against dense float64 formulas and Monte Carlo."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import posteriori as po
from posteriori.operators import (
    Blur,
    CircularConvolution,
    Downsampling,
    GaussianBlur,
    Identity,
    Inpainting,
    LinearOperator,
    Matrix,
    Nothing,
    Weighting,
)
from posteriori.pivot import noise_variance, sample_generator
from posteriori.schedule import VE, VP, CosineVP, RectifiedFlow, Schedule

F64 = torch.float64
SHAPE = (1, 4, 6)
N = math.prod(SHAPE)
BATCH = 6  # equal to the width: a scalar per sample could broadcast along it


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64)


def masks(seed: int = 0) -> Tensor:
    return (torch.rand(BATCH, 1, 4, 6, generator=torch.Generator().manual_seed(seed)) > 0.5).double()


OPERATORS: dict[str, Callable[[], LinearOperator]] = {
    "mask": lambda: Inpainting(masks()[0, 0]),
    "mask per sample": lambda: Inpainting(masks()),
    "blur": lambda: GaussianBlur(0.6),
    "circular": lambda: CircularConvolution(randn(3, 2, seed=3)),
    "box": lambda: Downsampling(2),
    "bicubic": lambda: Downsampling(2, "bicubic"),
    "matrix": lambda: Matrix(randn(9, N, seed=4) / 3, SHAPE),
    "nothing": Nothing,
    "identity": Identity,
}
each_operator = pytest.mark.parametrize("name", OPERATORS)
each_schedule = pytest.mark.parametrize(
    "schedule", [VE(), VP(), CosineVP(), RectifiedFlow()], ids=lambda s: type(s).__name__
)


def dense(A: LinearOperator, shape: tuple[int, ...] = SHAPE, batch: int = BATCH) -> Tensor:
    columns = []
    for j in range(math.prod(shape)):
        e = torch.zeros(batch, math.prod(shape), dtype=F64)
        e[:, j] = 1
        columns.append(A(e.reshape(batch, *shape)).flatten(1))
    return torch.stack(columns, 2)


def column(v: Tensor) -> Tensor:
    return v.flatten(1).unsqueeze(2)


def per_matrix(v: float | Tensor) -> Tensor:
    return torch.as_tensor(v, dtype=F64).reshape(-1, 1, 1)


def dense_estimate(
    M: Tensor,
    x_t: Tensor,
    y: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    sigma_y: Tensor,
    s: float = math.inf,
    m: float = 0.0,
) -> Tensor:
    """The formula of the paper with the precision of a Gaussian prior added, term by term."""
    precision = per_matrix(alpha) ** 2 / per_matrix(sigma) ** 2 + 1 / s**2
    system = precision * torch.eye(M.shape[2], dtype=F64) + M.mT @ M / per_matrix(sigma_y) ** 2
    rhs = (
        per_matrix(alpha) / per_matrix(sigma) ** 2 * column(x_t)
        + M.mT @ column(y) / per_matrix(sigma_y) ** 2
        + m / s**2
    )
    return torch.linalg.solve(system, rhs).reshape(x_t.shape)


def setting(name: str) -> tuple[LinearOperator, Tensor, Tensor]:
    A = OPERATORS[name]()
    x_t = randn(BATCH, *SHAPE, seed=1)
    y = randn(*A(x_t).shape, seed=2)
    observed = A.observed(y)
    return A, x_t, y if observed is None else y * observed


def scales_of(schedule: Schedule) -> tuple[Tensor, Tensor]:
    """A different time for every sample, from the smallest to the largest."""
    q = schedule.ratio(torch.tensor([schedule.t_min, schedule.t_max], dtype=F64)).log()
    t = schedule.time(torch.linspace(float(q[0]), float(q[1]), BATCH, dtype=F64).exp())
    return schedule.alpha(t), schedule.sigma(t)


SIGMA_Y = torch.tensor([0.5, 0.01, 0.2, 0.05, 0.1, 1.0], dtype=F64)


@each_schedule
@each_operator
def test_pivot(name: str, schedule: Schedule) -> None:
    """Not the theorem's mu*: every sample would be drawn from another distribution (relative error 1e-8)."""
    A, x_t, y = setting(name)
    alpha, sigma = scales_of(schedule)
    x_t = x_t * sigma.reshape(-1, 1, 1, 1)
    expected = dense_estimate(dense(A), x_t, y, alpha, sigma, SIGMA_Y)
    mu = po.pivot(x_t, y, A, alpha_t=alpha, sigma_t=sigma, sigma_y=SIGMA_Y)
    torch.testing.assert_close(mu, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))
    for i in (0, BATCH - 1):  # numbers instead of a value per sample
        mu = po.pivot(x_t, y, A, alpha_t=float(alpha[i]), sigma_t=float(sigma[i]), sigma_y=float(SIGMA_Y[i]))
        torch.testing.assert_close(mu[i], expected[i], rtol=1e-8, atol=1e-8 * float(expected.abs().max()))


@each_schedule
@each_operator
def test_linear_estimate(name: str, schedule: Schedule) -> None:
    """Not the conditional mean under N(m, s^2 I): the network's skip and its second input (relative error 1e-9)."""
    A, x_t, y = setting(name)
    alpha, sigma = scales_of(schedule)
    x_t = x_t * sigma.reshape(-1, 1, 1, 1)
    expected = dense_estimate(dense(A), x_t, y, alpha, sigma, SIGMA_Y, s=0.5, m=0.3)
    estimate = po.linear_estimate(
        x_t, y, A, alpha_t=alpha, sigma_t=sigma, sigma_y=SIGMA_Y, prior_std=0.5, prior_mean=0.3
    )
    torch.testing.assert_close(estimate, expected, rtol=1e-9, atol=1e-9)


@each_operator
def test_linear_estimate_without_signal(name: str) -> None:
    """A flow at t = 1: x_t says nothing, the estimate from y alone exists and the pivot does not (1e-9)."""
    A, x_t, y = setting(name)
    zero, one = torch.zeros(BATCH, dtype=F64), torch.ones(BATCH, dtype=F64)
    expected = dense_estimate(dense(A), 0 * x_t, y, zero, one, SIGMA_Y, s=0.7, m=-0.2)
    estimate = po.linear_estimate(x_t, y, A, alpha_t=0.0, sigma_t=1.0, sigma_y=SIGMA_Y, prior_std=0.7, prior_mean=-0.2)
    torch.testing.assert_close(estimate, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="does not exist at alpha_t = 0"):
        po.pivot(x_t, y, A, alpha_t=0.0, sigma_t=1.0, sigma_y=0.1)


def test_prior_per_sample() -> None:
    """A prior mean or width for every sample would broadcast along the width of the image (1e-9)."""
    A, x_t, y = setting("bicubic")
    s, m = torch.linspace(0.2, 2, BATCH, dtype=F64), torch.linspace(-1, 1, BATCH, dtype=F64)
    estimate = po.linear_estimate(x_t, y, A, alpha_t=0.8, sigma_t=0.6, sigma_y=0.1, prior_std=s, prior_mean=m)
    M = dense(A)
    for i in range(BATCH):
        k = slice(i, i + 1)
        expected = dense_estimate(
            M[k], x_t[k], y[k], per_matrix(0.8), per_matrix(0.6), per_matrix(0.1), float(s[i]), float(m[i])
        )
        torch.testing.assert_close(estimate[k], expected, rtol=1e-9, atol=1e-9)


@each_operator
def test_noiseless_limit(name: str) -> None:
    """sigma_y = 0 is neither the closed form (1e-9) nor the limit of small sigma_y (1e-5 at 1e-5)."""
    A, x_t, _ = setting(name)
    y = A(randn(BATCH, *SHAPE, seed=7))
    M = dense(A).numpy()
    inverse = torch.from_numpy(np.linalg.pinv(M, rcond=1e-9))
    hidden = torch.eye(N, dtype=F64) - inverse @ torch.from_numpy(M)
    alpha, sigma, s, m = 0.8, 1.5, 0.5, 0.3
    scales = {"alpha_t": alpha, "sigma_t": sigma}
    mu = po.pivot(x_t, y, A, **scales, sigma_y=0.0)
    expected = (inverse @ column(y) + hidden @ column(x_t) / alpha).reshape(x_t.shape)
    torch.testing.assert_close(mu, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(po.pivot(x_t, y, A, **scales, sigma_y=1e-5), mu, rtol=0, atol=1e-5)
    x_lin = po.linear_estimate(x_t, y, A, **scales, sigma_y=0.0, prior_std=s, prior_mean=m)
    combined = (alpha * s**2 * column(x_t) + sigma**2 * m) / (alpha**2 * s**2 + sigma**2)
    expected = (inverse @ column(y) + hidden @ combined).reshape(x_t.shape)
    torch.testing.assert_close(x_lin, expected, rtol=1e-9, atol=1e-9)
    near = po.linear_estimate(x_t, y, A, **scales, sigma_y=1e-5, prior_std=s, prior_mean=m)
    torch.testing.assert_close(near, x_lin, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["mask per sample", "bicubic", "matrix"])
def test_noise_and_none_in_one_batch(name: str) -> None:
    """A noiseless sample would change its neighbours, or be treated as noisy (1e-12)."""
    A, x_t, y = setting(name)
    mixed = torch.tensor([0.1, 0.0, 0.3, 0.0, 0.0, 0.2], dtype=F64)
    for s in (math.inf, 0.5):
        arguments = {"alpha_t": 0.7, "sigma_t": 1.2, "prior_std": s}
        together = po.linear_estimate(x_t, y, A, **arguments, sigma_y=mixed)
        for i in range(BATCH):
            alone = po.linear_estimate(x_t, y, A, **arguments, sigma_y=float(mixed[i]))
            torch.testing.assert_close(together[i], alone[i], rtol=1e-12, atol=1e-12)


def test_no_limit_without_a_pseudo_inverse() -> None:
    """A noise-free solve of an ill-posed problem would return amplified rounding."""
    x = randn(2, 1, 12, 12)
    for A in (GaussianBlur(3.0), Blur(randn(3, 3).abs() + 1)):
        with pytest.raises(ValueError, match=r"pseudo-inverse.*positive sigma_y"):
            po.pivot(x, x, A, alpha_t=1.0, sigma_t=1.0, sigma_y=0.0)


@each_operator
def test_noise_variance(name: str) -> None:
    """Not the eigenvalues of Sigma*: preconditioning and pivot samples of another size, also at sigma_y = 0."""
    A, x_t, _ = setting(name)
    alpha, sigma = scales_of(VP())
    variance = noise_variance(A, x_t, alpha_t=alpha, sigma_t=sigma, sigma_y=SIGMA_Y)
    M = dense(A)
    v = randn(BATCH, *SHAPE, seed=8)
    system = (per_matrix(alpha) / per_matrix(sigma)) ** 2 * torch.eye(N, dtype=F64) + M.mT @ M / per_matrix(
        SIGMA_Y
    ) ** 2
    expected = torch.linalg.solve(system, column(v)).reshape(v.shape)
    torch.testing.assert_close(A.spectral(variance, v), expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))
    noiseless = noise_variance(A, x_t, alpha_t=0.5, sigma_t=1.0, sigma_y=0.0)
    torch.testing.assert_close(A.spectral(noiseless, v), 4 * A.null_projection(v), rtol=1e-9, atol=1e-9)


def test_pivot_has_its_covariance() -> None:
    """The two ways to a pivot (drawn directly, or through x_t and y) would differ, or not be x_0 + N(0, Sigma*).

    Monte Carlo over 40,000 draws in float64: every entry of the mean and covariance within 5 standard errors.
    """
    n, d = 40_000, 5
    M = randn(3, d, seed=11)
    A, x_0 = Matrix(M), randn(1, d, seed=12)
    alpha, sigma, sigma_y = 0.6, 0.8, 0.4
    covariance = torch.linalg.inv(alpha**2 / sigma**2 * torch.eye(d, dtype=F64) + M.T @ M / sigma_y**2)
    repeated = x_0.expand(n, d)
    torch.manual_seed(0)
    x_t = alpha * repeated + sigma * torch.randn(n, d, dtype=F64)
    y = po.measure(A, repeated, sigma_y)
    through = po.pivot(x_t, y, A, alpha_t=alpha, sigma_t=sigma, sigma_y=sigma_y)
    direct = po.sample_pivot(repeated, A, alpha_t=alpha, sigma_t=sigma, sigma_y=sigma_y)
    variances = covariance.diagonal()
    for draws in (through, direct):
        error = draws.mean(0) - x_0[0]
        assert bool((error.abs() <= 5 * (variances / n).sqrt()).all())
        spread = ((variances[:, None] * variances + covariance**2) / n).sqrt()
        assert bool(((draws.T.cov() - covariance).abs() <= 5 * spread).all())


def test_pivot_is_sufficient() -> None:
    """The theorem itself: under a Gaussian prior, conditioning on (x_t, y) and on the pivot must agree (1e-10)."""
    d, m = 6, 4
    M, root, mean = randn(m, d, seed=1), randn(d, d, seed=2), randn(d, seed=3)
    C = root @ root.T
    for alpha, sigma, sigma_y in [(1.0, 3.0, 0.1), (0.6, 0.8, 0.3), (0.05, 0.95, 1.0)]:
        x_t, y = randn(1, d, seed=4), randn(1, m, seed=5)
        H = torch.cat([alpha * torch.eye(d, dtype=F64), M])  # both measurements stacked
        R = torch.diag(torch.tensor([sigma**2] * d + [sigma_y**2] * m, dtype=F64))
        gain = C @ H.T @ torch.linalg.inv(H @ C @ H.T + R)
        expected = mean + gain @ (torch.cat([x_t[0], y[0]]) - H @ mean)
        covariance = C - gain @ H @ C
        mu = po.pivot(x_t, y, Matrix(M), alpha_t=alpha, sigma_t=sigma, sigma_y=sigma_y)[0]
        S = torch.linalg.inv(alpha**2 / sigma**2 * torch.eye(d, dtype=F64) + M.T @ M / sigma_y**2)
        gain = C @ torch.linalg.inv(C + S)
        torch.testing.assert_close(mean + gain @ (mu - mean), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(C - gain @ C, covariance, rtol=1e-10, atol=1e-10)


def test_measurements_can_be_repeated() -> None:
    """The same seed would give another measurement, or one that depends on the batch."""
    A, x_0 = Downsampling(2), randn(4, 2, 6, 8)
    y = po.measure(A, x_0, 0.1, seed=0)
    assert torch.equal(y, po.measure(A, x_0, 0.1, seed=0))
    torch.testing.assert_close(po.measure(A, x_0[:2], 0.1, seed=0), y[:2], rtol=0, atol=1e-14)
    assert not torch.equal(y, po.measure(A, x_0, 0.1, seed=1))
    noise = (y - A(x_0)).flatten(1)
    assert float(torch.corrcoef(noise).fill_diagonal_(0).abs().max()) < 5 / math.sqrt(noise.shape[1])
    torch.manual_seed(3)
    free = po.measure(A, x_0, 0.1)
    torch.manual_seed(3)
    assert torch.equal(free, po.measure(A, x_0, 0.1))


def test_measurement_noise_has_its_size() -> None:
    """sigma_y in other units, or one sample's sigma_y along another's columns (5 standard errors of 40,000 draws)."""
    x_0 = torch.zeros(8, 1, 200, 8, dtype=F64).repeat(1, 25, 1, 1)  # as many samples as columns
    sigma_y = torch.logspace(-3, 0, 8, dtype=F64)
    y = po.measure(Identity(), x_0, sigma_y, seed=0)
    n = y[0].numel()
    measured = y.flatten(1).square().mean(1).sqrt()
    assert bool(((measured / sigma_y - 1).abs() < 5 / math.sqrt(2 * n)).all())
    for i in range(8):
        columns = y[i].movedim(-1, 0).flatten(1).square().mean(1).sqrt() / sigma_y[i]
        assert bool(((columns - 1).abs() < 5 / math.sqrt(2 * n / 8)).all())
    assert torch.equal(po.measure(Identity(), x_0, 0.0, seed=0), x_0)


def test_what_is_not_measured_is_zero() -> None:
    """Noise in missing pixels would count as data."""
    mask = masks()[0, 0]
    y = po.measure(Inpainting(mask), randn(2, *SHAPE), 0.5, seed=0)
    assert float((y * (1 - mask)).abs().max()) == 0
    assert float((y * mask).abs().min(0).values.max()) > 0
    assert float(po.measure(Nothing(), randn(2, *SHAPE), 0.5, seed=0).abs().max()) == 0


def test_streams_of_different_samples_differ() -> None:
    """Two samples with the same noise would be taken for two draws."""
    drawn = [
        torch.randn(64, generator=sample_generator(*path), dtype=F64)
        for path in [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (-1, 0)]
    ]
    correlation = torch.corrcoef(torch.stack(drawn)).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 5 / 8
    assert torch.equal(drawn[3], torch.randn(64, generator=sample_generator(0, 1), dtype=F64))


def test_gradients() -> None:
    """Guidance that differentiates through the pivot would follow something else (finite differences)."""
    A = Weighting(torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=F64))
    x_t, y = randn(2, 4).requires_grad_(), randn(2, 4, seed=1).requires_grad_()
    sigma = torch.tensor([0.5, 2.0], dtype=F64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda x_t, y, sigma: po.pivot(x_t, y, A, alpha_t=0.9, sigma_t=sigma, sigma_y=0.2), (x_t, y, sigma)
    )


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf, torch.tensor([0.1, -0.1])])
def test_impossible_noise_is_refused(bad: float | Tensor) -> None:
    """A negative or undefined sigma_y would be squared away, or end in a picture of NaN."""
    x = randn(2, *SHAPE)
    with pytest.raises(ValueError, match="sigma_y must be finite and not negative"):
        po.measure(Identity(), x, bad)
    with pytest.raises(ValueError, match="sigma_y must be finite and not negative"):
        po.pivot(x, x, Identity(), alpha_t=1.0, sigma_t=1.0, sigma_y=bad)
    with pytest.raises(ValueError, match="sigma_y must be finite and not negative"):
        po.sample_pivot(x, Identity(), alpha_t=1.0, sigma_t=1.0, sigma_y=bad)


def test_scalars_of_another_batch_are_refused() -> None:
    """As many values as the image is wide, instead of as there are samples, would tint columns."""
    x = randn(2, *SHAPE)
    wide = torch.full((6,), 0.1, dtype=F64)
    with pytest.raises(ValueError, match="does not fit a batch of 2"):
        po.measure(Identity(), x, wide)
    for arguments in (
        {"alpha_t": wide, "sigma_t": 1.0, "sigma_y": 0.1},
        {"alpha_t": 1.0, "sigma_t": wide, "sigma_y": 0.1},
        {"alpha_t": 1.0, "sigma_t": 1.0, "sigma_y": wide},
    ):
        with pytest.raises(ValueError, match="does not fit a batch of 2"):
            po.pivot(x, x, Identity(), **arguments)
