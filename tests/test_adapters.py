"""deepinv's physics as operators, and exact posterior sampling as its reconstructor.

Each test needs deepinv, and is skipped where it, or the torchvision it imports, does not fit the installed torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable as Function
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from posteriori.adapters import as_operator, from_deepinv, to_deepinv
from posteriori.operators import Callable, GaussianBlur, LinearOperator, Matrix, MultiCoilMRI, check
from posteriori.operators.algebra import Permuted
from posteriori.priors import GaussianMixture

SHAPE = (3, 24, 32)
SHAPE_2 = (2, 16, 16)  # of those that take squares, or powers of two


def kernel(*size: int) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(1)) - 0.2


def gaussian(size: int = 7, width: float = 1.5) -> torch.Tensor:
    taps = torch.exp(-0.5 * ((torch.arange(size) - size // 2) / width) ** 2)
    return torch.outer(taps, taps)[None, None] / taps.sum() ** 2


MASK = (torch.rand(2, 1, 24, 32, generator=torch.Generator().manual_seed(2)) > 0.6).float()

# deepinv.physics -> physics, and what its operator is solved by
PHYSICS: dict[str, tuple[Function[[Any], Any], str]] = {
    "denoising": (lambda p: p.Denoising(), "exact (diagonal)"),
    "inpainting": (lambda p: p.Inpainting(SHAPE, MASK[0]), "exact (diagonal)"),
    "a mask per sample": (lambda p: p.Inpainting(SHAPE, MASK), "exact (diagonal)"),
    "weights": (lambda p: p.Inpainting(SHAPE, 0.3 + MASK[0]), "exact (diagonal)"),
    "demosaicing": (lambda p: p.Demosaicing(SHAPE[1:]), "exact (diagonal)"),
    "circular, odd kernel": (lambda p: p.BlurFFT(SHAPE, kernel(1, 1, 5, 7)), "exact (fft)"),
    "circular, even kernel": (lambda p: p.BlurFFT(SHAPE, kernel(1, 1, 4, 5)), "exact (fft)"),
    "circular, as convolution": (lambda p: p.Blur(kernel(1, 1, 5, 4), "circular"), "exact (fft)"),
    "a kernel per sample": (lambda p: p.Blur(kernel(2, 1, 5, 5), "circular"), "exact (fft)"),
    "Gaussian, reflect": (lambda p: p.Blur(gaussian(), "reflect"), "exact (kronecker-svd)"),
    "Gaussian, replicate": (lambda p: p.Blur(gaussian(), "replicate"), "exact (kronecker-svd)"),
    "Gaussian, zeros": (lambda p: p.Blur(gaussian(6), "zeros"), "exact (kronecker-svd)"),
    "decimation": (lambda p: p.Downsampling(SHAPE, None, factor=2), "exact (kronecker-svd)"),
    "x2 Gaussian": (lambda p: p.Downsampling(SHAPE, "gaussian", factor=2), "exact (kronecker-svd)"),
    "x4 bicubic": (lambda p: p.Downsampling(SHAPE, "bicubic", factor=4, padding="reflect"), "exact (kronecker-svd)"),
    "x2 odd filter": (lambda p: p.Downsampling(SHAPE, gaussian(5), factor=2), "exact (kronecker-svd)"),
    "valid": (lambda p: p.Blur(kernel(1, 1, 4, 5), "valid"), ""),
    "a kernel per channel": (lambda p: p.BlurFFT(SHAPE, kernel(1, 3, 5, 5)), ""),
    "Gaussian, valid": (lambda p: p.Blur(gaussian(), "valid"), "exact (kronecker-svd)"),
    "x2 Gaussian, valid": (lambda p: p.Downsampling(SHAPE, gaussian(6), 2, padding="valid"), "exact (kronecker-svd)"),
    "x4 any filter": (lambda p: p.Downsampling(SHAPE, kernel(1, 1, 5, 7), factor=4), "exact (polyphase)"),
    "x2 even filter": (lambda p: p.Downsampling(SHAPE, kernel(1, 1, 4, 6), factor=2), "exact (polyphase)"),
    "grayscale": (lambda p: p.Decolorize(), "exact (channels)"),
    "single pixel": (lambda p: p.SinglePixelCamera(200, SHAPE_2, ordering="zig_zag"), "exact (hadamard)"),
    "random matrix": (lambda p: p.CompressedSensing(40, SHAPE_2), "exact (svd)"),
    "tomography": (lambda p: p.Tomography(5, 16, normalize=True), "cg"),
    "composition": (lambda p: p.Downsampling(SHAPE, None, factor=2) * p.Blur(gaussian(), "circular"), ""),
}


@pytest.mark.parametrize("name", PHYSICS)
def test_a_physics_is_its_operator(deepinv: Any, name: str) -> None:
    """Another centre, border or order of channels than deepinv's: everything restored would be shifted or worse."""
    make, solver = PHYSICS[name]
    physics = make(deepinv.physics)
    shape = SHAPE_2 if name in ("single pixel", "random matrix", "tomography") else SHAPE
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # that the adjoint had to be replaced
        A = from_deepinv(physics, shape)
    if solver:
        assert A.solver == solver
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(3))
    y = A(x)
    torch.testing.assert_close(y, physics.A(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(A.adjoint(y), physics.A_adjoint(y), rtol=1e-3, atol=1e-4)
    check(A, shape)


def test_single_coil_mri(deepinv: Any) -> None:
    """k-space shifted by half its size, or real and imaginary part exchanged."""
    masks = MASK.expand(-1, 2, -1, -1)
    for mask in (masks[:1], masks):
        physics = deepinv.physics.MRI(mask=mask, img_size=(2, 24, 32))
        A = from_deepinv(physics, (2, 24, 32))
        assert A.solver == "exact (fft)"
        x = torch.rand(2, 2, 24, 32, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(A(x), physics.A(x), rtol=1e-4, atol=1e-5)
        check(A, (2, 24, 32))


def test_several_coils(deepinv: Any) -> None:
    """Coils in the place of real and imaginary parts, sensitivities conjugated, or a solve that stops early."""
    shape, masks = (2, 24, 32), MASK.expand(-1, 2, -1, -1)
    maps = torch.randn(1, 3, 24, 32, dtype=torch.complex64, generator=torch.Generator().manual_seed(4))
    for mask in (masks[:1], masks):
        physics = deepinv.physics.MultiCoilMRI(mask=mask, coil_maps=maps)
        A = from_deepinv(physics, shape, tolerance=1e-6)
        assert isinstance(A, Permuted)
        assert isinstance(A.operator, MultiCoilMRI)
        assert A.operator.tolerance == 1e-6
        x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(3))
        y = physics.A(x)
        torch.testing.assert_close(A(x), y, rtol=1e-4, atol=1e-5)
        assert A.signal_shape(y.shape[1:]) == shape
        observed = A.observed(y)
        assert observed is not None
        assert torch.equal(observed, mask[:, :, None].expand(2, 2, 3, -1, -1))
        check(A, shape)
        expected = proximal_step(deepinv, physics, x, y.flip(-1), gamma=20.0)
        torch.testing.assert_close(A.gram_solve(0.05, 1.0, 0.05 * x, y.flip(-1)), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["inpainting", "circular, odd kernel", "Gaussian, reflect", "x4 bicubic", "valid"])
def test_the_solve_is_deepinvs_proximal_step(deepinv: Any, name: str) -> None:
    """``prox_l2(z, y, gamma) = (I/gamma + A^T A)^-1 (z/gamma + A^T y)``: two libraries, one system (1e-3)."""
    physics = PHYSICS[name][0](deepinv.physics)
    z = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(4))
    y = physics.A(z.flip(-1))
    expected = proximal_step(deepinv, physics, z, y, gamma=20.0)
    found = from_deepinv(physics, SHAPE, tolerance=1e-6).gram_solve(0.05, 1.0, 0.05 * z, y)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def proximal_step(deepinv: Any, physics: Any, z: torch.Tensor, y: torch.Tensor, gamma: float) -> torch.Tensor:
    """By conjugate gradients, whatever closed form the physics has."""
    result: torch.Tensor = deepinv.physics.LinearPhysics.prox_l2(
        physics, z, y, gamma, solver="CG", max_iter=500, tol=1e-7
    )
    return result


def test_updates_of_the_physics_do_not_reach_the_operator(deepinv: Any) -> None:
    """Operators are immutable; deepinv's physics change when they are called with parameters."""
    physics = deepinv.physics.Inpainting(SHAPE, MASK[0])
    valid = deepinv.physics.Blur(kernel(1, 1, 4, 5), "valid")
    x = torch.rand(1, *SHAPE)
    for p, change in ((physics, {"mask": 1 - MASK[:1]}), (valid, {"filter": kernel(1, 1, 5, 5)})):
        A = from_deepinv(p, SHAPE)
        before = A(x)
        p.update(**change)
        assert torch.equal(A(x), before)


def test_an_adjoint_that_is_none_is_replaced(deepinv: Any) -> None:
    """Solves and gradients with a wrong adjoint go wrong without a word."""
    physics = deepinv.physics.LinearPhysics(A=lambda x, **_: x.cumsum(-1), A_adjoint=lambda y, **_: y)
    with pytest.warns(RuntimeWarning, match="not the transpose"):
        A = from_deepinv(physics, SHAPE)
    check(A, SHAPE)


def test_float32_only(deepinv: Any) -> None:
    """A physics that holds float32 where nobody can reach it is solved in float32, not refused."""
    matrix = kernel(20, 30)
    physics = deepinv.physics.LinearPhysics(A=lambda x, **_: x @ matrix.T, A_adjoint=lambda y, **_: y @ matrix)
    A = from_deepinv(physics, (30,))
    check(A, (30,))
    x = torch.rand(2, 30, dtype=torch.float64)
    torch.testing.assert_close(A(x), x @ matrix.double().T, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_converted(deepinv: Any) -> None:
    """A phase would be dropped, a nonlinear measurement restored as a linear one."""
    for physics in (deepinv.physics.Haze(), None):
        with pytest.raises(ValueError, match="not a linear physics"):
            from_deepinv(physics, SHAPE)
    with pytest.raises(ValueError, match="does not take images"):
        from_deepinv(deepinv.physics.Inpainting(SHAPE, MASK[0]), (3, 5, 5))
    with pytest.raises(ValueError, match="one real tensor"):
        from_deepinv(deepinv.physics.stack(deepinv.physics.Denoising(), deepinv.physics.Denoising()), SHAPE)


# -- the reconstructor ------------------------------------------------------------------------------------------------

IMAGE = (1, 4, 4)


def prior() -> GaussianMixture:
    """Of images in [-1, 1], far from symmetric, so that a wrong offset shows."""
    generator = torch.Generator().manual_seed(5)
    means = torch.rand(2, 16, generator=generator, dtype=torch.float64) * 0.8
    weights, variances = torch.tensor([0.4, 0.6]).double(), torch.tensor([0.05, 0.02]).double()
    return GaussianMixture(weights, means, variances, shape=IMAGE)


def exact_mean(matrix: np.ndarray[Any, Any], v: np.ndarray[Any, Any], s: float) -> np.ndarray[Any, Any]:
    """Posterior mean of an image in [0, 1] from ``v = A z + s noise``: the mixture moved to [0, 1]; no operator of
    ours, no change of units of a measurement."""
    p = prior()
    weights, means = p.weights.numpy(), (p.means.reshape(2, 16).numpy() + 1) / 2
    variances = np.array([0.05, 0.02]) / 4
    logs, posteriors = [], []
    for w, m, c in zip(weights, means, variances, strict=True):
        marginal = c * matrix @ matrix.T + s**2 * np.eye(len(matrix))
        r = v - matrix @ m
        logs.append(np.log(w) - 0.5 * (r @ np.linalg.solve(marginal, r) + np.linalg.slogdet(marginal)[1]))
        posteriors.append(m + c * matrix.T @ np.linalg.solve(marginal, r))
    share = np.exp(np.array(logs) - max(logs))
    result: np.ndarray[Any, Any] = share @ np.array(posteriors) / share.sum()
    return result


@pytest.mark.parametrize("name", ["inpainting", "blur", "functions"])
def test_the_reconstructor_is_the_exact_posterior_mean(deepinv: Any, name: str) -> None:
    """The change from [0, 1] to [-1, 1] done wrongly: a grey veil, or noise of half the level (oracle: the mixture in
    [0, 1] by dense linear algebra; 1e-3 of the range)."""
    noise = deepinv.physics.GaussianNoise(0.1)
    physics = {
        "inpainting": lambda: deepinv.physics.Inpainting(IMAGE, (torch.arange(16) % 3 > 0).float().reshape(IMAGE)),
        "blur": lambda: deepinv.physics.Blur(gaussian(3), "reflect"),
        "functions": lambda: deepinv.physics.LinearPhysics(
            A=lambda x, **_: x.cumsum(-1), A_adjoint=lambda y, **_: y.flip(-1).cumsum(-1).flip(-1)
        ),
    }[name]()
    physics.noise_model = noise
    eye = torch.eye(16).reshape(16, *IMAGE)
    matrix = torch.cat([physics.A(e[None]) for e in eye]).flatten(1).T.double().numpy()
    z = torch.rand(3, *IMAGE, generator=torch.Generator().manual_seed(6))
    y = physics(z)
    model = to_deepinv(prior())
    assert isinstance(model, deepinv.models.Reconstructor)
    found = model(y, physics)
    assert found.shape == z.shape
    for i in range(3):
        expected = exact_mean(matrix, y[i].flatten().double().numpy(), 0.1)
        np.testing.assert_allclose(found[i].flatten().numpy(), expected, atol=1e-3)


def test_noise_per_sample_and_samples(deepinv: Any) -> None:
    """All images restored at one noise level; samples that do not scatter around the mean."""
    physics = deepinv.physics.Denoising(deepinv.physics.GaussianNoise(torch.tensor([0.05, 0.3])))
    y = physics(torch.full((2, *IMAGE), 0.6))
    mean = to_deepinv(prior())(y, physics)
    for i, s in enumerate((0.05, 0.3)):
        np.testing.assert_allclose(
            mean[i].flatten().numpy(), exact_mean(np.eye(16), y[i].flatten().double().numpy(), s), atol=1e-3
        )
    samples = torch.stack([to_deepinv(prior(), nfe=20, seed=i)(y, physics) for i in range(40)])
    assert samples.shape == (40, 2, *IMAGE)
    # 5 Monte Carlo standard errors
    error = (samples.mean(0) - mean).abs() / (samples.std(0) / 40**0.5)
    assert float(error.max()) < 5


def test_other_noise_is_refused(deepinv: Any) -> None:
    """Poisson noise taken for Gaussian noise of some level."""
    physics = deepinv.physics.Denoising(deepinv.physics.PoissonNoise(0.1))
    with pytest.raises(ValueError, match="Gaussian noise"):
        to_deepinv(prior())(torch.rand(1, *IMAGE), physics)


# -- whatever it is ---------------------------------------------------------------------------------------------------


def test_as_operator(deepinv: Any) -> None:
    """A matrix, a sparse matrix or a physics named on the command line would not be found to be one."""
    matrix = np.arange(6.0).reshape(2, 3)
    for thing in (matrix, sparse.csr_array(matrix), torch.from_numpy(matrix)):
        A = as_operator(thing)
        assert isinstance(A, Matrix)
        torch.testing.assert_close(A(torch.eye(3).double()).T, torch.from_numpy(matrix))
    blur = GaussianBlur(1.0)
    assert as_operator(blur) is blur
    assert as_operator("a word") is None
    found = as_operator(deepinv.physics.Decolorize(), SHAPE)
    assert isinstance(found, LinearOperator)
    with pytest.raises(ValueError, match="shape"):
        as_operator(deepinv.physics.Decolorize())


def test_a_wrong_adjoint_is_refused_on_its_first_use() -> None:
    """A restoration that is wrong without a word, because the user's transpose is not one."""
    x = torch.rand(1, 50, 60)
    for adjoint, words in (
        (lambda y: 1.001 * y.flip(-1).cumsum(-1).flip(-1), "differ by"),
        (lambda y: y.cumsum(-1), "differ by"),
        (lambda y: y[:, :3], r"gives shape \(3, 60\)"),
    ):
        A = Callable(lambda x: x.cumsum(-1), adjoint, shape=(50, 60))
        with pytest.raises(ValueError, match=words):
            A.gram_solve(1.0, 1.0, y=x)
    Callable(lambda x: x.cumsum(-1), lambda y: y.flip(-1).cumsum(-1).flip(-1), shape=(50, 60)).gram_solve(1.0, 1.0, y=x)
