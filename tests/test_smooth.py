"""The smooth estimate, and networks that are shown it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor

import posteriori as po
from posteriori.backbones.photo import PhotoNet
from posteriori.conditioning import Conditioning
from posteriori.denoise import NetworkDenoiser, Scaling
from posteriori.operators import Blur, Downsampling, GaussianBlur, Inpainting, LinearOperator, Nothing, motion_kernel
from posteriori.smooth import smooth_estimate
from posteriori.tiling import TiledBackbone

F64 = torch.float64
SHAPE = (2, 3, 13, 18)
N = math.prod(SHAPE[1:])


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64)


def hole() -> Tensor:
    mask = torch.ones(13, 18)
    mask[2:10, 5:16] = 0
    return mask


OPERATORS: dict[str, Callable[[], LinearOperator]] = {
    "hole": lambda: Inpainting(hole()),
    "random": lambda: Inpainting((randn(2, 1, 13, 18, seed=5) > 0.5).double()),
    "blur": lambda: GaussianBlur(1.2),
    "motion": lambda: Blur(motion_kernel(7, 0.5, 0), "circular"),
    "nothing": Nothing,
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("sigma_y", [0.05, torch.tensor([0.03, 0.2], dtype=F64)], ids=["one", "each"])
def test_estimate_is_the_dense_solution(name: str, sigma_y: float | Tensor) -> None:
    """Another prior, a sample's noise at another's measurement, or a preconditioner that is not symmetric, with which
    conjugate gradients end elsewhere: against the normal equations entry by entry (1e-6 after 300 iterations)."""
    A = OPERATORS[name]()
    y = po.measure(A, randn(*SHAPE, seed=1), 0.1, seed=2)
    found = smooth_estimate(y, A, SHAPE, sigma_y=sigma_y, prior_std=0.6, iterations=300)
    noise = torch.as_tensor(sigma_y, dtype=F64).expand(2)
    eye = torch.eye(N, dtype=F64).reshape(N, *SHAPE[1:])
    D = torch.cat([eye.diff(dim=2).flatten(1), eye.diff(dim=3).flatten(1)], 1).T  # differences of neighbours
    for b in range(2):
        columns = []
        for basis in eye:
            x = torch.zeros(SHAPE, dtype=F64)
            x[b] = basis
            columns.append(A(x)[b].flatten())
        matrix = torch.stack(columns, 1)
        precision = matrix.T @ matrix / noise[b] ** 2 + D.T @ D / (0.6 / 4) ** 2
        rhs = matrix.T @ y[b].flatten() / noise[b] ** 2
        expected = torch.linalg.lstsq(precision, rhs, driver="gelsd").solution.reshape(SHAPE[1:])
        torch.testing.assert_close(found[b], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [32, 50, 64, 161, 256, 700])
def test_holes_of_any_size(size: int) -> None:
    """A large hole would be left grey, or worse: a slope goes on through a hole of half the side as well at 700 as at
    32 pixels (1.5 % of the slope's height, root mean square; half the iterations do for 3 %)."""
    slope = torch.linspace(-0.8, 0.8, size).expand(1, 3, size, size)
    mask = torch.ones(size, size)
    mask[size // 4 : -size // 4, size // 4 : -size // 4] = 0
    A = Inpainting(mask)
    found = smooth_estimate(A(slope), A, (1, 3, size, size), sigma_y=0.05, prior_std=0.5)
    assert float((found - slope).square().mean().sqrt()) < 0.024
    found = smooth_estimate(A(slope), A, (1, 3, size, size), sigma_y=0.05, prior_std=0.5, iterations=8)
    assert float((found - slope).square().mean().sqrt()) < 0.048


@pytest.mark.parametrize("size", [36, 48, 64, 132])
def test_enlarged_without_steps(size: int) -> None:
    """A small photo, enlarged: nearer to a smooth one than by copying pixels, whatever its side is a multiple of."""
    x = torch.linspace(0, 3, size).sin().expand(1, 3, size, size)
    A = Downsampling(4)
    found = smooth_estimate(A(x), A, (1, 3, size, size), sigma_y=0.01, prior_std=0.5)
    copied = A(x).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert float((found - x).square().mean()) < 0.1 * float((copied - x).square().mean())


def test_signals_that_are_no_images() -> None:
    """Must be one clear line."""
    with pytest.raises(ValueError, match="images"):
        smooth_estimate(torch.zeros(1, 1, 8), Inpainting(torch.ones(8)), (1, 1, 8), sigma_y=0.1, prior_std=0.5)


def network(smooth: bool = True) -> PhotoNet:
    net = PhotoNet(3, (8, 12), (1, 1), 16, smooth_input=smooth).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.copy_(torch.randn(p.shape, generator=generator, dtype=F64) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.3))
    return net


def test_network_is_shown_it_once() -> None:
    """The network would see the estimate in other units, or every evaluation would solve for it again."""
    A, y = Inpainting(hole()), randn(*SHAPE, seed=1) * hole()
    seen: list[Conditioning] = []
    denoiser = NetworkDenoiser(network(), po.VE(), Scaling("edm", 0.6))
    denoiser.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    expected = smooth_estimate(y, A, SHAPE, sigma_y=0.1, prior_std=0.6) / 0.6
    first = denoiser(randn(*SHAPE), 5.0, A, y, 0.1)
    denoiser(randn(*SHAPE), 2.0, A, torch.zeros_like(y), 0.1, previous=first)  # another y: the old estimate shows
    for told in seen:
        assert told.smooth is not None
        torch.testing.assert_close(told.smooth, expected, rtol=0, atol=1e-12)
    NetworkDenoiser(network(False), po.VE())(randn(*SHAPE), 5.0, A, y, 0.1)  # is not asked for


def test_widened_is_the_same_function() -> None:
    """Training would start from a damaged network."""
    net = network(False)
    x = randn(*SHAPE)
    told = Conditioning(x.flip(1), x.abs().clamp(max=1), torch.full((2,), 0.05, dtype=F64))
    wide = net.widened().double()
    assert wide.smooth_input
    label = torch.full((2,), 0.3, dtype=F64)
    with_it = Conditioning(told.linear, told.diagonal, told.sigma_y, smooth=randn(*SHAPE, seed=4))
    torch.testing.assert_close(wide(x, label, with_it), net(x, label, told), rtol=0, atol=1e-5)  # kept in float32
    assert wide.config["smooth_input"]


def test_conditioning_is_cut_and_joined() -> None:
    """A tile, or a batch of several problems, would be told of another part of the picture or of another problem."""
    parts = [
        Conditioning(*(randn(2, 3, 8, 8, seed=10 * k + i) for i in range(2)), torch.full((2,), 0.1 * k + 0.1),
                     smooth=randn(2, 3, 8, 8, seed=10 * k + 2))
        for k in range(2)
    ]  # fmt: skip
    joined = Conditioning.join(parts)
    for field in fields(Conditioning):
        values = [getattr(p, field.name) for p in parts]
        value = getattr(joined, field.name)
        assert value is None if values[0] is None else torch.equal(value, torch.cat(values)), field.name
    area = (..., slice(2, 5), slice(1, 7))
    cut = joined.crop(area)
    for name in ("linear", "diagonal", "smooth"):
        assert torch.equal(getattr(cut, name), getattr(joined, name)[area])
    assert torch.equal(cut.known, joined.known)  # of the whole picture


def test_tiles_see_it() -> None:
    """Tiled and untiled would be different photos."""
    net = network()
    x, smooth = randn(1, 3, 96, 128), randn(1, 3, 96, 128, seed=1)
    told = Conditioning(x.flip(1), x.abs().clamp(max=1), torch.full((1,), 0.05, dtype=F64), smooth=smooth)
    label = torch.full((1,), 0.3, dtype=F64)
    tiled = TiledBackbone(net, core=32, halo=net.receptive_radius, blend=4)
    torch.testing.assert_close(tiled(x, label, told), net(x, label, told), rtol=0, atol=1e-6)


def test_it_is_solved_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample of a measurement, and every call, would solve for the same estimate again."""
    calls: list[int] = []

    def counted(y: Tensor, *args: object, **options: object) -> Tensor:
        calls.append(len(y))
        return smooth_estimate(y, *args, **options)  # type: ignore[arg-type]

    for module in ("denoise", "posterior"):
        monkeypatch.setattr(f"posteriori.{module}.smooth_estimate", counted)
    denoiser = NetworkDenoiser(network(), po.VE(), Scaling("edm", 0.6))
    A, y = Inpainting(hole()), randn(*SHAPE, seed=1) * hole()
    posterior = po.ExactPosterior(denoiser, A, y, 0.1)
    posterior.mean()
    samples = po.sample(posterior, n=3, nfe=3, seed=0)
    posterior.denoise_at(randn(*SHAPE), 0.5, 0.5)
    assert calls == [2]
    # with the estimate handed on, copies see their own measurement's
    alone = po.sample(po.ExactPosterior(denoiser, A, y[1:], 0.1), n=1, nfe=3, seed=[0])
    torch.testing.assert_close(po.sample(posterior, n=1, nfe=3, seed=[5, 0])[0, 1], alone[0, 0], rtol=0, atol=1e-5)
    assert samples.shape == (3, *SHAPE)
