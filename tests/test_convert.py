"""Pickled checkpoints become safetensors, and nothing that stands in them is executed."""

from __future__ import annotations

import json
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from posteriori.backbones import load_pretrained
from posteriori.cli import run
from posteriori.convert import ConvertError, convert
from posteriori.pickles import PickleError, Record, read_pickle
from test_backbones import QS, SMALL, TinyNet, error_of, noisy, randomise

WRITERS: dict[str, Callable[[Any, Path], None]] = {
    "zip": torch.save,
    "legacy": lambda thing, path: torch.save(thing, path, _use_new_zipfile_serialization=False),
    **{f"pickle {n}": lambda thing, path, n=n: path.write_bytes(pickle.dumps(thing, n)) for n in (0, 2, 4, 5)},
}


class Everything(nn.Module):
    """Kinds of tensors, shared and strided ones, buffers that are saved and that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        self.sixteen = nn.Parameter(torch.randn(5).half())
        self.turned = nn.Parameter(torch.randn(4, 6).T[1:])
        self.register_buffer("numbers", torch.arange(6).reshape(2, 3)[:, 1:])
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("brain", torch.randn(3).bfloat16())
        self.register_buffer("forgotten", torch.randn(3), persistent=False)
        self.register_buffer("nothing", torch.zeros(0, 3))
        self.tied = self.inner[0]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("whole", [False, True], ids=["state_dict", "module"])
def test_weights_come_out_as_they_went_in(writer: str, whole: bool, tmp_path: Path) -> None:
    """A wrong stride, offset or type, or a name lost: the model would be another one. The oracle is state_dict."""
    module = Everything()
    expected = module.state_dict()
    WRITERS[writer](module if whole else expected, tmp_path / "model.pt")
    converted = load_file(convert(tmp_path / "model.pt", tmp_path / "out", licence="MIT"))
    assert converted.keys() == expected.keys()
    for name, value in expected.items():
        assert converted[name].dtype == value.dtype, name
        assert torch.equal(converted[name], value), name


class Evil:
    """Runs a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made = function, arguments

    def __reduce__(self) -> Any:
        return self.made


