"""Samples at given places, as a list, against their dense matrices and NumPy's indexing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from operator_suite import OperatorSuite, randn
from test_diagonal import mask

from posteriori.operators import Inpainting, LinearOperator, Sampling


class TestIrregular(OperatorSuite):
    shape = (9,)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Sampling([7, 0, 3, 4], 9)


class TestRepeated(OperatorSuite):
    """A place measured three times counts three times."""

    shape = (6,)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Sampling(torch.tensor([2, 5, 2, 2]), (6,))


class TestMissingSegments(OperatorSuite):
    shape = (2, 8)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        kept = torch.ones(8, dtype=torch.bool)
        kept[2:4] = kept[6:7] = False
        return Sampling(kept)


class TestPixels(OperatorSuite):
    shape = (2, 3, 4)

    def make(self, samples: Sequence[int]) -> LinearOperator:
        return Sampling(mask(3, 4).bool())


class TestPositionsPerSample(OperatorSuite):
    shape = (2, 6)
    tied = True

    def make(self, samples: Sequence[int]) -> LinearOperator:
        rows = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(i))[:3] for i in range(8)])
        return Sampling(rows[list(samples)], 6, per_sample=True)


def test_is_numpys_indexing() -> None:
    """Measurements in another order, or a mask read column by column."""
    x, indices, m = randn(3, 2, 4, 5), [11, 3, 3, 19], mask(4, 5).bool()
    assert np.array_equal(Sampling(indices, (4, 5))(x).numpy(), x.numpy().reshape(3, 2, 20)[..., indices])
    assert np.array_equal(Sampling(m)(x).numpy(), x.numpy()[..., m.numpy()])


def test_agrees_with_the_masked_form() -> None:
    """A list of measurements and the same laid out like the signal are the same knowledge."""
    m = mask(4, 5).bool()
    compact, laid_out, x = Sampling(m), Inpainting(m), randn(2, 1, 4, 5)
    a = compact.gram_solve(0.1, 2.0, x, compact(x))
    torch.testing.assert_close(a, laid_out.gram_solve(0.1, 2.0, x, laid_out(x)))
    count = float(m.sum())
    assert compact.measurement_count(compact(x)).tolist() == [count, count]


def test_masks_per_sample() -> None:
    """One mask per sample, with as many measurements for each; others have no list of one length."""
    masks = torch.tensor([[True, False, True], [False, True, True]])
    x = randn(2, 3)
    y = Sampling(masks, per_sample=True)(x)
    assert y.tolist() == [[x[0, 0], x[0, 2]], [x[1, 1], x[1, 2]]]
    with pytest.raises(ValueError, match="use Inpainting"):
        Sampling(torch.tensor([[True, False], [True, True]]), per_sample=True)


def test_bad_positions_are_refused() -> None:
    """Negative positions would count from the end; others would fail from deep inside."""
    for bad in ([0, 9], [-1, 2], torch.tensor([0.5]), torch.zeros(2, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match="whole numbers from 0 to 8"):
            Sampling(bad, 9)
    with pytest.raises(ValueError, match="do not tell how long"):
        Sampling([0, 1])
    with pytest.raises(ValueError, match="must have their shape"):
        Sampling(torch.ones(3, dtype=torch.bool), 4)
    A = Sampling([0, 1], 4)
    for call in (lambda: A(torch.zeros(1, 5)), lambda: A(torch.zeros(4)), lambda: A.adjoint(torch.zeros(1, 3))):
        with pytest.raises(ValueError, match="does not fit"):
            call()
