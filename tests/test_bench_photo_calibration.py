"""Calibration of photo models: an exact posterior passes, samples that are too narrow or too smooth do not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from posteriori.bench import photo_calibration
from posteriori.bench.common import replace_between
from posteriori.bench.photo_calibration import STD_EDGES, band_edges, band_power, calibration, jackknife, pooled, table
from posteriori.bench.runner import Row
from posteriori.operators import Inpainting
from posteriori.pivot import measure
from posteriori.priors import Gaussian
from tiny_model import save_tiny_model

SIZE, DRAWS, SAMPLES = 16, 60, 19


def smooth_prior() -> Gaussian:
    """Stationary, with power ``1/(f^2 + f_0^2)^1.2`` like photos, and standard deviation 0.5."""
    f = torch.fft.fftfreq(SIZE, dtype=torch.float64)
    power = 1 / (f[:, None].square() + f.square() + 0.05**2) ** 1.2
    kernel = torch.fft.ifft2(power).real
    kernel = 0.25 * kernel / kernel[0, 0]
    places = torch.cartesian_prod(torch.arange(SIZE), torch.arange(SIZE))
    shift = (places[:, None] - places[None]) % SIZE
    return Gaussian(
        torch.zeros(SIZE**2, dtype=torch.float64), kernel[shift[..., 0], shift[..., 1]], shape=(1, SIZE, SIZE)
    )


@pytest.fixture(scope="module")
def problems() -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Samples, mean, truth and mask of :data:`DRAWS` inpainting problems, from dense linear algebra, no sampler."""
    prior, generator = smooth_prior(), torch.Generator().manual_seed(0)
    mask = (torch.rand(1, SIZE, SIZE, generator=generator) > 0.7).double()
    A, found = Inpainting(mask), []
    for k in range(DRAWS):
        x_0 = prior.sample(1, generator)
        posterior = prior.posterior(A, measure(A, x_0, 0.1, seed=k), 0.1)
        found.append(
            (posterior.sample(SAMPLES, generator)[:, None], posterior.mean.reshape(x_0.shape), x_0, mask[None])
        )
    return found


def rows_of(problems: list[tuple[Tensor, Tensor, Tensor, Tensor]], width: float = 1.0) -> list[Row]:
    """Rows of samples that are ``width`` times as far from their mean as they should be."""
    return [calibration(m + width * (x - m), m, x_0, mask) for x, m, x_0, mask in problems]


