"""The photo network: what makes any image size and tiling possible."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import posteriori as po
from posteriori.backbones.photo import PhotoNet
from posteriori.denoise import Conditioning, NetworkDenoiser
from posteriori.operators import GaussianBlur
from posteriori.schedule import VE

F64 = torch.float64


Counts = tuple[int, ...]


def network(channels: Counts = (6, 8), blocks: Counts = (1, 1), up: Counts | None = None) -> PhotoNet:
    """A small network with random weights everywhere: as initialised, its output is zero."""
    net = PhotoNet(1, channels, blocks, embedding=16, up_blocks=up).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        scale = 1 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.3
        p.copy_(torch.randn(p.shape, generator=generator, dtype=F64) * scale)
    return net


def image(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64)


def run(net: PhotoNet, x: Tensor, linear: Tensor | None = None, sigma_y: float = 0.05, c_noise: float = 0.2) -> Tensor:
    batch = x.shape[0]
    linear = x.flip(1) * 0.5 if linear is None else linear
    conditioning = Conditioning(linear, torch.ones_like(x) * 0.7, torch.full((batch,), sigma_y, dtype=F64))
    return net(x, torch.full((batch,), c_noise, dtype=F64), conditioning)


NETWORKS = [((6, 8), (1, 1), None), ((4, 6, 6), (1, 2, 1), None), ((6,), (2,), None), ((6, 8), (1, 1), (2, 3))]
each_network = pytest.mark.parametrize(("channels", "blocks", "up"), NETWORKS, ids=str)


@each_network
def test_shift_by_the_stride_commutes(channels: Counts, blocks: Counts, up: Counts | None) -> None:
    """Tiles at another place would be restored differently: away from borders the network moves with the image."""
    net = network(channels, blocks, up)
    radius, stride = net.receptive_radius, net.stride
    assert stride == 2 ** len(channels)
    size = 2 * (radius + 2 * stride + stride)
    size += -size % stride
    x = image(1, 1, size, size)
    moved = torch.roll(x, (stride, 2 * stride), (-2, -1))
    expected = torch.roll(run(net, x), (stride, 2 * stride), (-2, -1))
    # what lies further than the radius from every border, of the image and of where it was wrapped around
    inner = slice(radius + 2 * stride, size - radius)
    inside = run(net, moved)[..., inner, inner]
    assert inside.numel() > 0
    torch.testing.assert_close(inside, expected[..., inner, inner], rtol=0, atol=1e-12)


@each_network
def test_receptive_radius(channels: Counts, blocks: Counts, up: Counts | None) -> None:
    """Too small a radius leaves seams between tiles, one too large costs time. The support of a pixel's gradient must
    lie within it, and reach it but for less than two strides (the grid of the coarsest level)."""
    net = network(channels, blocks, up)
    radius = net.receptive_radius
    size = 2 * radius + 4 * net.stride + 1
    reach = 0
    for offset in range(net.stride):  # pixels of a block see differently far
        row = size // 2 + offset - net.stride // 2
        x, linear = image(1, 1, size, size).requires_grad_(), image(1, 1, size, size, seed=1).requires_grad_()
        out = run(net, x, linear)[0, 0, row, size // 2]
        for gradient in torch.autograd.grad(out, (x, linear)):
            rows, columns = torch.nonzero(gradient[0, 0], as_tuple=True)
            assert int((rows - row).abs().max()) <= radius
            assert int((columns - size // 2).abs().max()) <= radius
            reach = max(reach, int((rows - row).abs().max()))
    assert reach > radius - 2 * net.stride


@each_network
def test_nothing_travels_further(channels: Counts, blocks: Counts, up: Counts | None) -> None:
    """Statistics over space, of a normalisation or an attention, would let one bright pixel change the whole photo:
    outside the radius not one bit may change, whatever the pixel holds."""
    net = network(channels, blocks, up)
    radius = net.receptive_radius
    x = image(1, 1, 2 * radius + 30, 2 * radius + 30)
    touched = x.clone()
    touched[0, 0, 3, 5] = 1e6
    changed = (run(net, x, 0 * x) != run(net, touched, 0 * x))[0, 0]
    rows, columns = torch.nonzero(changed, as_tuple=True)
    assert len(rows) > 0
    assert int(rows.max()) <= 3 + radius
    assert int(columns.max()) <= 5 + radius


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3), (5, 5), (13, 8), (8, 9)], ids=str)
def test_any_size(size: tuple[int, int]) -> None:
    """Photos whose sides are no multiple of the stride: padded by replication, and cropped again."""
    net = network((4, 6, 6), (1, 1, 1))
    x, linear = image(2, 1, *size), image(2, 1, *size, seed=1)
    out = run(net, x, linear)
    assert out.shape == x.shape
    assert bool(torch.isfinite(out).all())
    bottom, right = -size[0] % net.stride, -size[1] % net.stride

    def padded(v: Tensor) -> Tensor:
        v = torch.cat([v, v[..., -1:, :].expand(-1, -1, bottom, -1)], -2)
        return torch.cat([v, v[..., :, -1:].expand(-1, -1, -1, right)], -1)

    whole = run(net, padded(x), padded(linear))
    torch.testing.assert_close(out, whole[..., : size[0], : size[1]], rtol=0, atol=1e-12)


def test_neighbours_in_a_batch_do_not_matter() -> None:
    """A photo's restoration would depend on which others are restored with it (1e-12)."""
    net = network()
    x = image(3, 1, 17, 12)
    together = run(net, x)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], run(net, x[i : i + 1]), rtol=0, atol=1e-12)
    other = torch.cat([x[:1], 100 * x[1:]])
    torch.testing.assert_close(run(net, other)[:1], together[:1], rtol=0, atol=1e-12)


