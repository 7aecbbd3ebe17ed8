"""A denoiser on another interpolant: against exact priors that were given that interpolant to begin with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from posteriori import ExactPosterior
from posteriori.denoise import Denoiser, NetworkDenoiser, Scaling
from posteriori.export.pipeline import DenoiserModel
from posteriori.methods.base import METHODS
from posteriori.operators import Inpainting, Matrix
from posteriori.pivot import measure
from posteriori.priors import GaussianMixture
from posteriori.rescheduled import Rescheduled
from posteriori.sample import sample
from posteriori.schedule import VE, VP, CosineVP, RectifiedFlow, Schedule

SIGMA_Y = 0.2
WIDE = VE(sigma_max=2000.0)  # reaches as far as all of the others
OTHERS = [VP(), CosineVP(), RectifiedFlow()]


def prior(schedule: Schedule) -> GaussianMixture:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    factor = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)
    covs = 0.1 * factor @ factor.mT + 0.05 * torch.eye(4, dtype=torch.float64)
    return GaussianMixture(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), means, covs, schedule)


def problem(denoiser: Denoiser) -> ExactPosterior:
    x_0 = prior(VE()).sample(3, torch.Generator().manual_seed(1))
    A = Matrix(torch.randn(2, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    return ExactPosterior(denoiser, A, measure(A, x_0, SIGMA_Y, seed=3), SIGMA_Y)


@pytest.mark.parametrize("schedule", OTHERS, ids=lambda s: type(s).__name__)
def test_answers_are_those_of_a_prior_on_that_schedule(schedule: Schedule) -> None:
    """A wrong scale of ``x_t`` or a wrong time: means, noise and score at times of their own for each sample."""
    own, other = problem(Rescheduled(prior(WIDE), schedule)), problem(prior(schedule))
    t = torch.tensor([0.02, 0.4, 0.9], dtype=torch.float64)
    x_t = torch.randn(3, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    one, two = own.denoise(x_t, t), other.denoise(x_t, t)
    torch.testing.assert_close(one.mean, two.mean, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(one.score, two.score, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(own.mean(), other.mean(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("schedule", OTHERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    "options", [{}, {"solver": "ddim", "grid": "uniform"}, {"solver": "heun"}], ids=["default", "ddim", "heun"]
)
def test_samples_are_those_of_a_prior_on_that_schedule(schedule: Schedule, options: dict[str, str]) -> None:
    """Another path of the same network: with one seed an exact prior draws equal samples either way."""
    own, other = (
        sample(problem(d), n=2, nfe=12, seed=5, **options)  # type: ignore[call-overload]
        for d in (Rescheduled(prior(WIDE), schedule), prior(schedule))
    )
    torch.testing.assert_close(own, other, rtol=0, atol=1e-6)


def test_back_on_its_own_schedule_it_is_the_denoiser() -> None:
    """Two changes of schedule would not cancel."""
    there = Rescheduled(Rescheduled(prior(VE()), VP(start=1e-6)), VE(sigma_max=50.0))
    t, x_t = torch.tensor([0.01, 1.0, 40.0], dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64)
    torch.testing.assert_close(problem(there).denoise(x_t, t).mean, problem(prior(VE())).denoise(x_t, t).mean)


def test_the_method_samples_on_another_schedule() -> None:
    """A recipe's ``schedule`` would be ignored, or its result not say what it was told."""
    posterior = problem(prior(VE()))
    told = {"kind": "RectifiedFlow", "stop": 0.98}
    found = METHODS["eps"](posterior, 2, 6, 1, schedule=told, solver="euler", grid="uniform")
    due = sample(problem(prior(RectifiedFlow(stop=0.98))), 2, 6, 1, solver="euler", grid="uniform")
    torch.testing.assert_close(found.samples, due, rtol=0, atol=1e-6)
    assert found.settings == {"schedule": told, "solver": "euler", "grid": "uniform"}
    own = METHODS["eps"](posterior, 2, 6, 1, solver="euler", grid="uniform").samples
    assert own is not None
    assert float((own - due).abs().max()) > 0.01
    with pytest.raises(ValueError, match="unknown schedule"):
        METHODS["eps"](posterior, schedule={"kind": "none"})


class Told(Denoiser):
    """Keeps the time it was asked at."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule, self.warm, self.data_std = VE(), False, 0.7
        self.sigma_y_range = (0.1, 0.3)
        self.times: list[Tensor] = []

    def forward(self, x_t, t, A, y, sigma_y):  # type: ignore[no-untyped-def]
        self.times.append(t)
        return prior(VE())(x_t, t, A, y, sigma_y)


def test_what_the_denoiser_knows_is_kept() -> None:
    """A network would be asked at noise it was not trained for, or lose its data's scale or its allowed sigma_y."""
    told = Told()
    wrapped = Rescheduled(told, RectifiedFlow())
    A = Inpainting(torch.ones(4, dtype=torch.float64))
    y = torch.zeros(1, 4, dtype=torch.float64)
    ExactPosterior(wrapped, A, y, SIGMA_Y).denoise(torch.zeros(1, 4, dtype=torch.float64), 0.999)  # q = 999
    assert float(told.times[0]) == 80.0
    assert (wrapped.data_std, wrapped.warm) == (0.7, False)
    with pytest.raises(ValueError, match="trained for sigma_y"):
        ExactPosterior(wrapped, A, y, 0.5)


def test_wrapped_denoisers_answer_for_the_one_inside() -> None:
    """Samples would be drawn with another data's scale, the mean be asked for as the network was not trained, or its
    range of noise be forgotten: on another schedule, and as a model of diffusers."""
    inside = NetworkDenoiser(nn.Identity(), VE(), Scaling("edm", 0.3), sigma_y_range=(0.02, 0.1), blind_mean=True)
    inside.smooth_input = True
    for outside in (Rescheduled(inside, VP()), DenoiserModel(denoiser=inside)):
        assert outside.data_std == 0.3
        assert outside.sigma_y_range == (0.02, 0.1)
        assert outside.blind_mean
        assert outside.smooth_input
