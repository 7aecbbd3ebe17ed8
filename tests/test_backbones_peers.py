"""Denoisers of deepinv and azula: with nothing measured they are what they were, in every preconditioning.

Skipped where the package, or the torchvision it imports, does not fit the installed torch.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import posteriori as po
from posteriori.backbones import load_pretrained
from posteriori.backbones.wrapped import guided_diffusion_table
from test_backbones import QS, TinyNet, answer, error_of, noisy, randomise, trained

NCSN = {"img_resolution": 16, "model_channels": 32, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (8,)}
ADM = {"img_resolution": 16, "model_channels": 64, "channel_mult": (1, 1), "num_blocks": 1, "attn_resolutions": (8,)}
OURS = {"pixel_std": 0.5, "_was_trained_on_minus_one_one": True}


@pytest.fixture(scope="module")
def azula() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import azula.denoise
            import azula.plugins.adm._src.unet
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"azula cannot be imported ({error}): pip install 'posteriori[azula]'")
    return azula


def at(q: Tensor) -> Tensor:
    return noisy(torch.ones_like(q), q)


@pytest.mark.parametrize("trained", [OURS, {}], ids=["-1 to 1", "0 to 1"])
@pytest.mark.parametrize("model_type", ["ncsn", "ddpm"])
@torch.no_grad()
def test_deepinv_ncsnpp(deepinv: Any, model_type: str, trained: dict[str, Any]) -> None:
    """The network of EDM's weights for faces, asked in the wrong range or at the wrong scale."""
    config = {**NCSN, "model_type": model_type, **trained}
    network = randomise(deepinv.models.NCSNpp(**config, pretrained=None))
    x = at(QS)
    expected = 2 * network((x + 1) / 2, QS.float() / 2) - 1
    assert error_of(load_pretrained(network), x, QS, expected) < 2e-5


@torch.no_grad()
def test_deepinv_admunet_with_classes(deepinv: Any) -> None:
    """The network of EDM's ImageNet weights loses its classes."""
    network = randomise(deepinv.models.ADMUNet(**ADM, **OURS, label_dim=5, pretrained=None))
    classes = torch.tensor([0, 3, 4, 1])
    x = at(QS)
    told = torch.nn.functional.one_hot(classes, 5)
    expected = network(x, QS.float(), class_labels=told, input_in_minus_one_one=True)
    assert error_of(load_pretrained(network, labels=classes.tolist()), x, QS, expected) < 2e-5


@torch.no_grad()
def test_deepinv_precondition_and_any_denoiser(deepinv: Any) -> None:
    """Its denoisers take images in [0, 1]; ours are in [-1, 1]."""
    network = randomise(deepinv.models.DnCNN(in_channels=3, out_channels=3, depth=4, nf=8, pretrained=None))
    denoiser = load_pretrained(network, schedule=po.VE(0.01, 1.0))
    q = torch.tensor([0.01, 0.2, 0.6, 1.0], dtype=torch.float64)
    assert error_of(denoiser, at(q), q, 2 * network((at(q) + 1) / 2, q.float() / 2) - 1) < 2e-5


@pytest.mark.slow
@torch.no_grad()
def test_deepinv_diffunet(deepinv: Any) -> None:
    """guided-diffusion's network in deepinv: noise and a variance, at a step."""
    network = randomise(deepinv.models.DiffUNet(pretrained=None))
    denoiser = load_pretrained(network, clip=None)
    step = 400
    a = torch.tensor([guided_diffusion_table("linear", 1000)[step]], dtype=torch.float64)
    x_t = torch.nn.functional.interpolate(noisy(a.sqrt(), (1 - a).sqrt()), scale_factor=2)
    noise = network(x_t, torch.tensor([float(step)]), type_t="timestep")[:, :3]
    expected = (x_t - (1 - a).sqrt().float() * noise) / a.sqrt().float()
    assert error_of(denoiser, x_t, torch.tensor([(step + 1) / 1000], dtype=torch.float64), expected) < 2e-5


@pytest.mark.parametrize("name", ["SimpleDenoiser", "KarrasDenoiser"])
@pytest.mark.parametrize("schedule", ["VPSchedule", "VESchedule", "RectifiedSchedule"])
@torch.no_grad()
def test_azula_denoisers(azula: Any, schedule: str, name: str) -> None:
    """Its own time and scale of every noise level, found from the level alone."""
    own = getattr(azula.noise, schedule)()
    network = getattr(azula.denoise, name)(randomise(TinyNet()), own)
    denoiser = load_pretrained(network)
    t = torch.tensor([0.05, 0.3, 0.5, 0.7], dtype=torch.float64)
    alpha, sigma = own(t)
    x_t = noisy(alpha, sigma)
    expected = network(x_t, t.float()).mean
    q = sigma / alpha
    assert error_of(denoiser, x_t / alpha.reshape(-1, 1, 1, 1).float(), q, expected) < 5e-5


@torch.no_grad()
def test_guided_diffusion(azula: Any) -> None:
    """OpenAI's own UNetModel (in azula's copy): steps, classes and learned variance."""
    network = azula.plugins.adm._src.unet.UNetModel(
        image_size=16, in_channels=3, model_channels=32, out_channels=6, num_res_blocks=1, attention_resolutions=(2,),
        channel_mult=(1, 2), num_classes=5, num_heads=2, use_scale_shift_norm=True, resblock_updown=True,
    )  # fmt: skip
    network = randomise(network)
    for noise_schedule in ("linear", "cosine"):
        denoiser = load_pretrained(
            network, kind="guided-diffusion", noise_schedule=noise_schedule, labels=2, clip=None
        )  # fmt: skip
        steps = torch.tensor([0, 100, 500, 900])
        a = torch.tensor(guided_diffusion_table(noise_schedule, 1000), dtype=torch.float64)[steps]
        x_t = noisy(a.sqrt(), (1 - a).sqrt())
        noise = network(x_t, steps, y=torch.full((4,), 2))[:, :3]
        a_b = a.reshape(-1, 1, 1, 1).float()
        expected = (x_t - (1 - a_b).sqrt() * noise) / a_b.sqrt()
        assert error_of(denoiser, x_t, (steps.double() + 1) / 1000, expected) < 2e-5


def test_fine_tuned_deepinv_and_azula(deepinv: Any, azula: Any, tmp_path: Path) -> None:
    """deepinv's networks are made again from the card alone, azula's need the denoiser itself."""
    config = {**ADM, **OURS, "label_dim": 5}
    network = deepinv.models.ADMUNet(**config, pretrained=None)
    denoiser = trained(load_pretrained(network, config=config, labels=3))
    po.save(denoiser, tmp_path / "adm")
    assert torch.equal(answer(po.load(tmp_path / "adm")), answer(denoiser))
    own = azula.denoise.KarrasDenoiser(TinyNet(), azula.noise.VPSchedule())
    denoiser = trained(load_pretrained(own))
    po.save(denoiser, tmp_path / "karras")
    again = azula.denoise.KarrasDenoiser(TinyNet(), azula.noise.VPSchedule())
    assert torch.equal(answer(po.load(tmp_path / "karras", network=again)), answer(denoiser))