def test_exact_posterior_is_calibrated(problems: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
    """A wrong rank, a forgotten 1 + 1/b or bins chosen by the samples they judge would blame a perfect model. Four
    standard errors by the jackknife over 60 problems."""
    rows = rows_of(problems)
    found = pooled(rows)
    assert [rows[0]["nominal_0.5"], rows[0]["nominal_0.9"]] == [0.5, 0.9]
    right = {
        "coverage_0.5": 0.5,
        "coverage_0.9": 0.9,
        "missing_0.5": 0.5,
        "missing_0.9": 0.9,
        "ratio": 1.0,
        "slope": 1.0,
    }
    for name, value in right.items():
        error = jackknife(rows, lambda some, name=name: pooled(some)[name])[0]
        assert 0 < error < 0.05, name
        assert abs(found[name][0] - value) < 4 * error, (name, found[name], error)
    error = jackknife(rows, lambda some: pooled(some)["sample"])
    assert (np.abs(found["sample"] - 1) < 4 * error).all(), (found["sample"], error)
    assert error.max() < 0.1
    shown = np.isfinite(found["std"])
    assert shown.sum() >= 5  # the mask makes deviations differ, so the slope means something
    assert found["mean"][-1] < 0.7  # means lack power where nothing is known


def test_narrow_samples_are_noticed(problems: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
    """Half the deviation: an error of twice what is predicted, intervals that miss, power that is lacking; of a normal
    distribution the 50 % and 90 % intervals then hold what half of them holds."""
    found = pooled(rows_of(problems, 0.5))
    assert found["ratio"][0] == pytest.approx(2.0, abs=0.1)
    for level, quantile in ((0.5, 0.6745), (0.9, 1.645)):
        assert found[f"coverage_{level:g}"][0] == pytest.approx(math.erf(0.5 * quantile / math.sqrt(2)), abs=0.04)
    assert found["sample"][-1] < 0.8
    assert "**" not in table({"random": rows_of(problems[:6], 0.5)})
    assert "**" in table({"random": rows_of(problems[:6])})


def test_deviation_in_the_wrong_places_has_no_slope(
    problems: list[tuple[Tensor, Tensor, Tensor, Tensor]],
) -> None:
    """The right total spread in the wrong places passes every pooled figure but this one. Deviations differ by chance:
    were they all the same, the slope would be that of a line through one point."""
    spread = math.sqrt(np.mean([float(x.var(0).mean()) for x, *_ in problems]))
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _, m, x_0, _ in problems:
        places = (0.5 * torch.randn(m.shape, generator=generator, dtype=m.dtype)).exp() * math.exp(-(0.5**2))
        noise = torch.randn(SAMPLES, *m.shape, generator=generator, dtype=m.dtype)
        rows.append(calibration(m + spread * places * noise, m, x_0))
    found = pooled(rows)
    assert found["ratio"][0] == pytest.approx(1.0, abs=0.1)
    assert abs(found["slope"][0]) < 0.2
    assert "missing_0.5" not in found


def test_band_power_is_the_known_spectrum() -> None:
    """White noise has its variance as power in every band, and a wave all of it in its own: a window that is not
    normalised, or a frequency that is off by one, would show."""
    noise = 0.3 * torch.randn(400, 2, 32, 32, generator=torch.Generator().manual_seed(0)) + 0.7
    assert band_power(noise).mean(0).numpy() == pytest.approx(0.09, rel=0.06)
    edges = band_edges(64)
    assert [edges[-1], edges[-3]] == pytest.approx([0.5, 0.25])
    assert 1.5 / 64 <= edges[0] < 3 / 64
    wave = torch.cos(2 * torch.pi * 0.21 * torch.arange(64)).expand(1, 1, 64, 64)
    share = band_power(wave)[0] / band_power(wave).sum()
    assert int(share.argmax()) == int(np.searchsorted(edges, 0.21)) - 1
    with pytest.raises(ValueError, match="square"):
        band_power(torch.zeros(1, 1, 8, 9))
    with pytest.raises(ValueError, match="too small"):
        band_power(torch.zeros(1, 1, 4, 4))


def test_jackknife_is_the_standard_error_of_a_mean() -> None:
    """Errors behind ± would be off by a factor of the number of photos."""
    values = np.random.default_rng(0).normal(size=12)
    rows: list[Row] = [{"v": v} for v in values]
    found = jackknife(rows, lambda some: np.array([np.mean([r["v"] for r in some])]))
    assert found[0] == pytest.approx(values.std(ddof=1) / math.sqrt(12))
    assert np.isnan(jackknife(rows[:1], lambda some: np.array([1.0]))).all()


def test_every_deviation_has_a_bin() -> None:
    """A pixel outside all bins would vanish from the figure and from the ratio."""
    x = torch.zeros(19, 1, 1, 8, 8)  # no deviation at all
    row = calibration(x, x[0], x[0])
    assert [sum(row["count"]), len(row["count"])] == [64, len(STD_EDGES) - 1]
    with pytest.raises(ValueError, match="at least 4"):
        calibration(x[:3], x[0], x[0])


def test_command_writes_figures_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text written by hand would be lost, or a second run would measure everything again."""
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((40, 36), Image.Resampling.BICUBIC).save(photos / name)
    model = save_tiny_model(tmp_path / "tiny")
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- photo-calibration -->\nold\n<!-- /photo-calibration -->\nafter\n")
    command = [str(photos), "--model", str(model), "--out", str(tmp_path / "run"), "--size", "32", "--samples", "4",
               "--nfe", "2", "--tasks", "random,sr", "--document", str(document)]  # fmt: skip
    photo_calibration.main(command)
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "\nold\n" not in text
    assert "2 photos of 32x32 pixels, 4 samples of 2 evaluations" in text
    assert "in 60 % interval" in text  # what four samples can give, not what was asked for
    for name in ("photo-calibration.png", "photo-spectrum.png"):
        with Image.open(tmp_path / "figures" / name) as opened:
            assert np.asarray(opened.convert("L")).std() > 5
    monkeypatch.setattr(photo_calibration, "load", lambda *_: pytest.fail("measured twice"))
    photo_calibration.main(command)
    assert document.read_text() == text
    with pytest.raises(ValueError, match="<!-- no-such -->"):
        replace_between(document, "no-such", "x")
