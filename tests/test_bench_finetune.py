"""Fine-tuning against training from scratch: every form has to start where the pretrained model stands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from posteriori.bench import finetune
from posteriori.operators import Inpainting, Nothing

X_T = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 4
T = torch.tensor([4.0, 0.3])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as diffusers saves it, with weights that are not small."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("base") / "unet"
    network = UNet2DModel(in_channels=3, out_channels=3, **finetune.unet())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [n for n, form in finetune.FORMS.items() if form.pretrained])
def test_fine_tuning_starts_from_the_pretrained_denoiser(base: Path, name: str) -> None:
    """Where a form began elsewhere than at the pretrained denoiser, it would be compared from another model."""
    network = UNet2DModel.from_pretrained(base)
    s, q = 0.5, T.reshape(-1, 1, 1, 1)
    label = (T.log() - np.log(0.002)) / (np.log(80) - np.log(0.002)) * 999
    with torch.no_grad():
        prediction = network(X_T / (q**2 + s**2).sqrt(), label).sample
        expected = s**2 / (q**2 + s**2) * X_T + q * s / (q**2 + s**2).sqrt() * prediction
        denoiser = finetune.denoiser_for(finetune.FORMS[name], base, seed=0)
        found = denoiser(X_T, T, Nothing(), torch.zeros_like(X_T), 0.05).mean
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    # and it is no other network than that: the measurement reaches it
    mask = (torch.rand(32, 32, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    with torch.no_grad():
        measured = denoiser(X_T, T, Inpainting(mask), (mask * 0.3).expand_as(X_T), 0.05).mean
    assert (measured - found).abs().max() > 0.1 or finetune.FORMS[name].preconditioning == "palette"


def test_from_scratch_knows_nothing_of_the_base(base: Path) -> None:
    """A run "from scratch" that shared weights with the base would show no gain of fine-tuning."""
    state = UNet2DModel.from_pretrained(base).state_dict()
    for name in ("paper-scratch", "spectral-scratch", "palette-scratch"):
        own = finetune.denoiser_for(finetune.FORMS[name], base, seed=0).backbone.network.state_dict()
        assert not any(torch.equal(own[k], state[k]) for k in state if k.endswith("weight") and state[k].ndim > 1)


@pytest.mark.slow
def test_every_run_is_made_once_and_the_base_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second call that trained again would cost hours, and a base that changed would spoil the comparison."""
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    for name in ("0a.jpg", "0b.jpg", "b.jpg"):
        Image.fromarray(rng.integers(0, 255, (160, 160, 3), dtype=np.uint8)).save(tmp_path / name)
    out = tmp_path / "out"
    arguments = [
        str(tmp_path), "--out", str(out), "--base-steps", "1", "--steps", "2", "--batch", "2", "--seeds", "1",
        "--crops", "1", "--train-match", r"0.*", "--validate-match", r"b.*", "--tasks", "sr",
        "--forms", "spectral,spectral-scratch", "--figure", str(tmp_path / "f.png"), "--table", str(tmp_path / "t.md"),
    ]  # fmt: skip
    finetune.main(arguments)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [r["form"] for r in rows] == ["spectral", "spectral-scratch"]
    assert json.loads(rows[1]["setting"])["learning_rate"] > json.loads(rows[0]["setting"])["learning_rate"]
    assert "from scratch: c(Q)" in (tmp_path / "t.md").read_text()
    weights = (out / "base" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    finetune.main(arguments)
    assert [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()] == rows
    assert (out / "base" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == weights
