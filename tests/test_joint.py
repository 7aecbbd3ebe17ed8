"""The linear estimate and functions of the pivot with one change of basis."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import posteriori as po
from posteriori.denoise import NetworkDenoiser
from posteriori.joint import can_share, linear_and_pivots
from posteriori.operators import (
    MRI,
    Blur,
    Callable,
    Downsampling,
    GaussianBlur,
    Grayscale,
    Hadamard,
    Identity,
    Inpainting,
    LinearOperator,
    Matrix,
)
from posteriori.operators.base import SpectralOperator
from posteriori.pivot import linear_estimate, measure, noise_variance, pivot
from posteriori.posterior import ExactPosterior
from posteriori.sample import sample
from posteriori.schedule import VE

F64 = torch.float64


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64)


def operators() -> dict[str, tuple[LinearOperator, tuple[int, ...]]]:
    mask = (randn(8, 8, seed=7) > 0).double()
    return {
        "mask": (Inpainting(mask), (3, 8, 8)),
        "mask per sample": (Inpainting((randn(2, 1, 8, 8, seed=6) > 0).double()), (3, 8, 8)),
        "identity": (Identity(), (3, 8, 8)),
        "reflect blur": (GaussianBlur(1.0), (3, 8, 9)),
        "circular blur": (Blur(randn(3, 3, seed=5).abs() / 9, "circular"), (3, 8, 7)),
        "box sr": (Downsampling(4), (3, 8, 12)),
        "bicubic sr": (Downsampling(2, "bicubic"), (3, 8, 10)),
        "circular sr": (Downsampling(2, randn(4, 4, seed=4).abs() / 16, "circular"), (3, 8, 8)),
        "grey": (Grayscale(), (3, 8, 8)),
        "matrix": (Matrix(randn(5, 12, seed=3)), (12,)),
        "hadamard": (Hadamard((randn(4, 4, seed=8) > 0).double()), (1, 4, 4)),
        "mri": (MRI((randn(8, 8, seed=2) > 0).double()), (2, 8, 8)),
    }


def each_separately(
    A: LinearOperator, x_t: Tensor, y: Tensor, scales: dict[str, Tensor], s: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same three signals by the operator's own solves, each of which is tested against dense algebra."""
    mu = pivot(x_t, y, A, **scales)
    variance = noise_variance(A, x_t, **scales)
    linear = linear_estimate(x_t, y, A, **scales, prior_std=s)
    return linear, mu, A.spectral(lambda lam: 1 / (1 + variance(lam)), mu)


FUNCTIONS = [torch.ones_like, lambda q: 1 / (1 + q**2)]


@pytest.mark.parametrize("name", operators())
@pytest.mark.parametrize("rows", [1, 2], ids=["one time", "a time each"])
def test_together_is_one_by_one(name: str, rows: int) -> None:
    """A coefficient combined with another's weight, or one sample's noise with another's signal."""
    A, shape = operators()[name]
    x_0, x_t = randn(2, *shape, seed=1), randn(2, *shape)
    y = measure(A, x_0, 0.1, seed=2)
    values = {"alpha_t": [0.8, 0.5], "sigma_t": [0.3, 7.0], "sigma_y": [0.1, 0.04]}
    scales = {k: torch.tensor(v[:rows], dtype=F64) for k, v in values.items()}
    assert can_share(A, scales["alpha_t"], scales["sigma_y"])
    found, measured = linear_and_pivots(x_t, y, A, **scales, prior_std=0.5, functions=FUNCTIONS)
    for got, expected in zip(found, each_separately(A, x_t, y, scales, 0.5), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    again, _ = linear_and_pivots(x_t, y, A, **scales, prior_std=0.5, functions=FUNCTIONS, known=measured)
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))


@pytest.mark.parametrize("name", ["reflect blur", "circular blur", "box sr", "bicubic sr", "circular sr", "mask"])
def test_single_precision_leaves_the_pivot_as_accurate(name: str) -> None:
    """The whitened error, the one that a sampler sees, in float32 against float64: at most 1e-2 of the pivot's own
    noise, at the smallest measurement noise and the largest noise of the schedule."""
    A, shape = operators()[name]
    scales = {"alpha_t": 1.0, "sigma_t": 80.0, "sigma_y": 1e-3}
    x_0 = randn(2, *shape, seed=1)
    x_t, y = x_0 + 80 * randn(2, *shape), measure(A, x_0, 1e-3, seed=2)
    exact = pivot(x_t, y, A, **scales)
    assert isinstance(A, SpectralOperator)
    found, _ = linear_and_pivots(x_t.float(), y.float(), A, **scales, prior_std=0.5, functions=FUNCTIONS[:1])
    assert found[1].dtype == torch.float32
    error = found[1].double() - exact
    whitened = ((error / 80).square() + (A(error) / 1e-3).square().sum() / error.numel()).mean().sqrt()
    assert float(whitened) < 1e-2


def test_where_there_is_nothing_to_share() -> None:
    """Without noise, without a pivot, or without a basis the solves one by one know what to do."""
    x = randn(1, 1, 8, 8)
    assert not can_share(Identity(), 1.0, 0.0)
    assert not can_share(Identity(), 1.0, torch.tensor([0.1, 0.0]))
    assert not can_share(Identity(), 0.0, 0.1)
    assert not can_share(Callable(lambda v: 2 * v, shape=(1, 8, 8)), 1.0, 0.1)
    denoiser = NetworkDenoiser(Silent(), VE())
    exact = ExactPosterior(denoiser, Identity(), x, 0.0).denoise(x + 2, 2.0)
    torch.testing.assert_close(exact.mean, x)
    assert exact.measured is None


class Silent(torch.nn.Module):
    def forward(self, inputs: Tensor, c_noise: Tensor, conditioning: object) -> Tensor:
        return torch.zeros_like(inputs)


class Counting(GaussianBlur(1.0).__class__):  # type: ignore[misc]
    """A separable blur that counts changes of basis of measurements."""

    count = 0

    def adjoint_coefficients(self, y: Tensor) -> Tensor:
        Counting.count += 1
        result: Tensor = super().adjoint_coefficients(y)
        return result


def test_the_measurement_changes_basis_once_a_trajectory() -> None:
    """What is the same in every evaluation would be worked out again in each; and the answer of one problem must
    not bring its measurement into another."""
    A = Counting(*GaussianBlur(1.0).axes)
    y, other = randn(1, 1, 8, 8), randn(1, 1, 8, 8, seed=1)
    posterior = ExactPosterior(NetworkDenoiser(Silent(), VE()), A, y, 0.1)
    Counting.count = 0
    sample(posterior, n=1, nfe=6)
    few = Counting.count
    sample(posterior, n=1, nfe=12)
    assert Counting.count == 2 * few
    x_t = randn(1, 1, 8, 8, seed=2)
    previous = posterior.denoise(x_t, 2.0)
    assert previous.measured is not None
    theirs = ExactPosterior(posterior.denoiser, A, other, 0.1)
    warm, cold = theirs.denoise(x_t, 1.0, previous), theirs.denoise(x_t, 1.0)
    assert torch.equal(warm.mean, cold.mean)
    expected = po.linear_estimate(x_t, other, A, alpha_t=1.0, sigma_t=1.0, sigma_y=0.1, prior_std=0.5)
    torch.testing.assert_close(warm.mean, expected)
    assert math.isfinite(float(warm.mean.sum()))
