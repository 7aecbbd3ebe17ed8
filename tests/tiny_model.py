"""Networks small enough for tests, saved as a model that the commands can load and as a pipeline of diffusers."""

from __future__ import annotations

from pathlib import Path

import torch

from posteriori import checkpoint
from posteriori.backbones.photo import PhotoNet
from posteriori.denoise import NetworkDenoiser, Scaling
from posteriori.schedule import VE


def tiny_network(seed: int = 0) -> PhotoNet:
    """Random weights throughout: a fresh network's output layer is zero, and would hide every mistake."""
    torch.manual_seed(seed)
    network = PhotoNet(channels=(8, 16), blocks=(1, 1), embedding=16)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def save_tiny_model(folder: Path) -> Path:
    network = tiny_network()
    denoiser = NetworkDenoiser(network, VE(), Scaling(), sigma_y_range=(0.01, 0.2))
    card = {
        "name": "tiny",
        "network": {"kind": "photo", **network.config},
        "schedule": VE().config(),
        "scaling": {"kind": "edm", "data_std": 0.5},
        "preconditioning": "spectral",
        "sigma_y_range": [0.01, 0.2],
        "value_range": [-1, 1],
        "tasks": {"denoise": 1.0},
        "training_data": {"description": "none"},
    }
    checkpoint.save(denoiser, folder, card)
    return folder


def save_tiny_pipeline(folder: Path, size: int = 32) -> Path:
    """An unconditional diffusers pipeline, random weights."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    network = UNet2DModel(size, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **blocks)
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder)
    return folder
