"""Pretrained models of diffusers: with nothing measured they are what they were, in every preconditioning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from torch import Tensor, nn

import posteriori as po
from posteriori.backbones import load_pretrained
from posteriori.operators import Nothing

FORMS = ["spectral", "scalar", "paper", "palette"]
SMALL: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}


def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that matter: some classes start with layers at zero, behind which nothing would be tested."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return network.eval()


def unet(**config: Any) -> UNet2DModel:
    return randomise(UNet2DModel(**{"in_channels": 3, "out_channels": 3, "sample_size": 16, **SMALL, **config}))


def noisy(alpha: Tensor, sigma: Tensor, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x_0 = torch.rand(len(alpha), 3, 16, 16, generator=generator) * 2 - 1
    noise = torch.randn(x_0.shape, generator=generator)
    return alpha.reshape(-1, 1, 1, 1).float() * x_0 + sigma.reshape(-1, 1, 1, 1).float() * noise


def error_of(denoiser: po.NetworkDenoiser, form: str, x_t: Tensor, t: Tensor, expected: Tensor) -> float:
    """Largest difference from the original, in units of the noise that the original's own output is multiplied by."""
    denoiser.preconditioning = form  # type: ignore[assignment]
    mean = denoiser(x_t, t, Nothing(), torch.zeros_like(x_t), 0.05).mean
    scale = denoiser.schedule.ratio(t).clamp(min=1).reshape(-1, 1, 1, 1)
    return float(((mean - expected) / scale).abs().max())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler], ids=lambda s: s.__name__)
@torch.no_grad()
def test_ddpm_pipelines(scheduler: Any, prediction: str, form: str, tmp_path: Path) -> None:
    """A pipeline taken over would be another model; the oracle is what its own scheduler makes of the network."""
    own = scheduler(prediction_type=prediction, clip_sample=prediction == "epsilon")
    network = unet()
    pipeline = DDPMPipeline if scheduler is DDPMScheduler else DDIMPipeline
    pipeline(network, own).save_pretrained(tmp_path)
    denoiser = load_pretrained(tmp_path)
    own.set_timesteps(1000)
    steps = torch.tensor([0, 1, 250, 700, 999])
    a = own.alphas_cumprod[steps]
    x_t = noisy(a.sqrt(), (1 - a).sqrt())
    rows = [
        own.step(network(x, i).sample, int(i), x).pred_original_sample for i, x in zip(steps, x_t.split(1), strict=True)
    ]
    t = (steps.double() + 1) / 1000
    assert error_of(denoiser, form, x_t, t, torch.cat(rows)) < 2e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_edm_pipelines(prediction: str, form: str, tmp_path: Path) -> None:
    """EDM's scalars, or the sign of its v-prediction, taken over wrongly."""
    own = EDMEulerScheduler(prediction_type=prediction, sigma_data=0.6)
    network = unet()
    DDPMPipeline(network, own).save_pretrained(tmp_path)
    denoiser = load_pretrained(tmp_path)
    q = torch.tensor([0.002, 0.3, 2.0, 80.0], dtype=torch.float64)
    x_t = noisy(torch.ones_like(q), q)
    rows = []
    for sigma, x in zip(q, x_t.split(1), strict=True):
        f = network(own.precondition_inputs(x, sigma.float()), own.precondition_noise(sigma)).sample
        rows.append(own.precondition_outputs(x, f, sigma.float()))
    assert error_of(denoiser, form, x_t, q, torch.cat(rows)) < 2e-5


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_flow_matching(form: str, tmp_path: Path) -> None:
    """diffusers' flows predict noise - x_0 and are told 1000 t; the step to noise 0 is x_0."""
    own = FlowMatchEulerDiscreteScheduler(shift=3.0)
    network = unet()
    network.save_pretrained(tmp_path / "unet")
    own.save_pretrained(tmp_path / "scheduler")
    denoiser = load_pretrained(tmp_path)
    t = torch.tensor([0.001, 0.3, 0.8, 0.999], dtype=torch.float64)
    x_t = noisy(1 - t, t)
    rows = []
    for sigma, x in zip(t, x_t.split(1), strict=True):
        own.set_timesteps(sigmas=[float(sigma) / (3 - 2 * float(sigma))])  # what shift=3 maps to sigma
        (label,) = own.timesteps
        rows.append(own.step(network(x, label[None]).sample, label, x).prev_sample)
    assert error_of(denoiser, form, x_t, t, torch.cat(rows)) < 2e-5
