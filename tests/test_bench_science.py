"""The measurement of MRI and tomography: its Gaussian posterior against the dense one, its command end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from posteriori.bench.science import StationaryPrior, Task, main, read_slices
from posteriori.operators import MRI, LinearOperator, Matrix, MultiCoilMRI, Radon, birdcage_maps, cartesian_mask
from posteriori.pivot import measure
from posteriori.priors import Gaussian

SIZE = 6


def smooth(n: int, size: int, seed: int = 0) -> Tensor:
    """Random pictures ``(n, 1, size, size)`` in [-1, 1] that vary slowly."""
    noise = torch.randn(n, 1, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for axis in (-2, -1):
        noise = (noise + noise.roll(1, axis) + noise.roll(-1, axis)) / 3
    return (0.8 * noise - 0.2).clamp(-1, 1)


PROBLEMS: dict[str, LinearOperator] = {
    "mri": MRI(cartesian_mask((SIZE, SIZE), 2, 0.2), real=True),
    "coils": MultiCoilMRI(cartesian_mask((SIZE, SIZE), 2, 0.2), birdcage_maps(3, (SIZE, SIZE)), real=True),
    "ct": Radon([0.0, 50.0, 110.0], SIZE),
}


def dense_posterior(prior: StationaryPrior, A: LinearOperator, y: Tensor, sigma_y: float) -> Gaussian:
    """The same by dense algebra: every column of the covariance is a shifted copy of its first."""
    n = SIZE**2
    column = torch.fft.ifft2(prior.power).real
    cov = torch.stack([column.roll((i, j), (0, 1)).flatten() for i in range(SIZE) for j in range(SIZE)])
    gaussian = Gaussian(torch.full((n,), prior.mean, dtype=torch.float64), cov)
    matrix = A(torch.eye(n, dtype=torch.float64).reshape(n, 1, SIZE, SIZE)).flatten(1).T
    posterior = gaussian.posterior(Matrix(matrix), y.flatten(1), sigma_y)
    assert isinstance(posterior, Gaussian) or len(posterior.weights) == 1
    return posterior  # type: ignore[return-value]


@pytest.mark.parametrize("name", PROBLEMS)
def test_estimate_and_samples_are_those_of_the_gaussian_posterior(name: str) -> None:
    """Figures of a wrong posterior: its mean to 1e-5, mean and covariance of 4,000 samples within 5 standard errors."""
    prior, A, sigma_y, n = StationaryPrior(smooth(40, SIZE)), PROBLEMS[name], 0.1, 4000
    y = measure(A, smooth(1, SIZE, seed=7), sigma_y, seed=0)
    exact = dense_posterior(prior, A, y, sigma_y)
    found = prior.solve(A, sigma_y, A.adjoint(y - A(torch.full((1, 1, SIZE, SIZE), prior.mean).to(y))), 1e-8)
    mean = prior.mean + found.x / sigma_y**2
    torch.testing.assert_close(mean.flatten(), exact.means[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(prior.estimate(A, y, sigma_y).x, mean, rtol=0, atol=1e-2)
    drawn = prior.sample(A, mean.expand(n, -1, -1, -1), y.expand(n, *y.shape[1:]), sigma_y, seed=3).flatten(1)
    cov = exact.covs[0]
    error = (drawn.mean(0) - exact.means[0]) / (cov.diagonal() / n).sqrt()
    assert float(error.abs().max()) <= 5
    variances = cov.diagonal()
    deviation = ((variances[:, None] * variances + cov.square()) / n).sqrt()
    assert float(((torch.cov(drawn.T) - cov) / deviation).abs().max()) <= 5.5  # of 666 entries


def test_the_spectrum_of_an_operator_is_exact_for_convolutions() -> None:
    """A preconditioner for another operator: iterations by the hundred."""
    prior = StationaryPrior(smooth(10, SIZE))
    A = PROBLEMS["mri"]
    like = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.float64)
    expected = torch.fft.ifftshift(A.eigenvalues(like)[0, 0])  # type: ignore[attr-defined]
    torch.testing.assert_close(prior.fourier_diagonal(A, like), expected, rtol=0, atol=1e-12)
    y = measure(A, smooth(2, SIZE), 0.05, seed=0)
    assert prior.estimate(A, y, 0.05).iterations <= 2


def test_classical_reconstructions_of_everything_are_the_picture() -> None:
    """The column beside ours must be a fair one, in the picture's own range: complete k-space without noise gives the
    picture back; 180 views give it back dulled by interpolation, but with its mean (two pixels from the border, across
    which the picture's sharp edge is blurred)."""
    x, full = smooth(1, 32, seed=2), torch.ones(32, 32)
    for A in (MRI(full, real=True), MultiCoilMRI(full, birdcage_maps(8, (32, 32)).to(torch.complex128), real=True)):
        torch.testing.assert_close(Task(A, 0.0).classical(measure(A, x, 0.0)), x, rtol=0, atol=1e-6)
    A = Radon(torch.arange(180.0), 32)
    error = (Task(A, 0.0).classical(measure(A, x, 0.0)) - x)[..., 2:-2, 2:-2]
    assert abs(float(error.mean())) <= 0.002
    assert float(error.abs().mean()) <= 0.1


def test_the_command_writes_figures_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Slices through to the report: residuals of samples near 1, a better PSNR than the classical one's from CT."""
    slices = ((smooth(10, 24) + 1) * 127.5).round().byte()[:, 0].numpy()
    np.savez(tmp_path / "slices.npz", images=slices)
    main([str(tmp_path / "slices.npz"), "--out", str(tmp_path), "--limit", "3", "--size", "20", "--picture", "CT"])
    report = json.loads((tmp_path / "science.json").read_text())
    assert len(report) == 8
    for name, row in report.items():
        assert math.isclose(row["residual_truth"], 1, abs_tol=0.1), name
        assert math.isclose(row["residual_sample"], 1, abs_tol=0.15), name
        assert row["bound"] <= 2e-3, name
        if name.startswith("CT"):
            assert row["psnr_linear"] > row["psnr_classical"], name
    with Image.open(tmp_path / "science.png") as picture:
        assert picture.size == (4 * 20, 3 * 20)
    assert "| MRI, 4x Cartesian |" in capsys.readouterr().out


def test_files_that_are_no_slices_are_refused(tmp_path: Path) -> None:
    """Floats of an unknown range would be measured as if they were bytes."""
    np.savez(tmp_path / "floats.npz", images=np.zeros((2, 8, 8)))
    with pytest.raises(ValueError, match="array `images` of bytes"):
        read_slices(tmp_path / "floats.npz")
    np.savez(tmp_path / "small.npz", images=np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="lower --size"):
        read_slices(tmp_path / "small.npz", 9)
