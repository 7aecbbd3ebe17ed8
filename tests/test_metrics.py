"""Measures against definitions written out by hand, closed forms and other packages."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from posteriori.metrics import (
    coverage,
    crps,
    energy_distance,
    mse_ratios,
    psnr,
    residual,
    residual_squares,
    sliced_wasserstein,
    ssim,
)
from posteriori.operators import Downsampling, Inpainting
from posteriori.pivot import measure


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_psnr_is_that_of_8_bit_pictures() -> None:
    """Another peak or a missing clamp would shift every table by a constant, or punish values no picture can show."""
    skimage = pytest.importorskip("skimage.metrics")
    x_0, x = normal(3, 3, 8, 8).clamp(-1, 1), normal(3, 3, 8, 8, seed=1)
    for i in range(3):
        as_8_bit = [(v[i].clamp(-1, 1) * 127.5 + 127.5).numpy() for v in (x_0, x)]
        expected = skimage.peak_signal_noise_ratio(*as_8_bit, data_range=255)
        assert float(psnr(x, x_0)[i]) == pytest.approx(expected, abs=1e-9)


def test_ssim_agrees_with_its_definition() -> None:
    """A wrong data range changes SSIM silently: its constants scale with it."""
    pytest.importorskip("torchmetrics")
    ndimage = pytest.importorskip("scipy.ndimage")
    x_0 = normal(2, 3, 32, 32).cumsum(2).div(6).clamp(-1, 1)
    x = x_0 + 0.2 * normal(2, 3, 32, 32, seed=1)
    found = ssim(x, x_0)

    def blur(image: np.ndarray) -> np.ndarray:
        blurred: np.ndarray = ndimage.gaussian_filter(image, 1.5, truncate=3.5, mode="mirror")
        return blurred

    for i in range(2):
        values = []
        for a, b in zip(x[i].clamp(-1, 1).numpy(), x_0[i].numpy(), strict=True):
            m_a, m_b = blur(a), blur(b)
            v_a, v_b, c = blur(a * a) - m_a**2, blur(b * b) - m_b**2, blur(a * b) - m_a * m_b
            c_1, c_2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
            s = (2 * m_a * m_b + c_1) * (2 * c + c_2) / ((m_a**2 + m_b**2 + c_1) * (v_a + v_b + c_2))
            values.append(s.mean())
        assert float(found[i]) == pytest.approx(np.mean(values), abs=2e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_residual_of_the_truth_is_one(masked: bool) -> None:
    """If filler entries of masked measurements were counted, calibrated samples would look overconfident."""
    x_0 = normal(4, 3, 32, 32)
    mask = (torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(1)) < 0.3).double()
    A = Inpainting(mask) if masked else Downsampling(2)
    sigma_y = torch.tensor([0.01, 0.05, 0.2, 1.0], dtype=torch.float64)
    y = measure(A, x_0, sigma_y, seed=3)
    count = float(A.measurement_count(y).sum())
    assert count == (3 * float(mask.sum()) if masked else 4 * 3 * 16 * 16)
    # the sum is chi-squared with `count` degrees of freedom
    assert abs(residual(A, x_0[None], y, sigma_y) - 1) < 5 / math.sqrt(2 * count)
    by_hand = [float(((y[i] - A(x_0)[i]) / sigma_y[i]).square().sum()) for i in range(4)]
    if not masked:
        assert residual_squares(A, x_0, y, sigma_y).tolist() == pytest.approx(by_hand)
    with pytest.raises(ValueError, match="positive"):
        residual_squares(A, x_0, y, 0.0)


def test_crps_is_the_fair_estimator() -> None:
    """The biased form rewards methods for drawing more samples; a slip in the ranks would reward narrow ones."""
    samples, x_0 = normal(5, 2, 3, 4), normal(2, 3, 4, seed=1)
    by_hand = torch.zeros(2, 3, 4, dtype=torch.float64)
    for i in range(5):
        by_hand += (samples[i] - x_0).abs() / 5
    for i, j in itertools.permutations(range(5), 2):
        by_hand -= (samples[i] - samples[j]).abs() / (2 * 5 * 4)
    assert torch.allclose(crps(samples, x_0), by_hand.mean((1, 2)))
    scoringrules = pytest.importorskip("scoringrules")
    theirs = scoringrules.crps_ensemble(x_0.numpy(), samples.movedim(0, -1).numpy(), estimator="fair")
    assert crps(samples, x_0).numpy() == pytest.approx(np.asarray(theirs).mean((1, 2)))
    with pytest.raises(ValueError, match="at least 2"):
        crps(samples[:1], x_0)


def test_crps_of_a_gaussian_has_its_closed_form() -> None:
    """Scores are compared with published ones: E CRPS of N(0,1) forecasts of N(0,1) truths is 1/sqrt(pi)."""
    samples, x_0 = normal(8, 1, 50_000), normal(1, 50_000, seed=1)
    assert float(crps(samples, x_0)) == pytest.approx(1 / math.sqrt(math.pi), abs=0.01)  # 5 standard errors


def test_mse_ratios_of_a_known_posterior() -> None:
    """2 and 1 + 1/n are what calibrated samples give; other numbers would condemn calibrated methods."""
    mean, n = normal(6, 20_000), 8
    samples, x_0 = mean + 0.3 * normal(n, 6, 20_000, seed=1), mean + 0.3 * normal(6, 20_000, seed=2)
    ratios = mse_ratios(samples, mean, x_0)
    assert ratios.one == pytest.approx(2, abs=0.03)
    assert ratios.mean == pytest.approx(1 + 1 / n, abs=0.02)
    # images with different errors: the pooled ratio is the ratio of sums, not the mean of ratios
    uneven = torch.tensor([0.0, 0.01, 1.0], dtype=torch.float64)[:, None]
    found = mse_ratios(2 * uneven[None], uneven, torch.zeros(3, 1, dtype=torch.float64))
    assert found.one == pytest.approx(4)


@pytest.mark.parametrize("n", [4, 9, 50])
@pytest.mark.parametrize("level", [0.5, 0.9])
def test_coverage_of_a_known_posterior(n: int, level: float) -> None:
    """Quantiles of few samples cover less than their name says; compared with that name, all methods would fail."""
    inside, nominal = coverage(normal(n, 1, 40_000), normal(1, 40_000, seed=1), level)
    assert inside == pytest.approx(nominal, abs=5 * math.sqrt(0.25 / 40_000))
    if n == 50:
        assert nominal == pytest.approx(level, abs=0.02)
    narrow, _ = coverage(0.5 * normal(n, 1, 40_000), normal(1, 40_000, seed=1), level)
    assert narrow < nominal - 0.05


def test_sliced_wasserstein_of_shifted_points() -> None:
    """Moved by v, a set is |v|/sqrt(d) away on the average direction, in the root mean square; scaling adds up."""
    a, v = normal(500, 3), torch.tensor([1.0, -2.0, 2.0], dtype=torch.float64)
    found = sliced_wasserstein(a, (a + v)[torch.randperm(500)], projections=2000)
    assert found == pytest.approx(3 / math.sqrt(3), rel=0.05)
    # in one dimension it is the Wasserstein distance itself: here between N(0, 1) and N(0, 4)
    one_d = sliced_wasserstein(normal(20_000, 1), 2 * normal(20_000, 1, seed=1), projections=2)
    assert one_d == pytest.approx(1, abs=0.04)
    with pytest.raises(ValueError, match="one size"):
        sliced_wasserstein(a, a[:400])


def test_energy_distance_against_scipy_and_its_zero() -> None:
    """With pairs of a point and itself included, equal distributions would seem to differ when points are few."""
    stats = pytest.importorskip("scipy.stats")
    a, b = normal(1000, 1), normal(1000, 1, seed=1) * 1.5 + 0.5
    theirs = stats.energy_distance(a[:, 0].numpy(), b[:, 0].numpy()) ** 2  # with those pairs: 2/n E|X-X'| apart
    assert energy_distance(a, b) == pytest.approx(theirs, abs=4e-3)
    zeros = [energy_distance(normal(60, 4, seed=s), normal(60, 4, seed=100 + s)) for s in range(60)]
    assert abs(np.mean(zeros)) < 4 * np.std(zeros) / math.sqrt(60)
    assert min(zeros) < 0 < max(zeros)
