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
@pytest.mark.parametrize("rounds", [1, 3])
def test_estimate_is_the_dense_solution(name: str, sigma_y: float | Tensor, rounds: int) -> None:
    """Another prior, a sample's noise at another's measurement, edges in other places, or a preconditioner that is not
    symmetric, with which conjugate gradients end elsewhere: against the normal equations, solved with the weights of
    every round entry by entry (1e-6 after 300 iterations)."""
    A = OPERATORS[name]()
    y = po.measure(A, randn(*SHAPE, seed=1), 0.1, seed=2)
    found = smooth_estimate(y, A, SHAPE, sigma_y=sigma_y, prior_std=0.6, iterations=300, rounds=rounds)
    noise = torch.as_tensor(sigma_y, dtype=F64).expand(2)
    eye = torch.eye(N, dtype=F64).reshape(N, *SHAPE[1:])
    # differences of neighbours, down and right, none across the border
    D = [torch.nn.functional.pad(eye.diff(dim=d), pad).flatten(1).T for d, pad in ((2, (0, 0, 0, 1)), (3, (0, 1)))]
    for b in range(2):
        columns = []
        for basis in eye:
            x = torch.zeros(SHAPE, dtype=F64)
            x[b] = basis
            columns.append(A(x)[b].flatten())
        matrix = torch.stack(columns, 1)
        weights = torch.full((N,), (4 / 0.6) ** 2, dtype=F64)
        expected = torch.zeros(N, dtype=F64)
        for turn in range(rounds):
            if turn:
                squares = sum((d @ expected).square() for d in D).reshape(SHAPE[1:]).sum(0)  # type: ignore[union-attr]
                weights = (2.5 / (squares + 0.0375**2).sqrt()).expand(SHAPE[1:]).flatten()
            precision = matrix.T @ matrix / noise[b] ** 2 + sum(d.T @ (weights[:, None] * d) for d in D)
            rhs = matrix.T @ y[b].flatten() / noise[b] ** 2
            expected = torch.linalg.lstsq(precision, rhs, driver="gelsd").solution
        torch.testing.assert_close(found[b], expected.reshape(SHAPE[1:]), rtol=0, atol=1e-6)


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
    found = smooth_estimate(A(slope), A, (1, 3, size, size), sigma_y=0.05, prior_std=0.5, iterations=4)
    assert float((found - slope).square().mean().sqrt()) < 0.048


@pytest.mark.parametrize(("height", "width"), [(16, 1024), (1, 256), (130, 520), (5, 3), (1, 1)])
def test_pictures_of_any_shape(height: int, width: int) -> None:
    """A gap across a long thin picture would stay grey, or a picture of one pixel be divided by zero."""
    slope = torch.linspace(-0.8, 0.8, width).expand(1, 3, height, width)
    mask = torch.ones(height, width)
    if width > 4:
        mask[:, width // 4 : -(width // 4)] = 0
    A = Inpainting(mask)
    for picture, turned in ((slope, A), (slope.mT, Inpainting(mask.mT))):
        found = smooth_estimate(turned(picture), turned, picture.shape, sigma_y=0.05, prior_std=0.5)
        assert float((found - picture).square().mean().sqrt()) < 0.024


@pytest.mark.parametrize("size", [36, 48, 64, 132])
def test_enlarged_without_steps(size: int) -> None:
    """A small photo, enlarged: nearer to a smooth one than by copying pixels, whatever its side is a multiple of."""
    x = torch.linspace(0, 3, size).sin().expand(1, 3, size, size)
    A = Downsampling(4)
    copied = A(x).repeat_interleave(4, 2).repeat_interleave(4, 3)
    membrane = smooth_estimate(A(x), A, (1, 3, size, size), sigma_y=0.01, prior_std=0.5, iterations=16, rounds=1)
    assert float((membrane - x).square().mean()) < 0.1 * float((copied - x).square().mean())
    found = smooth_estimate(A(x), A, (1, 3, size, size), sigma_y=0.01, prior_std=0.5)
    share = {36: 0.25, 48: 0.2, 64: 0.14, 132: 0.06}[size]  # the steps that an edge-preserving estimate gives slopes
    assert float((found - x).square().mean()) < share * float((copied - x).square().mean())


@pytest.mark.parametrize(
    "A",
    [GaussianBlur(2.0), Blur(motion_kernel(15, 0.5, 0), "circular"), Inpainting((randn(64, 64) > 0.5).float())],
    ids=["blur", "motion", "random"],
)
def test_edges_are_kept(A: LinearOperator) -> None:
    """Edges would stay as blurred as a membrane leaves them: three quarters of its squared error are asked for on two
    flat areas."""
    x = torch.full((1, 3, 64, 64), -0.5)
    x[..., 22:, 10:50] = 0.5
    y = po.measure(A, x, 0.02, seed=0)
    errors = [
        float((smooth_estimate(y, A, x.shape, sigma_y=0.02, prior_std=0.5, rounds=k) - x).square().mean())
        for k in (1, 3)
    ]
    assert errors[1] < 0.75 * errors[0], errors


def test_scales_by_matrices_and_by_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures on either side of the size from which matrices no longer pay would be preconditioned differently."""
    A, y = Inpainting(hole()), randn(*SHAPE, seed=1) * hole()
    found = []
    for largest in (128, 8, 1):
        monkeypatch.setattr("posteriori.smooth.LARGEST_MATRIX", largest)
        found.append(smooth_estimate(y, A, SHAPE, sigma_y=0.1, prior_std=0.5, iterations=3))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=1e-10)


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


def test_gain_reaches_the_mean() -> None:
    """The smooth estimate would have to pass the whole network: with a gain of 1 and nothing else, at the largest
    noise, it is the mean where nothing was measured (2 % of the estimate, for c_out(80) is not quite s)."""
    A, y = Inpainting(hole()), randn(*SHAPE, seed=1) * hole()
    net = network()
    for p in (*net.head.parameters(), *net.readout.parameters()):
        p.zero_()
    assert net.readout.bias is not None
    net.readout.bias[-4:] = 1  # the four pixels of a block
    mean = NetworkDenoiser(net, po.VE(), Scaling("edm", 0.6))(torch.zeros(SHAPE, dtype=F64), 80.0, A, y, 0.1).mean
    expected = smooth_estimate(y, A, SHAPE, sigma_y=0.1, prior_std=0.6)
    missing = (hole() == 0).expand(SHAPE)
    torch.testing.assert_close(mean[missing], expected[missing], rtol=0, atol=0.02 * float(expected[missing].std()))


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

    monkeypatch.setattr("posteriori.denoise.smooth_estimate", counted)
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
