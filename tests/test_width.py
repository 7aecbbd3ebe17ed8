"""How wide a posterior is, and that the sampler enters above it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import posteriori as po
from posteriori.denoise import NetworkDenoiser, Scaling
from posteriori.operators import Callable, Downsampling, Inpainting, LinearOperator, Nothing
from posteriori.priors import Gaussian
from posteriori.width import posterior_width

F64 = torch.float64
S = 0.4


def problem(A: LinearOperator, shape: tuple[int, ...], sigma_y: float = 0.05) -> po.ExactPosterior:
    denoiser = NetworkDenoiser(nn.Identity(), po.VE(), Scaling("edm", S))
    return po.ExactPosterior(denoiser, A, torch.zeros(1, *A(torch.zeros(1, *shape)).shape[1:]), sigma_y)


def hole(size: int, side: int) -> Tensor:
    mask = torch.ones(size, size)
    first = (size - side) // 2
    mask[first : first + side, first : first + side] = 0
    return mask


def dense_width(seen: Tensor, shape: tuple[int, int, int]) -> float:
    """From the matrix of the prior's precision on grey images, entry by entry; ``seen``: information on each pixel."""
    channels, rows, columns = shape
    n = rows * columns
    index = torch.arange(n).reshape(rows, columns)
    one = torch.cat([index[1:].flatten(), index[:, 1:].flatten()])
    other = torch.cat([index[:-1].flatten(), index[:, :-1].flatten()])
    D = torch.zeros(len(one), n, dtype=F64)
    D[torch.arange(len(one)), one], D[torch.arange(len(one)), other] = 1, -1
    P = torch.diag(seen.double().flatten()) + D.T @ D / (channels * (S / 4) ** 2)
    whole = 1 / (S**2 * channels * n)
    return float((torch.linalg.eigvalsh(P)[0] + whole) ** -0.5)


@pytest.mark.parametrize(("size", "side"), [(16, 10), (20, 5), (18, 0), (23, 22)])
def test_width_is_that_of_the_dense_precision(size: int, side: int) -> None:
    """The start of the sampler would come from another number than the one that is documented (6 %)."""
    mask = hole(size, side)
    most = 4 / S**2
    expected = dense_width(mask * most, (3, size, size))
    assert posterior_width(problem(Inpainting(mask), (3, size, size))) == pytest.approx(expected, rel=0.06)
    # any operator that is only a function: solved with by iterations
    forward = Callable(lambda x: x * mask, shape=(3, size, size))
    expected = dense_width(mask / (0.1 * S) ** 2, (3, size, size))
    assert posterior_width(problem(forward, (3, size, size), 0.01)) == pytest.approx(expected, rel=0.06)


def test_width_of_photos() -> None:
    """A hole's width grows with its side at any resolution (15 %); nothing else in photos is wide."""
    widths = [posterior_width(problem(Inpainting(hole(size, size // 2)), (3, size, size))) for size in (64, 128, 256)]
    # a square without measurements inside a known frame: side (s/4) sqrt(channels/2)/pi
    for size, width in zip((64, 128, 256), widths, strict=True):
        assert width == pytest.approx(size / 2 * S / 4 * math.sqrt(1.5) / math.pi, rel=0.15)
    mask = (torch.rand(256, 256, generator=torch.Generator().manual_seed(0)) > 0.7).float()
    assert posterior_width(problem(Inpainting(mask), (3, 256, 256))) < 2 * S
    assert posterior_width(problem(Downsampling(4), (3, 256, 256))) < 2 * S
    assert posterior_width(problem(Nothing(), (3, 64, 48))) == pytest.approx(S * math.sqrt(3 * 64 * 48), rel=0.01)


def test_what_has_no_width() -> None:
    """Signals that are no images, small ones; and batches whose measurements would depend on their neighbours."""
    assert posterior_width(problem(Inpainting(torch.zeros(64)), (1, 64))) == 0
    assert posterior_width(problem(Inpainting(torch.zeros(12, 40)), (1, 12, 40))) == 0
    masks = torch.stack([hole(32, 20), hole(32, 4)])[:, None]
    denoiser = NetworkDenoiser(nn.Identity(), po.VE(), Scaling("edm", S))
    assert posterior_width(po.ExactPosterior(denoiser, Inpainting(masks), torch.zeros(2, 3, 32, 32), 0.1)) == 0


def test_wide_directions_are_sampled() -> None:
    """The brightness of a large hole would hardly vary between samples: its exact variance, here of a Gaussian prior
    with long correlations, is met within 25 % (96 samples: two standard errors are 29 %, seeds are fixed), and is not
    met from the start that ignores the width."""
    n = 24
    grid = torch.stack(torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"), -1).reshape(-1, 2).double()
    prior = Gaussian(torch.zeros(n * n, dtype=F64), 0.25 * torch.exp(-torch.cdist(grid, grid) / 60), shape=(1, n, n))
    mask = torch.zeros(n, n)
    mask[:3, :3] = 1
    A = Inpainting(mask)
    y = po.measure(A, torch.full((1, 1, n, n), 0.3, dtype=F64), 0.05, seed=0)
    posterior = po.ExactPosterior(prior, A, y, 0.05)
    assert posterior_width(posterior) > 2
    exact = prior.posterior(A, y, 0.05)
    expected = float(exact.covariance.mean())  # variance of the mean over pixels
    found = [
        float(po.sample(posterior, n=96, nfe=8, seed=0, start=start).mean((1, 2, 3, 4)).var()) / expected
        for start in (None, 2.5)
    ]
    assert found[0] == pytest.approx(1, abs=0.25), found
    assert found[1] < 0.6, found
