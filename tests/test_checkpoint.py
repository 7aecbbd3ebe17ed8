"""Checkpoints: what was saved is what is loaded, and nothing else is."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import posteriori as po
from posteriori import checkpoint
from posteriori.backbones.photo import PhotoNet
from posteriori.checkpoint import REQUIRED, CheckpointError, read_card, write_atomically
from posteriori.denoise import NetworkDenoiser, Scaling
from posteriori.operators import GaussianBlur
from posteriori.schedule import VE, VP, CosineVP, RectifiedFlow, Schedule

NETWORK = {"image_channels": 1, "channels": [4, 6], "blocks": [1, 1], "embedding": 8}


def denoiser(schedule: Schedule | None = None, kind: str = "edm", form: str = "spectral") -> NetworkDenoiser:
    network = PhotoNet(**NETWORK)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 4)
    return NetworkDenoiser(
        network,
        schedule or VE(),
        Scaling(kind, 0.4),
        form,
        sigma_y_range=(0.02, 0.3),  # type: ignore[arg-type]
    )


def card(model: NetworkDenoiser) -> dict[str, Any]:
    return {
        "name": "test",
        "network": {"kind": "photo", **NETWORK},
        "schedule": model.schedule.config(),
        "scaling": {"kind": model.scaling.kind, "data_std": model.scaling.data_std},
        "preconditioning": model.preconditioning,
        "sigma_y_range": [0.02, 0.3],
        "value_range": [-1, 1],
        "tasks": {"denoise": 1.0},
        "training_data": {"description": "random numbers", "licence": "none"},
        "figures": {"psnr": 12.5},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = denoiser()
    po.save(model, tmp_path / "model", card(model))
    return tmp_path / "model"


def evaluate(model: NetworkDenoiser) -> Tensor:
    x_t = torch.randn(2, 1, 9, 10, generator=torch.Generator().manual_seed(1))
    A = GaussianBlur(1.0)
    with torch.no_grad():
        return model(x_t, model.schedule.t_max / 2, A, po.measure(A, x_t, 0.1, seed=0), 0.1).mean


@pytest.mark.parametrize(
    ("schedule", "kind", "form"),
    [
        (VE(0.01, 40.0), "edm", "spectral"),
        (VP(0.2, 15.0), "epsilon", "paper"),
        (CosineVP(), "v", "scalar"),
        (RectifiedFlow(), "flow", "palette"),
        (VP(), "x_0", "spectral"),
    ],
    ids=str,
)
def test_round_trip(tmp_path: Path, schedule: Schedule, kind: str, form: str) -> None:
    """A loaded model that is not the saved one: another schedule, scaling or weight changes every picture."""
    model = denoiser(schedule, kind, form)
    po.save(model, tmp_path, card(model))
    loaded = po.load(tmp_path)
    assert torch.equal(evaluate(loaded), evaluate(model))
    assert loaded.schedule == schedule
    assert loaded.scaling == model.scaling
    assert loaded.preconditioning == form
    assert loaded.sigma_y_range == (0.02, 0.3)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.card["figures"] == {"psnr": 12.5}
    assert torch.equal(evaluate(po.load(tmp_path / "model.safetensors")), evaluate(model))
    assert torch.equal(evaluate(po.load(str(tmp_path))), evaluate(model))


def test_half_precision_weights_come_back_in_float32(tmp_path: Path) -> None:
    """A bundled model is stored in bfloat16; computing in it would lose the measurement."""
    model = denoiser()
    po.save(model, tmp_path, card(model), torch.bfloat16)
    loaded = po.load(tmp_path)
    for name, weight in loaded.backbone.state_dict().items():
        assert weight.dtype == torch.float32, name
        assert torch.equal(weight, model.backbone.state_dict()[name].bfloat16().float()), name
    assert all(p.dtype == torch.float32 for p in model.parameters())  # saving must not change what is saved


def test_card_is_readable_without_the_weights(folder: Path) -> None:
    """A list of models would have to load them."""
    (folder / "model.safetensors").unlink()
    assert read_card(folder)["name"] == "test"
    with pytest.raises(CheckpointError, match=r"model.safetensors is missing"):
        po.load(folder)


def test_hash_is_checked(folder: Path) -> None:
    """A damaged download, or weights of another model, would restore pictures all the same."""
    path = folder / "model.safetensors"
    assert json.loads((folder / "model.json").read_text())["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(CheckpointError, match="does not have the hash that its card states"):
        po.load(folder)


def rewrite(folder: Path, **changes: Any) -> None:
    """Change fields of the card; ``None`` removes one. The hash is made to fit the weights again."""
    full = json.loads((folder / "model.json").read_text())
    full["sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    full.update(changes)
    (folder / "model.json").write_text(json.dumps({k: v for k, v in full.items() if v is not None}))


@pytest.mark.parametrize("field", REQUIRED)
def test_missing_fields(folder: Path, field: str) -> None:
    """A card without it would be completed by a guess, or fail with a KeyError."""
    rewrite(folder, **{field: None})
    for function in (po.load, read_card):
        with pytest.raises(CheckpointError, match=f"lacks {field}"):
            function(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, "format 99"),
        ({"network": {"kind": "photo", **NETWORK, "channels": [4, 8]}}, "does not fit its card"),
        ({"network": {"kind": "transformer"}}, "unknown network kind 'transformer'"),
        ({"network": {"kind": "photo", "depth": 3}}, "does not fit its card"),
        ({"network": 5}, "does not fit its card"),
        ({"schedule": {"kind": "DDPM"}}, "unknown schedule 'DDPM'"),
        ({"schedule": {"kind": "VE", "beta": 1}}, "bad parameters for schedule VE"),
        ({"scaling": {"kind": "score"}}, "unknown parametrization 'score'"),
        ({"scaling": "edm"}, "does not fit its card"),
        ({"preconditioning": "none"}, "unknown preconditioning 'none'"),
        ({"sigma_y_range": 0.1}, "does not fit its card"),
        ({"sigma_y_range": ["low", "high"]}, "does not fit its card"),
    ],
    ids=str,
)
def test_cards_that_do_not_fit(folder: Path, changes: dict[str, Any], message: str) -> None:
    """A card of another version or model would end in a traceback, or in a network with random weights."""
    rewrite(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        po.load(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe\x00", b'"model"'], ids=repr)
def test_broken_cards(folder: Path, content: bytes) -> None:
    """Half a file, or something that is no card at all."""
    (folder / "model.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.json"):
        po.load(folder)


def test_foreign_weights(folder: Path) -> None:
    """A file that is no safetensors, or holds another network's tensors, under a hash that fits."""
    for content in (b"", b"GIF89a", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "):
        (folder / "model.safetensors").write_bytes(content)
        rewrite(folder)
        with pytest.raises(CheckpointError, match="does not fit its card"):
            po.load(folder)
    save_file({"layer.weight": torch.zeros(3)}, folder / "model.safetensors")
    rewrite(folder)
    with pytest.raises(CheckpointError, match="does not fit its card"):
        po.load(folder)


class _Payload:
    """Creates a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickles_are_not_opened(folder: Path, tmp_path: Path) -> None:
    """Loading a model from a stranger would run the stranger's code."""
    torch.save({"state": _Payload(tmp_path / "executed")}, folder / "model.safetensors")
    rewrite(folder)
    with pytest.raises(CheckpointError):
        po.load(folder)
    assert not (tmp_path / "executed").exists()
    for name in ("model.safetensors", "model.json"):
        assert (folder / name).exists()


def test_unknown_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt name would end in a traceback of the hub's client; the message says what there is."""
    with pytest.raises(CheckpointError, match=r"give a bundled name .* a folder .* or a hub id"):
        po.load("fotos")
    with pytest.raises(CheckpointError, match="no model"):
        po.load(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"has no model\.json"):
        po.load(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = (
        "import posteriori as po\n"
        "for name in ('nobody/nothing', 'no body/no thing', 'a--b/c..d'):\n"
        "    try:\n"
        "        po.load(name)\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, 'no model' in str(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines() == ["CheckpointError True"] * 3, done.stdout + done.stderr


def test_incomplete_cards_are_not_saved(tmp_path: Path) -> None:
    """A model that can be written but not read, or half of one left behind."""
    model = denoiser()
    incomplete = card(model)
    del incomplete["tasks"], incomplete["training_data"]
    with pytest.raises(ValueError, match="lacks tasks, training_data"):
        po.save(model, tmp_path / "new", incomplete)
    assert not (tmp_path / "new").exists()


def test_saving_again_replaces(folder: Path) -> None:
    """A run that saves every few minutes: the last one counts, and nothing else is left."""
    model = denoiser(kind="v")
    po.save(model, folder, card(model))
    assert po.load(folder).scaling.kind == "v"
    assert sorted(p.name for p in folder.iterdir()) == ["model.json", "model.safetensors"]


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk would leave half a file in the place of the old one."""
    path = tmp_path / "deep" / "file.json"
    write_atomically(path, b"old")
    assert path.read_bytes() == b"old"

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]
