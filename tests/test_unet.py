"""diffusers' UNet2DModel as a backbone."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DModel

import posteriori as po
from posteriori.backbones.unet import UNetBackbone
from posteriori.checkpoint import load, save
from posteriori.denoise import Conditioning, Scaling

SMALL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def conditioning(shape: tuple[int, ...]) -> Conditioning:
    return Conditioning(torch.randn(shape), torch.rand(shape), torch.rand(shape[0]) + 0.1)


def test_extending_a_pretrained_unet_keeps_its_function():
    """Fine-tuning would start from a damaged network if the new channels had weight, or the old ones moved."""
    torch.manual_seed(0)
    original = UNet2DModel(in_channels=3, out_channels=3, **SMALL)
    extended = UNetBackbone.from_pretrained(original)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 500.0])
    expected = original(x, t).sample
    for seed in range(2):
        torch.manual_seed(seed)
        assert torch.allclose(extended(x, t, conditioning((2, 3, 16, 16))), expected, atol=1e-6)


def test_the_new_channels_can_be_learned():
    """Zero weights that get no gradient would leave the network blind to the measurement for ever."""
    extended = UNetBackbone.from_pretrained(UNet2DModel(in_channels=3, out_channels=3, **SMALL))
    out = extended(torch.randn(2, 3, 16, 16), torch.tensor([1.0, 2.0]), conditioning((2, 3, 16, 16)))
    out.square().sum().backward()
    gradient = extended.network.conv_in.weight.grad
    assert gradient is not None
    assert bool((gradient[:, 3:].abs().amax((0, 2, 3)) > 0).all())


@pytest.mark.parametrize("conditioned", [False, True])
def test_widened_by_the_smooth_estimate(conditioned, tmp_path):
    """Training would start from a damaged network, or after loading the inputs would be in other places."""
    torch.manual_seed(0)
    shape = (2, 3, 16, 16)
    plain = UNet2DModel(in_channels=3, out_channels=3, **SMALL)
    start = UNetBackbone(3, **SMALL) if conditioned else UNetBackbone(3, conditioned=False, **SMALL)
    if not conditioned:
        start.network.load_state_dict(plain.state_dict())
    wide = start.widened() if conditioned else UNetBackbone.from_pretrained(plain, smooth_input=True)
    told = conditioning(shape)
    shown = Conditioning(told.linear, told.diagonal, told.sigma_y, smooth=torch.randn(shape))
    x, t = torch.randn(shape), torch.tensor([0.3, 1.0])
    torch.testing.assert_close(wide(x, t, shown), start(x, t, told), atol=1e-6, rtol=0)
    wide(x, t, shown).square().sum().backward()
    gradient = wide.network.conv_in.weight.grad
    assert gradient is not None
    assert bool((gradient.abs().amax((0, 2, 3)) > 0).all())
    torch.nn.init.normal_(wide.network.conv_in.weight)
    denoiser = po.NetworkDenoiser(wide, po.VE(), Scaling("edm", 0.5))
    assert denoiser.smooth_input
    save(denoiser, tmp_path / "model", {"name": "wide", "value_range": [-1, 1], "tasks": {}, "training_data": {}})
    again = load(tmp_path / "model")
    assert again.smooth_input
    torch.testing.assert_close(again.backbone(x, t, shown), wide(x, t, shown), atol=0, rtol=0)


def test_learned_variance_is_dropped():
    """Its second half of channels is a variance; taken for the mean it would give nonsense."""
    original = UNet2DModel(in_channels=3, out_channels=6, **SMALL)
    extended = UNetBackbone.from_pretrained(original)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 500.0])
    expected = original(x, t).sample[:, :3]
    torch.testing.assert_close(extended(x, t, conditioning((2, 3, 16, 16))), expected, atol=1e-6, rtol=0)


def test_a_model_of_something_else_is_refused():
    """A conditional model's other inputs would be filled with the image's channels."""
    with pytest.raises(ValueError, match="plain images"):
        UNetBackbone.from_pretrained(UNet2DModel(in_channels=6, out_channels=3, **SMALL))


def test_a_plain_unet_ignores_the_conditioning():
    """An unconditional network must be usable as it is, as the prior of training-free methods."""
    plain = UNetBackbone(3, conditioned=False, **SMALL)
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([0.3])
    a, b = (plain(x, t, conditioning((1, 3, 16, 16))) for _ in range(2))
    assert torch.equal(a, b)


def test_checkpoint_round_trip(tmp_path):
    """A saved UNet denoiser that loads as something else would restore silently wrong pictures."""
    torch.manual_seed(0)
    denoiser = po.NetworkDenoiser(UNetBackbone(3, **SMALL), po.VE(), Scaling("edm", 0.5))
    card = {
        "name": "small", "network": {"kind": "unet2d", "image_channels": 3, **{k: list(v) if isinstance(v, tuple) else v
                                                                             for k, v in SMALL.items()}},
        "schedule": po.VE().config(), "scaling": {"kind": "edm", "data_std": 0.5}, "preconditioning": "spectral",
        "sigma_y_range": [0.01, 0.2], "value_range": [-1, 1], "tasks": {}, "training_data": {},
    }  # fmt: skip
    save(denoiser, tmp_path, card)
    loaded = load(tmp_path)
    A = po.operators.Downsampling(2)
    y = po.measure(A, torch.rand(1, 3, 16, 16), 0.05, seed=0)
    expected = po.ExactPosterior(denoiser.eval(), A, y, 0.05).mean()
    assert torch.allclose(po.ExactPosterior(loaded, A, y, 0.05).mean(), expected, atol=1e-6)