class Setter:
    """Runs code when its attributes are set."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __getstate__(self) -> str:
        return str(self.path)

    def __setstate__(self, path: str) -> None:
        Path(path).touch()


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("attack", ["os.system", "exec", "open", "getattr", "state"])
def test_nothing_is_executed(attack: str, writer: str, tmp_path: Path) -> None:
    """A checkpoint from the internet creates a file as soon as it is looked at, in each way a pickle can call."""
    import os

    mark = tmp_path / "executed"
    code = f"open({str(mark)!r}, 'w').close()"
    evil: Any = {
        "os.system": Evil(os.system, f"touch {mark}"),
        "exec": Evil(exec, code),
        "open": Evil(open, str(mark), "w"),
        "getattr": Evil(getattr, Evil(eval, f"[{code}]"), "__class__"),
        "state": Setter(mark),
    }[attack]
    WRITERS[writer]({"state_dict": {"w": torch.ones(2)}, "callbacks": [evil]}, tmp_path / "model.pt")
    content = read_pickle(tmp_path / "model.pt")
    assert isinstance(content["callbacks"][0], Record)
    out = convert(tmp_path / "model.pt", tmp_path / "out", licence="MIT")
    assert not mark.exists()
    assert torch.equal(load_file(out)["w"], torch.ones(2))
    assert json.loads((tmp_path / "out" / "weights.json").read_text())["left_behind"] == ["callbacks"]
    if writer == "pickle 4":  # the attack works where it is not stopped
        pickle.loads((tmp_path / "model.pt").read_bytes())
        assert mark.exists()


def test_an_attack_by_the_shape_of_a_tensor(tmp_path: Path) -> None:
    """A tensor said to be larger than its storage would show, or overwrite, other memory of the process."""

    class Beyond:
        def __reduce__(self) -> Any:
            rebuild, (storage, _, _, stride, *rest) = torch.zeros(4).__reduce_ex__(2)
            return rebuild, (storage, 2, (3,), stride, *rest)

    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"w": Beyond()}))
    with pytest.raises(PickleError, match="beyond its storage"):
        read_pickle(path)


@pytest.mark.parametrize("cut", [0, 1, 10, 100, 1000])
@pytest.mark.parametrize("writer", WRITERS)
def test_damaged_files(writer: str, cut: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A download that broke off: one line and exit code 2, and nothing half-written."""
    path = tmp_path / "model.pt"
    WRITERS[writer]({"w": torch.randn(400)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    assert run(["convert", str(path), "-o", str(tmp_path / "out"), "--license", "MIT"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"w": torch.ones(2)}, {"licence": None}, "--license"),
        ({"w": torch.ones(2)}, {"kind": "gan"}, "unknown kind"),
        ({"w": torch.ones(2)}, {"kind": "diffusers"}, "config.json"),
        ({"a": {"w": torch.ones(2)}, "b": {"w": torch.ones(2)}}, {}, "--entry: a, b"),
        ({"a": {"w": torch.ones(2)}}, {"entry": "c"}, "it has a"),
        ({"a": {"w": torch.ones(2)}, "b": 3}, {"entry": "b"}, "no tensors"),
        ({"epoch": 3}, {}, "no weights"),
        ([1, 2], {}, "no weights"),
    ],
)
def test_what_cannot_be_converted(content: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A guess at the network or the licence would be passed on as a fact."""
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ConvertError, match=message):
        convert(tmp_path / "model.pt", tmp_path / "out", **{"licence": "MIT", **options})
    assert not (tmp_path / "out").exists()


def test_the_licence_goes_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights lose the terms they were given under."""
    weights, moments = {"w": torch.ones(2)}, {0: {"exp_avg": torch.ones(2)}}
    content = {
        "optimizer_states": moments,
        "state_dict": weights,
        "step": torch.tensor(3),
        "ema": {"w": torch.zeros(2)},
    }
    torch.save(content, tmp_path / "model.ckpt")
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-sa-4.0\n---\n")
    assert run(["convert", str(tmp_path / "model.ckpt"), "-o", str(tmp_path / "out")]) == 0
    out = tmp_path / "out" / "weights.safetensors"
    assert str(out) in capsys.readouterr().out
    card = json.loads((tmp_path / "out" / "weights.json").read_text())
    assert (card["licence"], card["entry"]) == ("cc-by-nc-sa-4.0", "ema")
    assert card["left_behind"] == ["optimizer_states", "state_dict", "step"]
    with safe_open(out, "pt") as opened:
        assert opened.metadata()["licence"] == "cc-by-nc-sa-4.0"
    assert torch.equal(load_file(out)["w"], torch.zeros(2))


@torch.no_grad()
def test_converted_weights_are_loaded(tmp_path: Path) -> None:
    """The way from a pickle to a denoiser: a network of your own, with the wrapper's name before every name."""
    network = randomise(TinyNet())
    torch.save({"module." + k: v for k, v in network.state_dict().items()}, tmp_path / "model.pt")
    convert(tmp_path / "model.pt", tmp_path / "out", licence="Apache-2.0")
    denoiser = load_pretrained(tmp_path / "out", kind="denoiser", network=TinyNet())
    x = noisy(torch.ones_like(QS), QS)
    assert error_of(denoiser, x, QS, network(x, QS.float())) < 2e-5
    assert denoiser.card["base"]["licence"] == "Apache-2.0"
    with pytest.raises(ValueError, match="network="):
        load_pretrained(tmp_path / "out", kind="denoiser")
    with pytest.raises(ValueError, match="another network"):
        load_pretrained(tmp_path / "out", kind="denoiser", network=TinyNet(classes=3))
    with pytest.raises(ValueError, match="posteriori convert"):
        load_pretrained(tmp_path / "model.pt", kind="denoiser", network=TinyNet())


@torch.no_grad()
def test_diffusers_pickles(tmp_path: Path) -> None:
    """Older repositories hold .bin files, which are pickles."""
    network = randomise(UNet2DModel(in_channels=3, out_channels=3, sample_size=16, **SMALL))
    network.save_pretrained(tmp_path / "old", safe_serialization=False)
    with pytest.raises(ValueError, match="posteriori convert"):
        load_pretrained(tmp_path / "old", scheduler=DDPMScheduler())
    convert(tmp_path / "old" / "diffusion_pytorch_model.bin", tmp_path / "new", licence="apache-2.0")
    loaded = load_pretrained(tmp_path / "new", scheduler=DDPMScheduler(), conditioned=False)
    for name, value in loaded.backbone.network.state_dict().items():
        assert torch.equal(value, network.state_dict()[name]), name


# A pickle as EDM writes them: objects that carry the source of their class, to be compiled and run when loaded.


def _reconstruct_persistent_obj(meta: Any) -> Any:
    raise AssertionError("code of the file ran")


class EasyDict(dict[str, Any]):
    def __getattr__(self, name: str) -> Any:
        return self[name]


class Persistent:
    def __init__(self, class_name: str, state: dict[str, Any]) -> None:
        self.class_name, self.state = class_name, state

    def __reduce__(self) -> Any:
        meta = EasyDict(
            type="class", version=6, module_src="raise SystemExit", class_name=self.class_name, state=self.state
        )
        return _reconstruct_persistent_obj, (meta,), None


def persistent(module: nn.Module, class_name: str, **attributes: Any) -> Persistent:
    state = {
        k: v for k, v in module.__dict__.items() if k in ("_parameters", "_buffers", "_non_persistent_buffers_set")
    }
    return Persistent(class_name, {**state, "_modules": dict(module._modules), **attributes})


@pytest.fixture
def edm_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules that a pickle of EDM names exist while it is written."""
    for name, members in {
        "torch_utils": {},
        "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj},
        "dnnlib": {},
        "dnnlib.util": {"EasyDict": EasyDict},
    }.items():
        module = types.ModuleType(name)
        for member, value in members.items():
            setattr(module, member, value)
            monkeypatch.setattr(value, "__module__", name)
        monkeypatch.setitem(sys.modules, name, module)


def edm_pickle(network: nn.Module, path: Path, **arguments: Any) -> None:
    inner = persistent(network, "SongUNet")
    outer = persistent(
        nn.Module(), "EDMPrecond", img_resolution=16, img_channels=3, label_dim=0, sigma_data=0.5,
        _init_args=(), _init_kwargs=EasyDict(arguments),
    )  # fmt: skip
    outer.state["_modules"] = {"model": inner}
    path.write_bytes(pickle.dumps({"ema": outer, "training_set_kwargs": EasyDict(path="/data"), "loss_fn": None}))


@pytest.mark.usefixtures("edm_modules")
def test_edm_pickles(tmp_path: Path) -> None:
    """EDM's files hold whole modules with their source; the weights must come out, the source must not run."""
    network = randomise(TinyNet())
    edm_pickle(network, tmp_path / "edm.pkl", model_type="SongUNet", model_channels=32, embedding_type="fourier")
    with pytest.raises(AssertionError, match="code of the file ran"):
        pickle.loads((tmp_path / "edm.pkl").read_bytes())
    out = convert(tmp_path / "edm.pkl", tmp_path / "out", licence="CC-BY-NC-SA-4.0")
    expected: dict[str, Tensor] = {f"model.{k}": v for k, v in network.state_dict().items()}
    converted = load_file(out)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[k], v) for k, v in expected.items())
    card = json.loads((tmp_path / "out" / "weights.json").read_text())
    assert (card["kind"], card["entry"]) == ("edm", "ema")
    assert card["left_behind"] == ["loss_fn", "training_set_kwargs"]
    assert card["network"]["class"] == "EDMPrecond"
    assert card["network"]["arguments"]["model_channels"] == 32
    assert card["network"]["attributes"]["img_resolution"] == 16


