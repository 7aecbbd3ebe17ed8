"""Whitened measurements against Bayes' rule with the full covariance of the noise, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

import posteriori as po
from posteriori import noise
from posteriori.operators import (
    Bayer,
    ChannelMixing,
    CircularConvolution,
    Crop,
    GaussianBlur,
    Grayscale,
    Identity,
    Inpainting,
    LinearOperator,
    Matrix,
    Sampling,
    Weighting,
)
from posteriori.priors import Gaussian, dense_matrix

F64 = torch.float64


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64)


def prior(d: int, shape: tuple[int, ...]) -> Gaussian:
    root = randn(d, d, seed=11) / d**0.5
    return Gaussian(randn(d, seed=12), root @ root.T + 0.1 * torch.eye(d, dtype=F64), shape=shape)


def bayes(p: Gaussian, matrix: Tensor, y: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean and covariance for ``y = M x + N(0, gamma)``, by the formula for jointly Gaussian variables."""
    m, c = p.mean, p.covariance
    gain = c @ matrix.T @ torch.linalg.inv(matrix @ c @ matrix.T + gamma)
    return m + gain @ (y - matrix @ m), c - gain @ matrix @ c


def spread(*shape: int, seed: int = 4) -> Tensor:
    """Deviations from 0.03 to 3."""
    return 0.3 * 10 ** (2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64) - 1)


SHAPE = (1, 4, 5)
CASES: dict[str, tuple[LinearOperator, tuple[int, ...], tuple[int, ...], str]] = {
    # operator, signal, measurement, solver of the whitened operator
    "denoise": (Identity(), (1, 4, 5), (1, 4, 5), "exact (diagonal)"),
    "mask": (Inpainting(randn(4, 5) > -0.3), (1, 4, 5), (1, 4, 5), "exact (diagonal)"),
    "samples": (Sampling(torch.tensor([3, 1, 7, 3]), 8), (8,), (4,), "exact (diagonal)"),
    "mosaic": (Bayer(), (3, 2, 3), (1, 2, 3), "exact (diagonal)"),
    "crop": (Crop(1, 1), (1, 4, 5), (1, 2, 3), "exact (diagonal)"),
    "matrix": (Matrix(randn(5, 8)), (8,), (5,), "exact (svd)"),
    "grey": (Grayscale(), (3, 2, 3), (1, 2, 3), "exact (channels x diagonal)"),
    "blur": (GaussianBlur(0.8, 3), (1, 4, 5), (1, 4, 5), "cg"),
}


@pytest.mark.parametrize("case", CASES)
def test_deviations_per_measurement(case: str) -> None:
    """The posterior would weigh a poor measurement like a good one."""
    A, shape, measured, solver = CASES[case]
    p, std = prior(math.prod(shape), shape), spread(*measured)
    y = noise.measure(A, p.sample(1, torch.Generator().manual_seed(0)), std=std, seed=1)
    A_w, y_w, sigma_y = noise.whiten(A, y, std=std)
    assert A_w.solver == solver
    assert 0.03 < sigma_y < 3
    found = p.posterior(A_w, y_w, float(sigma_y))
    matrix = dense_matrix(A, shape, 1, p.means)[0]
    kept = matrix.abs().sum(1) > 0
    mean, covariance = bayes(p, matrix[kept], y.flatten()[kept], torch.diag(std.flatten()[kept] ** 2))
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.covariance, covariance)


