"""Elementwise operators against their dense matrices."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from operator_suite import F64, OperatorSuite, randn
from torch import Tensor

from posteriori.operators import Identity, Inpainting, LinearOperator, Nothing, Weighting


def mask(*size: int, seed: int = 0) -> Tensor:
    return (torch.rand(*size, generator=torch.Generator().manual_seed(seed)) > 0.4).float()


class TestIdentity(OperatorSuite):
    shape = (2, 3, 5)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Identity()


class TestNothing(OperatorSuite):
    shape = (1, 4, 3)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Nothing()


class TestInpaintingSharedMask(OperatorSuite):
    shape = (2, 4, 5)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Inpainting(mask(4, 5))


class TestInpaintingMaskPerChannel(OperatorSuite):
    shape = (3, 3, 4)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Inpainting(mask(3, 3, 4).bool())


class TestInpaintingMaskPerSample(OperatorSuite):
    shape = (2, 4, 5)
    tied = True

    def make(self, samples: Sequence[int]) -> LinearOperator:
        # the first sample is seen in full, the second not at all
        masks = [torch.ones(1, 4, 5), torch.zeros(1, 4, 5), *(mask(1, 4, 5, seed=i) for i in range(2, 8))]
        return Inpainting(torch.stack([masks[i] for i in samples]))


class TestWeightingVector(OperatorSuite):
    shape = (7,)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Weighting(torch.tensor([0.0, 0.5, 1.0, 2.0, 0.0, 0.1, 3.0]))


class TestWeightingVectorPerSample(OperatorSuite):
    shape = (6,)
    tied = True

    def make(self, samples: Sequence[int]) -> LinearOperator:
        weights = randn(8, 6, seed=9).abs() * torch.logspace(-1, 1, 8, dtype=F64).unsqueeze(1)
        return Weighting(weights[list(samples)])


def test_inpainting_drops_what_is_masked() -> None:
    """The meaning of the mask turned round: 1 is measured, 0 is missing."""
    m = torch.tensor([1.0, 0.0, 1.0])
    assert Inpainting(m)(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[1.0, 0.0, 3.0]]


def test_measurements_are_counted_per_sample() -> None:
    """Whitened residuals would be divided by the number of pixels instead of measurements."""
    masks = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    A, y = Inpainting(masks), torch.zeros(3, 4)
    assert A.measurement_count(y).tolist() == [2, 4, 0]
    assert Identity().measurement_count(torch.zeros(2, 3, 5)).tolist() == [15, 15]
    assert Nothing().measurement_count(torch.zeros(2, 3, 5)).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.tensor([0.5, 1.0]), "1 \\(measured\\) and 0"),
        (torch.tensor([1.0, float("nan")]), "finite"),
        (torch.tensor([1.0, -1.0]), "non-negative"),
    ],
)
def test_bad_masks_are_refused(weights: Tensor, message: str) -> None:
    """A soft mask would silently reweight the noise; NaN and negative weights have no meaning."""
    with pytest.raises(ValueError, match=message):
        Inpainting(weights)


def test_masks_of_another_size_are_refused() -> None:
    """A mask for another picture would broadcast, or fail somewhere deep with an unreadable message."""
    for m in (mask(5, 4), mask(3, 1, 4, 5), mask(2, 4, 5)):
        with pytest.raises(ValueError, match="do not fit"):
            Inpainting(m)(torch.zeros(2, 3, 4, 5))
    with pytest.raises(ValueError, match="do not fit"):
        Inpainting(mask(1, 1, 1, 4, 5))(torch.zeros(2, 3, 4, 5))