@pytest.mark.usefixtures("edm_modules")
@pytest.mark.parametrize("embedding", ["fourier", "positional"])
@torch.no_grad()
def test_edm_weights_through_deepinv(deepinv: Any, embedding: str, tmp_path: Path) -> None:
    """EDM's weights in deepinv's network, at the scales of EDM's own preconditioning."""
    arguments = {
        "model_type": "SongUNet", "embedding_type": embedding, "model_channels": 32, "channel_mult": [1, 2],
        "num_blocks": 1, "attn_resolutions": [8], "augment_dim": 9,
    }  # fmt: skip
    config = {k: v for k, v in arguments.items() if k not in ("model_type", "embedding_type")}
    network = deepinv.models.NCSNpp(
        model_type="ncsn" if embedding == "fourier" else "ddpm", img_resolution=16, pretrained=None, **config
    )
    randomise(network)
    edm_pickle(network, tmp_path / "edm.pkl", **arguments)
    convert(tmp_path / "edm.pkl", tmp_path / "out", licence="CC-BY-NC-SA-4.0")
    denoiser = load_pretrained(tmp_path / "out")
    x, q = noisy(torch.ones_like(QS), QS), QS.float().reshape(-1, 1, 1, 1)
    f = network.forward_unet(x / (q**2 + 0.25).sqrt(), q.flatten().log() / 4)
    expected = 0.25 / (q**2 + 0.25) * x + q * 0.5 / (q**2 + 0.25).sqrt() * f
    assert error_of(denoiser, x, QS, expected) < 2e-5
    assert denoiser.card["base"]["licence"] == "CC-BY-NC-SA-4.0"
