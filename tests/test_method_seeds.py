"""Seeds of single measurements: what a measurement is batched with must not change its samples."""

from __future__ import annotations

import pytest
import torch

from posteriori.methods.base import METHODS
from posteriori.operators import Downsampling, Inpainting
from posteriori.pivot import sample_generator, sample_generators
from posteriori.posterior import ExactPosterior
from posteriori.priors import Gaussian

SHAPE = (1, 4, 4)
STOCHASTIC = ("eps", "zero-shot-pivot", "dps", "daps-calibrated", "ddnm", "ddrm", "pigdm", "mmps", "mpgd", "diffpir")


def prior() -> Gaussian:
    points = torch.arange(16.0).reshape(-1, 1)
    return Gaussian(torch.zeros(16), 0.1 * torch.exp(-torch.cdist(points, points) / 4), shape=SHAPE)


@pytest.mark.parametrize("method", [*STOCHASTIC, "red-diff"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_measurement_with_its_own_seed_is_sampled_alike_in_any_batch(method: str, tied: bool) -> None:
    """The image benchmark's figures would depend on the batch size, or two images would share their noise."""
    masks = (torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(1)) > 0.4).float()
    y = torch.randn((3, 1, 4, 4) if tied else (3, 1, 2, 2), generator=torch.Generator().manual_seed(2)) * 0.3

    def answers(chosen: slice) -> torch.Tensor:
        A = Inpainting(masks[chosen]) if tied else Downsampling(2)
        posterior = ExactPosterior(prior(), A, y[chosen], 0.1)
        return METHODS[method](posterior, n=2, nfe=4, seed=[7, 8, 9][chosen]).answers

    together = answers(slice(0, 3))
    alone = torch.cat([answers(slice(i, i + 1)) for i in range(3)], 1)
    assert torch.allclose(together, alone, atol=2e-5)


def test_the_mean_takes_seeds_of_single_measurements() -> None:
    """The 1-NFE estimates of an image would differ in the last digits from batch to batch."""
    y = torch.tensor([[0.3], [-0.2]]).reshape(2, 1, 1, 1).expand(2, 1, 2, 2).contiguous()
    means = [ExactPosterior(prior(), Downsampling(2), y[i : i + 1], 0.1).mean([4 + i]) for i in range(2)]
    together = ExactPosterior(prior(), Downsampling(2), y, 0.1).mean([4, 5])
    assert torch.allclose(together, torch.cat(means), atol=1e-6)


def test_streams_of_a_seed_for_all_and_of_one_for_each() -> None:
    """Published samples could not be drawn again."""
    drawn = [torch.rand(1, generator=g) for g in sample_generators(3, 2, (0, 5))]
    assert drawn == [torch.rand(1, generator=sample_generator(3, b, k)) for k in (0, 5) for b in range(2)]
    own = [torch.rand(1, generator=g) for g in sample_generators([3, 4], 2, (5,))]
    assert own == [torch.rand(1, generator=sample_generator(s, 0, 5)) for s in (3, 4)]
    with pytest.raises(ValueError, match="3 seeds do not fit a batch of 2"):
        sample_generators([1, 2, 3], 2)