def test_everything_told_is_used() -> None:
    """A network deaf to the noise levels, or to one of its channels, cannot be the conditional mean."""
    net = network()
    x = image(1, 1, 12, 12)
    base = run(net, x, 0 * x)
    assert float((run(net, x, 0 * x, sigma_y=0.1) - base).abs().max()) > 1e-3
    assert float((run(net, x, 0 * x, c_noise=0.9) - base).abs().max()) > 1e-3
    assert float((run(net, x, 0 * x + 1) - base).abs().max()) > 1e-3
    conditioning = Conditioning(0 * x, 0 * x, torch.full((1,), 0.05, dtype=F64))
    assert float((net(x, torch.full((1,), 0.2, dtype=F64), conditioning) - base).abs().max()) > 1e-3
    labels = torch.tensor([0.2, 0.9], dtype=F64)  # each sample by its own label
    both = Conditioning(
        torch.zeros(2, 1, 12, 12, dtype=F64), 0.7 * torch.ones(2, 1, 12, 12, dtype=F64), 0 * labels + 0.05
    )
    pair = net(x.expand(2, -1, -1, -1), labels, both)
    torch.testing.assert_close(pair[:1], base, rtol=0, atol=1e-12)
    torch.testing.assert_close(pair[1:], run(net, x, 0 * x, c_noise=0.9), rtol=0, atol=1e-12)


def test_starts_as_the_linear_estimate() -> None:
    """An untrained denoiser should be the best linear one, not noise: its output starts at zero."""
    net = PhotoNet(3, (8, 8), (1, 1), embedding=16)
    denoiser = NetworkDenoiser(net, VE())
    A, x_t = GaussianBlur(1.0), torch.randn(2, 3, 9, 10, generator=torch.Generator().manual_seed(0))
    y = po.measure(A, x_t, 0.1, seed=0)
    estimate = po.linear_estimate(x_t, y, A, alpha_t=1.0, sigma_t=2.0, sigma_y=0.1, prior_std=0.5)
    torch.testing.assert_close(denoiser(x_t, 2.0, A, y, 0.1).mean, estimate, rtol=1e-5, atol=1e-6)


def test_config_rebuilds_the_network() -> None:
    """A card would describe another network than the one that was saved."""
    net = PhotoNet(1, (4, 6), (1, 2), embedding=8)
    again = PhotoNet(**net.config)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match="one entry per level"):
        PhotoNet(1, (4, 6), (1,))


def test_deepened_is_the_same_function() -> None:
    """Training would start from a damaged network, or new blocks that never learn: their last weights begin at 0, and
    so must nothing else."""
    net = network((4, 6), (1, 2))
    deeper = net.deepened((2, 2), (1, 4)).double()
    assert (deeper.config["blocks"], deeper.config["up_blocks"]) == ([2, 2], [1, 4])
    assert "up_blocks" not in net.deepened((2, 2)).config
    x = image(2, 1, 12, 20)
    torch.testing.assert_close(run(deeper, x), run(net, x), rtol=0, atol=1e-5)  # weights are kept in float32
    run(deeper, x).square().sum().backward()
    new = [p for name, p in deeper.named_parameters() if name.endswith("second.weight") and not bool(p.any())]
    assert len(new) == 3
    assert all(p.grad is not None and bool(p.grad.any()) for p in new)
    for fewer in ((1, 1), (1, 2, 1)):
        with pytest.raises(ValueError, match=r"\[1, 2\]"):
            net.deepened(fewer)
    with pytest.raises(ValueError, match="one entry per level"):
        PhotoNet(1, (4, 6), (1, 1), 16, up_blocks=(1,))
