"""Task mixtures that are for some settings alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from posteriori.operators import GaussianBlur, LinearOperator
from posteriori.recipe import RecipeError, build
from posteriori.tasks import TaskMixture

COUNT = 200


def draw(task: str, values: list[float]) -> LinearOperator:
    return TaskMixture(shares={task: 1.0}, only={task: values}).draw(COUNT, 48, np.random.default_rng(0))[1]


def test_only_the_values_asked_for_are_drawn() -> None:
    """A network "of one setting alone" would have seen others, and the comparison with it would be too kind."""
    mixture = TaskMixture(shares={"sr": 1.0}, only={"sr": [3, 6]})
    sides = {mixture.draw(1, 48, np.random.default_rng(k))[1](torch.zeros(1, 3, 48, 48)).shape[-1] for k in range(20)}
    assert sides == {16, 8}
    ones = torch.ones(COUNT, 1, 48, 48)
    rates = 1 - draw("inpaint", [0.5, 0.9])(ones).double().mean((1, 2, 3))
    near = torch.minimum((rates - 0.5).abs(), (rates - 0.9).abs())
    assert float(near.max()) < 5 * (0.25 / 48**2) ** 0.5  # five standard errors of a share of pixels
    assert 60 < int((rates > 0.7).sum()) < 140  # both as often
    assert ((1 - draw("box", [0.25])(ones)).sum((1, 2, 3)) == 12**2).all()
    x = torch.randn(COUNT, 1, 48, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(draw("gaussian", [2.0])(x), GaussianBlur(2.0)(x))
    point = torch.zeros(COUNT, 1, 48, 48)
    point[..., 24, 24] = 1
    spread = draw("motion", [9])(point)[:, 0].abs() > 1e-4
    lengths = torch.maximum(spread.any(1).sum(1), spread.any(2).sum(1))
    assert 6 <= int(lengths.max()) <= 9


def test_what_is_not_narrowed_varies_as_ever() -> None:
    """Narrowing one task would move the random numbers of the others, and runs would no longer be comparable."""
    mixtures = TaskMixture(), TaskMixture(only={"motion": [5]})
    for seed in range(5):
        a, b = (mixture.draw(4, 24, np.random.default_rng(seed)) for mixture in mixtures)
        assert a[0] == b[0]
        if a[0] != "motion":
            x = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(a[1](x), b[1](x))
            assert torch.equal(a[2], b[2])


@pytest.mark.parametrize(
    ("only", "what"),
    [
        ({"denoise": [1]}, "no parameter"),
        ({"blur": [1]}, "no parameter"),
        ({"inpaint": []}, "missing shares"),
        ({"inpaint": [0.5, 1.2]}, "missing shares"),
        ({"sr": [2.5]}, "whole numbers"),
        ({"motion": [8]}, "odd lengths"),
    ],
)
def test_values_that_mean_nothing_are_refused(only: dict[str, list[float]], what: str) -> None:
    """Training for hours on a setting that is not the one that was meant."""
    with pytest.raises(ValueError, match=what):
        TaskMixture(only=only)
    with pytest.raises(RecipeError, match=what):
        build(TaskMixture, {"only": only})


def test_factors_that_divide_no_crop() -> None:
    """An unreadable message from the random number generator."""
    with pytest.raises(ValueError, match="divides crops of 50"):
        TaskMixture(shares={"sr": 1.0}, only={"sr": [3, 4]}).draw(1, 50, np.random.default_rng(0))


def test_operators_of_narrowed_tasks_are_whole() -> None:
    """Settings that the operators refuse would end a run in the middle."""
    only = {"inpaint": [0.7], "box": [0.5], "sr": [4.0], "gaussian": [3.0], "motion": [61.0]}
    for task in only:
        _, A, _ = TaskMixture(shares={task: 1.0}, only=only).draw(2, 72, np.random.default_rng(1))
        assert A(torch.zeros(2, 3, 72, 72)).shape[-1] == (18 if task == "sr" else 72)
