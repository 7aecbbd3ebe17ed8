"""Networks that look twice: the first answer takes the smooth estimate's place."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import posteriori as po
from posteriori.backbones.photo import PhotoNet
from posteriori.conditioning import Conditioning
from posteriori.data import PhotoSource
from posteriori.denoise import NetworkDenoiser, Scaling
from posteriori.export.pipeline import DenoiserModel
from posteriori.methods import get_method
from posteriori.objective import NoiseLevels, Problem, eps_loss
from posteriori.operators import Identity, Inpainting, LinearOperator, Nothing
from posteriori.pivot import measure
from posteriori.recipe import CropSize, Recipe, RecipeError
from posteriori.rescheduled import Rescheduled
from posteriori.smooth import smooth_estimate
from posteriori.train.network import build

F64 = torch.float64
SHAPE = (2, 3, 12, 16)
S = 0.6


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64)


def network(refine: bool = True, seed: int = 0) -> PhotoNet:
    net = PhotoNet(3, (8, 12), (1, 1), 16, smooth_input=True, refine=refine).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.copy_(torch.randn(p.shape, generator=generator, dtype=F64) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.3))
    return net


def problem() -> tuple[LinearOperator, Tensor]:
    mask = torch.ones(12, 16)
    mask[2:9, 4:13] = 0
    return Inpainting(mask), randn(*SHAPE, seed=1) * mask


def watched(net: PhotoNet) -> tuple[NetworkDenoiser, list[tuple[Tensor, Tensor, Conditioning]]]:
    """A denoiser, and what its network is given in every evaluation."""
    seen: list[tuple[Tensor, Tensor, Conditioning]] = []
    denoiser = NetworkDenoiser(net, po.VE(), Scaling("edm", S), blind_mean=True)
    net.register_forward_pre_hook(lambda _, args: seen.append(args))
    return denoiser, seen


def once(net: PhotoNet) -> NetworkDenoiser:
    """The same network, but that it never looks twice."""
    plain = NetworkDenoiser(network(refine=False), po.VE(), Scaling("edm", S))
    plain.backbone.load_state_dict({k: v for k, v in net.state_dict().items() if k != "looks.weight"})
    return plain


def test_the_first_answer_is_shown_from_then_on() -> None:
    """The second look would see the smooth estimate again, the answer in other units or at another noise, or not be
    told that it is one; every call and every sample would look for the first time again."""
    net = network()
    net.looks.weight[0] = 0  # a first look is as that of a network that never looks twice
    denoiser, seen = watched(net)
    A, y = problem()
    posterior = po.ExactPosterior(denoiser, A, y, 0.1)
    mean = posterior.mean()
    assert len(seen) == 2
    (_, _, first), (inputs, label, second) = seen
    torch.testing.assert_close(first.smooth, smooth_estimate(y, A, SHAPE, sigma_y=0.1, prior_std=S) / S)
    assert first.looks.tolist() == [0, 0]
    answer = once(net)(torch.zeros(SHAPE, dtype=F64), denoiser.schedule.t_max, A, y, 0.1).mean
    torch.testing.assert_close(second.smooth, answer / S, rtol=0, atol=1e-12)
    assert second.looks.tolist() == [2, 2]
    # the second at noise 0.4 s: EDM's label, and the pivot of the first answer there, scaled by c_in(Q) as for any x_t
    q = 0.4 * S
    torch.testing.assert_close(label, torch.full((2,), math.log(q) / 4, dtype=F64))
    var = 1 / (1 / q**2 + (y != 0).double() / 0.1**2)
    expected = var * (answer / q**2 + y / 0.1**2) / (S**2 + var).sqrt()
    torch.testing.assert_close(inputs, expected, rtol=0, atol=1e-9)
    assert float((mean - answer).abs().max()) > 1e-3

    seen.clear()
    po.sample(posterior, n=3, nfe=4, seed=0)
    assert len(seen) == 4  # of all samples together
    for _, _, told in seen:
        torch.testing.assert_close(told.smooth, second.smooth.repeat(3, 1, 1, 1), rtol=0, atol=0)
        assert bool((told.looks == 1).all())
    posterior.mean()
    assert len(seen) == 5


def test_every_further_look_is_at_the_last_answer() -> None:
    """More looks would repeat the second, or start from the first answer each time: evaluations for nothing."""
    denoiser, seen = watched(network())
    A, y = problem()
    posterior = po.ExactPosterior(denoiser, A, y, 0.1)
    answers = [posterior.mean(looks=k) for k in (1, 2)]
    seen.clear()
    third = posterior.mean(looks=3)
    assert len(seen) == 2  # the first is kept
    for (_, _, told), shown in zip(seen, answers, strict=True):
        torch.testing.assert_close(told.smooth, shown / S, rtol=0, atol=1e-12)
        assert told.looks.tolist() == [2, 2]
    known = posterior._known(y, denoiser.schedule.t_max)
    assert known is not None
    expected = posterior.denoise(*denoiser.second_look(replace(known, smooth=answers[1] / S))).mean
    torch.testing.assert_close(third, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(posterior.mean(), answers[1], rtol=0, atol=0)  # as if nothing had been asked
    with pytest.raises(ValueError, match="one look or more"):
        posterior.mean(looks=0)


def test_evaluations_are_counted() -> None:
    """The second look would be free in every table."""
    denoiser, seen = watched(network())
    A, y = problem()
    estimate = get_method("eps")(po.ExactPosterior(denoiser, A, y, 0.1), n=2, nfe=3)
    images = sum(len(inputs) for inputs, _, _ in seen)
    assert images == estimate.evaluations * SHAPE[0] == 16
    seen.clear()
    one = get_method("eps")(po.ExactPosterior(denoiser, A, y, 0.1), n=2, nfe=1)
    assert sum(len(inputs) for inputs, _, _ in seen) == one.evaluations * SHAPE[0] == 4
    assert one.samples is not None
    assert torch.equal(one.samples[1], one.mmse)
    torch.testing.assert_close(one.mmse, estimate.mmse, rtol=0, atol=1e-12)


def test_without_a_measurement_there_is_no_second_look() -> None:
    """Training-free methods would pay for it in every evaluation, for an answer about nothing."""
    denoiser, seen = watched(network())
    answer = denoiser(randn(*SHAPE), 2.0, Nothing(), torch.zeros(SHAPE, dtype=F64), 0.1)
    assert len(seen) == 1
    assert seen[0][2].looks.tolist() == [0, 0]
    assert bool(torch.isfinite(answer.mean).all())


def test_a_measurement_does_not_depend_on_its_batch() -> None:
    """Copies of a batch would be shown another measurement's answer."""
    denoiser, _ = watched(network())
    A, y = problem()
    both = po.sample(po.ExactPosterior(denoiser, A, y, 0.1), n=2, nfe=3, seed=[3, 4])
    alone = po.sample(po.ExactPosterior(denoiser, A, y[1:], 0.1), n=2, nfe=3, seed=[4])
    torch.testing.assert_close(both[:, 1], alone[:, 0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("wrap", [lambda d: Rescheduled(d, po.VP()), lambda d: DenoiserModel(denoiser=d)])
def test_wrapped_networks_look_twice(wrap) -> None:
    """On another schedule, or as a model of diffusers, the mean would be that of the first look."""
    inside = NetworkDenoiser(network(), po.VE(), Scaling("edm", S), blind_mean=True)
    A, y = problem()
    outside = wrap(inside.float())
    y = y.float()
    expected, found = (po.ExactPosterior(d, A, y, 0.1).mean() for d in (inside, outside))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert outside.refines


@pytest.mark.parametrize("weight", ["expected", "backbone"])
def test_training_shows_what_sampling_shows(weight) -> None:
    """The network would learn on other inputs than it is used with; a second look would count otherwise than a first;
    gradients would pass through the first. Every sample of a step is evaluated again as sampling does it, from the
    measurement that the step made (1e-4: training works in float32)."""
    denoiser, seen = watched(network())
    denoiser.requires_grad_(True)
    A, _ = problem()
    noise = (0.1, 0.2, 0.1)
    xs = [randn(n, *SHAPE[1:], seed=n) for n in (9, 4, 2)]
    operators = (A, Identity(), Nothing())
    problems = [
        Problem(x, a, torch.full((len(x),), s, dtype=F64)) for x, a, s in zip(xs, operators, noise, strict=True)
    ]
    made: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("posteriori.objective.measure", lambda *args: made.append(measure(*args)) or made[-1])
        torch.manual_seed(0)
        levels = NoiseLevels(top_share=0.8, blind_share=0.8, first_share=0.5)
        loss, each = eps_loss(denoiser, problems, levels, torch.Generator().manual_seed(5), weight=weight)
    (first_inputs, _, first), (_, _, step) = seen  # one first look of all problems, and the step itself
    assert len(first.linear) == 13  # not of what was not measured
    assert not first_inputs.requires_grad
    looks = step.looks[:9].tolist()
    assert set(looks) == {0, 1, 2}
    assert step.looks[13:].tolist() == [0, 0]
    loss.backward()
    assert bool(denoiser.backbone.looks.weight.grad.abs().sum(1).all())
    with torch.no_grad():
        posterior = po.ExactPosterior(denoiser, A, made[0], 0.1)
        mean = posterior.mean()
        answer = posterior._shown[0]
        top = denoiser.first_look(made[0], A, tuple(xs[0].shape), 0.1)
        blind = denoiser(top.x_t, 80.0, A, made[0], 0.1, previous=top)
        variance = denoiser.prepare(top.x_t, 80.0, A, made[0], 0.1, top).variance
        expected = variance if weight == "expected" else denoiser.scaling.out(torch.tensor(80.0, dtype=F64)) ** 2
        errors = [(m - xs[0]).square().flatten(1).mean(1) / expected for m in (blind.mean, mean)]
    for i, look in enumerate(looks):
        shown = top.smooth if look == 0 else answer
        torch.testing.assert_close(step.smooth[i], shown[i], rtol=0, atol=1e-4)
        if look != 1:
            assert float(each[i]) == pytest.approx(float(errors[int(look) // 2][i]), rel=1e-4)


def test_a_network_that_looked_once_begins_as_it_was(tmp_path: Path) -> None:
    """Training would start from a damaged network; the model that comes out would forget that it looks twice."""
    once = NetworkDenoiser(network(refine=False).float(), po.VE(), Scaling("edm", S), blind_mean=True)
    card = {"name": "once", "value_range": [-1, 1], "tasks": {}, "training_data": {}}
    po.save(once, tmp_path / "once", card)
    twice = build(
        Recipe(
            "twice", [PhotoSource("none")], {"kind": "photo", **once.backbone.config, "refine": True},
            [CropSize(16, 2)], init=str(tmp_path / "once"), noise=NoiseLevels(blind_share=0.5),
        )
    )  # fmt: skip
    assert not twice.backbone.looks.weight.any()
    A, y = problem()
    y, x_t = y.float(), randn(*SHAPE).float()
    twice.scaling = once.scaling
    first = twice.first_look(y, A, SHAPE, 0.1)
    for t in (0.3, 80.0):
        torch.testing.assert_close(
            twice(x_t, t, A, y, 0.1, previous=first).mean, once(x_t, t, A, y, 0.1, previous=first).mean
        )
    po.save(twice, tmp_path / "twice", card)
    again = po.load(tmp_path / "twice")
    assert again.refines
    assert again.backbone.config["refine"]


def test_it_needs_the_smooth_estimate() -> None:
    """There would be nowhere to show the first answer."""
    with pytest.raises(ValueError, match="smooth_input"):
        PhotoNet(3, (8, 12), (1, 1), 16, refine=True)


def test_both_looks_must_be_trained() -> None:
    """The mean would be the answer to a question that the network was never asked."""
    config = {
        "kind": "photo",
        "image_channels": 3,
        "channels": [8],
        "blocks": [1],
        "smooth_input": True,
        "refine": True,
    }
    with pytest.raises(RecipeError, match="blind_share"):
        build(Recipe("blind", [PhotoSource("none")], config, [CropSize(16, 2)]))