def circulant(kernel: Tensor) -> Tensor:
    """Covariance of stationary noise on a line, by scipy."""
    n, k = 9, kernel.numel()
    first = np.zeros(n)
    first[:k] = kernel.numpy()
    return torch.from_numpy(scipy.linalg.circulant(np.roll(first, -(k // 2))))


@pytest.mark.parametrize("given", ["autocovariance", "spectrum", "function"])
@pytest.mark.parametrize("blurred", [False, True])
def test_stationary_noise(given: str, blurred: bool) -> None:
    """Correlated noise taken for white: the posterior would believe every other frequency."""
    kernel = torch.tensor([0.02, 0.1, 0.3, 0.1, 0.02], dtype=F64)
    gamma = circulant(kernel)
    power = torch.fft.fft(gamma[0]).real
    by_frequency = lambda f: 0.3 + 0.2 * torch.cos(2 * math.pi * f) + 0.04 * torch.cos(4 * math.pi * f)  # noqa: E731
    arguments = {"autocovariance": kernel, "spectrum": power, "function": by_frequency}
    key = "autocovariance" if given == "autocovariance" else "spectrum"
    W = noise.stationary_whitener((9,), **{key: arguments[given]})
    matrix = dense_matrix(W, (9,), 1, gamma)[0]
    torch.testing.assert_close(matrix @ gamma @ matrix.T, torch.eye(9, dtype=F64))
    A = CircularConvolution(torch.tensor([0.2, 0.5, 0.3], dtype=F64)) if blurred else Identity()
    p = prior(9, (9,))
    y = A(randn(1, 9, seed=3))
    A_w, y_w, sigma_y = noise.whiten(A, y, whitener=W)
    assert A_w.solver == "exact (fft)"
    assert sigma_y == pytest.approx(float(torch.linalg.det(gamma)) ** (1 / 18))
    found = p.posterior(A_w, y_w, float(sigma_y))
    mean, covariance = bayes(p, dense_matrix(A, (9,), 1, gamma)[0], y[0], gamma)
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.covariance, covariance)


def test_correlated_channels() -> None:
    """Noise of a colour transform: its whitener mixes channels, and a blur beside it stays exact."""
    root = randn(3, 3, seed=7)
    whitener = ChannelMixing(torch.linalg.inv(root))
    A = CircularConvolution(torch.tensor([[0.1, 0.6, 0.3]], dtype=F64))
    p = prior(18, (3, 2, 3))
    y = randn(1, 3, 2, 3, seed=5)
    A_w, y_w, sigma_y = noise.whiten(A, y, whitener=whitener)
    assert A_w.solver == "exact (channels x fft)"
    gamma = torch.kron(root @ root.T, torch.eye(6, dtype=F64))
    mean, covariance = bayes(p, dense_matrix(A, (3, 2, 3), 1, y)[0], y.flatten(), gamma)
    found = p.posterior(A_w, y_w, float(sigma_y))
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.covariance, covariance)


def test_sampled_posterior_has_the_covariance_of_the_noise() -> None:
    """The whole way, measurement to samples: mean and covariance of 4000 samples within 5 standard errors."""
    kernel = torch.tensor([0.1, 0.3, 0.1], dtype=F64)
    W = noise.stationary_whitener((9,), autocovariance=kernel)
    p = prior(9, (9,))
    y = noise.measure(Identity(), p.sample(1, torch.Generator().manual_seed(2)), whitener=W, seed=3)
    mean, covariance = bayes(p, torch.eye(9, dtype=F64), y[0], circulant(kernel))
    posterior = po.ExactPosterior(p, *noise.whiten(Identity(), y, whitener=W))
    n = 4000
    samples = po.sample(posterior, n=n, nfe=60, seed=0)[:, 0]
    variance = covariance.diagonal()
    assert bool(((samples.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all())
    error = (torch.outer(variance, variance) + covariance**2).sqrt() / n**0.5  # of a Gaussian's sample covariance
    assert bool(((samples.T.cov() - covariance).abs() < 5 * error + 0.01 * variance.max()).all())


def test_simulated_noise_has_its_covariance() -> None:
    """``measure`` would draw other noise than ``whiten`` undoes: 20,000 draws, within 5 standard errors."""
    kernel = torch.tensor([0.1, 0.3, 0.1], dtype=F64)
    W = noise.stationary_whitener((9,), autocovariance=kernel)
    n = 20_000
    drawn = noise.measure(Identity(), torch.zeros(n, 9, dtype=F64), whitener=W, seed=0)
    gamma = circulant(kernel)
    error = (torch.outer(gamma.diagonal(), gamma.diagonal()) + gamma**2).sqrt() / n**0.5
    assert bool(((drawn.T @ drawn / n - gamma).abs() < 5 * error).all())
    std = spread(9)
    drawn = noise.measure(Identity(), torch.zeros(n, 9, dtype=F64), std=std, seed=0)
    assert bool(((drawn.square().mean(0) / std**2 - 1).abs() < 5 * (2 / n) ** 0.5).all())
    again = noise.measure(Identity(), torch.zeros(3, 9, dtype=F64), std=std, seed=0)
    assert torch.equal(again, drawn[:3])  # whatever the batch


def test_no_measurement_is_infinite_noise() -> None:
    """A dead pixel, marked by inf, must neither count nor say anything, whatever it holds."""
    std = torch.tensor([0.1, math.inf, 0.4], dtype=F64)
    y = torch.tensor([[1.0, math.nan, 3.0]], dtype=F64)
    A_w, y_w, sigma_y = noise.whiten(Identity(), y, std=std)
    assert sigma_y == pytest.approx(0.2)
    assert A_w.measurement_count(y_w).tolist() == [2]
    torch.testing.assert_close(y_w, torch.tensor([[2.0, 0.0, 1.5]], dtype=F64))


def test_levels_of_samples() -> None:
    """One level for a batch whose samples have noises of their own would leave a network's range."""
    std = torch.tensor([[0.1, 0.1, 0.1], [0.4, 0.1, 0.2]], dtype=F64)
    A_w, y_w, sigma_y = noise.whiten(Identity(), torch.ones(2, 3, dtype=F64), std=std)
    assert isinstance(sigma_y, Tensor)
    torch.testing.assert_close(sigma_y, torch.tensor([0.1, 0.2], dtype=F64))
    assert A_w.samples(2) == 2
    torch.testing.assert_close(y_w, sigma_y[:, None] / std)
    # a mask of its own for every sample: only measured entries count
    mask = Inpainting(torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]))
    level = noise.whiten(mask, torch.ones(2, 3, dtype=F64), std=torch.tensor([0.1, 0.4, 0.9], dtype=F64)).sigma_y
    torch.testing.assert_close(level, torch.tensor([0.2, 0.6], dtype=F64))
    # equal for all: the operator stays free of the batch, so that it can be expanded for several samples
    whitened = noise.whiten(Identity(), torch.ones(2, 3, dtype=F64), std=torch.tensor([0.1, 0.4, 0.2], dtype=F64))
    assert whitened.A.samples(2) is None
    assert whitened.sigma_y == pytest.approx(0.2)


def test_the_level_does_not_matter() -> None:
    """The posterior must not depend on how the weights are scaled."""
    p, std, y = prior(6, (6,)), spread(6), randn(1, 6)
    first = p.posterior(*noise.whiten(Identity(), y, std=std))  # type: ignore[arg-type]
    second = p.posterior(*noise.whiten(Identity(), y, std=std, sigma_y=0.05))  # type: ignore[arg-type]
    torch.testing.assert_close(first.mean, second.mean)
    torch.testing.assert_close(first.covariance, second.covariance)


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: noise.whiten(Identity(), torch.ones(1, 3)), "either std"),
    (lambda: noise.measure(Identity(), torch.ones(1, 3), std=1.0, whitener=Identity()), "either std"),
    (lambda: noise.whiten(Identity(), torch.ones(1, 3), std=torch.tensor([0.0, 1.0, 1.0])), "positive"),
    (lambda: noise.whiten(Identity(), torch.ones(1, 3), std=torch.ones(1, 1, 3)), "do not fit"),
    (lambda: noise.whiten(Inpainting(torch.tensor([1.0, 0.0, 1.0])), torch.ones(1, 3),
                          whitener=noise.stationary_whitener((3,), spectrum=torch.ones(3))), "Sampling"),
    (lambda: noise.stationary_whitener((3,)), "either the spectrum"),
    (lambda: noise.stationary_whitener((3,), spectrum=torch.tensor([1.0, 0.0, 0.0])), "add some white noise"),
    (lambda: noise.stationary_whitener((4,), spectrum=torch.tensor([1.0, 1.0, 1.0, 2.0])), "f and -f"),
    (lambda: noise.stationary_whitener((4,), spectrum=torch.ones(3)), "has shape"),
    (lambda: noise.stationary_whitener((4,), autocovariance=torch.ones(5)), "does not fit"),
    (lambda: noise.stationary_whitener((4,), autocovariance=torch.tensor([0.1, 1.0, 0.2])), "symmetric"),
    (lambda: noise.stationary_whitener((4,), autocovariance=torch.tensor([0.9, 1.0, 0.9])), "positive at every"),
    (lambda: noise.measure(Identity(), torch.ones(1, 2), whitener=Weighting(torch.tensor([1.0, 0.0]))), "inverted"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_noise_is_refused(call: Callable[[], object], message: str) -> None:
    """A covariance that no noise has, or a whitener that does not fit, would give a posterior of nothing."""
    with pytest.raises(ValueError, match=message):
        call()
