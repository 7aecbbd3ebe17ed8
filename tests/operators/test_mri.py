"""Several coils: one set of parameters per sample, the convolution their solves are preconditioned with."""

from __future__ import annotations

import pytest
import torch
from operator_suite import F64, dense, randn
from torch import Tensor

from posteriori.operators import MRI, MultiCoilMRI, birdcage_maps, cartesian_mask, radial_mask


def mask(*size: int, seed: int = 0) -> Tensor:
    return (torch.rand(*size, generator=torch.Generator().manual_seed(seed)) > 0.5).double()


def coils(samples: list[int], real: bool) -> MultiCoilMRI:
    """A mask and sensitivities of its own for every sample."""
    masks = torch.stack([mask(4, 5, seed=i) for i in samples])
    maps = torch.stack([birdcage_maps(3, (4, 5), width=0.6 + 0.2 * i).to(torch.complex128) for i in samples])
    return MultiCoilMRI(masks, maps, real=real)


@pytest.mark.parametrize("real", [False, True])
def test_every_sample_has_its_own_scanner(real: bool) -> None:
    """Knees would be reconstructed with the sensitivities of another patient."""
    x = randn(3, 1 if real else 2, 4, 5)
    A = coils([0, 1, 2], real)
    assert A.samples(4) == 3
    y = A(x)
    for i in range(3):
        alone, s = coils([i], real), slice(i, i + 1)
        torch.testing.assert_close(y[s], alone(x[s]))
        torch.testing.assert_close(A.adjoint(y)[s], alone.adjoint(y[s]))
        torch.testing.assert_close(
            A.gram_solve(0.1, 1.0, x, y)[s], alone.gram_solve(0.1, 1.0, x[s], y[s]), rtol=0, atol=1e-2
        )
    with pytest.raises(ValueError, match="do not fit a batch of"):
        A(x[:2])


@pytest.mark.parametrize("real", [False, True])
def test_gram_is_the_transpose_after_forward(real: bool) -> None:
    """Solves use the shorter way: they would be those of another operator. Sizes odd and even."""
    for size in [(4, 6), (5, 7), (4, 5)]:
        A = MultiCoilMRI(mask(*size), birdcage_maps(3, size).to(torch.complex128), real=real)
        v = randn(2, 1 if real else 2, *size)
        torch.testing.assert_close(A.gram(v), A.adjoint(A(v)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
def test_the_surrogate_measures_the_same_energy_of_every_wave(size: tuple[int, int]) -> None:
    """A preconditioner for other coils or another mask costs iterations: its spectrum is the diagonal of
    ``F A^T A F^*``, here from the dense matrices."""
    A = MultiCoilMRI(mask(*size, seed=1), birdcage_maps(3, size).to(torch.complex128))
    shape = (2, *size)
    everything = dense(MRI(torch.ones(*size, dtype=F64)), shape, 1)[0]  # F, real and imaginary parts
    matrix = dense(A, shape, 1)[0] @ everything.T
    energy = (matrix.T @ matrix).diagonal().reshape(2, *size)
    spectrum = A.surrogate(torch.zeros(1, *shape, dtype=F64)).lam
    torch.testing.assert_close(spectrum.expand(1, *shape)[0], energy, rtol=0, atol=1e-10)


def test_the_surrogate_saves_iterations() -> None:
    """It costs two transforms per iteration: fewer iterations or it should go."""
    size = (32, 32)
    A = MultiCoilMRI(cartesian_mask(size, 4, 0.1), birdcage_maps(6, size).to(torch.complex128), real=True)
    x_t, sigma_t, sigma_y = randn(1, 1, *size), 3.0, 0.05
    y = A(randn(1, 1, *size, seed=1))
    a, b = sigma_y**2, sigma_t**2
    spent = A.solve(a, b, a * x_t, b * y, unit=a * b)
    A.surrogate = lambda like: None  # type: ignore[method-assign, assignment, return-value]
    plain = A.solve(a, b, a * x_t, b * y, unit=a * b)
    assert bool(spent.converged.all())
    assert spent.iterations <= 0.8 * plain.iterations
    torch.testing.assert_close(spent.x, plain.x, rtol=0, atol=0.05)


def test_one_number_is_a_square() -> None:
    """Half of all calls would fail on the size."""
    assert torch.equal(cartesian_mask(16), cartesian_mask((16, 16)))
    assert torch.equal(radial_mask(16, 3), radial_mask((16, 16), 3))
    assert torch.equal(birdcage_maps(2, 8), birdcage_maps(2, (8, 8)))
