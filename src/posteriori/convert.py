"""Other people's pickled checkpoints as safetensors, with a card that keeps their licence.

``convert`` writes a folder that :func:`posteriori.backbones.load_pretrained` reads: ``weights.safetensors`` and
``weights.json``, or for a model of diffusers ``diffusion_pytorch_model.safetensors`` beside its ``config.json``. What
the file holds besides the weights (optimizers, callbacks) is left behind and named. No code of the file runs
(:mod:`posteriori.pickles`).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from posteriori.backbones.pretrained import readme_licence
from posteriori.checkpoint import write_atomically
from posteriori.pickles import Name, PickleError, Record, read_pickle

__all__ = ["ConvertError", "convert"]

KINDS = ("edm", "diffusers", "weights")

#: Entries that hold the network, the better one first: an average of the weights before the weights.
ENTRIES = (
    "ema", "model_ema", "ema_model", "ema_state_dict", "params_ema", "state_dict", "model_state_dict", "model", "net",
    "params",
)  # fmt: skip


class ConvertError(ValueError):
    """A file that cannot be converted: what is wrong, and what to try."""


def convert(
    file: str | Path,
    folder: str | Path,
    licence: str | None = None,
    kind: str | None = None,
    entry: str | None = None,
) -> Path:
    """Convert a pickled checkpoint (.pt, .pth, .pkl, .ckpt, .bin).

    Args:
        file: the checkpoint.
        folder: where to; created when missing.
        licence: of the weights, an SPDX identifier where there is one; read from the file, or from the front matter of
            a ``README.md`` beside it, where it stands there.
        kind: ``"edm"`` (a pickled network of EDM), ``"diffusers"`` (a ``config.json`` of a ``UNet2DModel`` beside it)
            or ``"weights"``; found when left out.
        entry: which part of the file is the network, as in ``"ema"``; found when left out.

    Returns:
        Path of the safetensors file.

    Raises:
        ConvertError: when the file is damaged, holds no network or several, its licence is not known, or the folder
            cannot be written.
    """
    file, folder = Path(file), Path(folder)
    if kind is not None and kind not in KINDS:
        raise ConvertError(f"unknown kind {kind!r}: choose one of {', '.join(KINDS)}")
    try:
        content = read_pickle(file)
    except PickleError as error:
        raise ConvertError(str(error)) from None
    licence = licence or _stated_licence(content) or readme_licence(file.parent)
    if not licence:
        raise ConvertError(
            f"no licence is stated in {file.name} or in a README.md beside it: look it up where you got the file and "
            "give --license, for example --license CC-BY-NC-SA-4.0"
        )
    chosen, network = _network(content, entry, file.name)
    tensors = state_dict(network)
    about = _about(network)
    kind = kind or _kind(about, file)
    others = content if isinstance(content, dict) and chosen else {}
    card: dict[str, Any] = {
        "format": 1,
        "kind": kind,
        "licence": licence,
        "source": file.name,
        "source_sha256": _file_hash(file),
        "entry": chosen,
        "left_behind": sorted(str(k) for k in others if str(k) != chosen),
        "network": about,
    }
    name = "weights"
    if kind == "diffusers":
        config = file.parent / "config.json"
        if not config.is_file():
            raise ConvertError(f"kind diffusers needs the model's config.json beside {file.name}: copy it there")
        name = "diffusion_pytorch_model"
    try:
        data = save(
            {k: v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()},  # some may be shared
            {"licence": licence, "format": "pt"},
        )
        card["sha256"] = _hash(data)
        write_atomically(folder / f"{name}.safetensors", data)
        write_atomically(folder / "weights.json", (json.dumps(card, indent=1) + "\n").encode())
        if kind == "diffusers":
            write_atomically(folder / "config.json", (file.parent / "config.json").read_bytes())
    except OSError as error:
        raise ConvertError(f"cannot write to {folder} ({error.strerror}): choose another place") from None
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ConvertError(f"{file.name} holds tensors that safetensors does not know ({error})") from None
    return folder / f"{name}.safetensors"


def state_dict(network: Any) -> dict[str, Tensor]:
    """The tensors of a pickled module, or of nested dictionaries, by the names that ``state_dict`` gives them."""
    found: dict[str, Tensor] = {}
    _collect(network, "", found, set())
    return found


def _collect(value: Any, name: str, found: dict[str, Tensor], seen: set[int]) -> None:
    if isinstance(value, Tensor):
        found[name] = value
        return
    if isinstance(value, dict):
        parts = value
    elif isinstance(value, Record) and (attributes := _attributes(value)):
        skip = _members(attributes.get("_non_persistent_buffers_set"))
        parts = {
            k: v
            for group in ("_parameters", "_buffers", "_modules")
            for k, v in _mapping(attributes.get(group)).items()
            if not (group == "_buffers" and k in skip)
        }
    else:
        return
    if id(value) in seen:  # a module that holds itself
        return
    seen.add(id(value))
    for key, part in parts.items():
        _collect(part, f"{name}.{key}" if name else str(key), found, seen)
    seen.discard(id(value))


def _mapping(value: Any) -> dict[Any, Any]:
    """A dictionary, or a record of a class derived from it."""
    return value if isinstance(value, dict) else value.items if isinstance(value, Record) else {}


def _members(value: Any) -> list[Any]:
    """What a set holds that was pickled by items or by a call."""
    if not isinstance(value, Record):
        return []
    given = value.arguments[0] if value.arguments and isinstance(value.arguments[0], list) else []
    return [*value.entries, *given]


def _attributes(record: Record) -> dict[Any, Any]:
    """Attributes of a pickled object; EDM's networks carry them in the description they are rebuilt from."""
    if isinstance(record.state, dict):
        return record.state
    described = _mapping(record.arguments[0]) if record.arguments else {}
    state = described.get("state")
    return _mapping(state)


def _network(content: Any, entry: str | None, name: str) -> tuple[str, Any]:
    """The part of a checkpoint that is the network, and its key."""
    if entry is not None:
        if not isinstance(content, dict) or entry not in content:
            keys = ", ".join(map(str, content)) if isinstance(content, dict) else "no entries"
            raise ConvertError(f"{name} has no entry {entry!r}: it has {keys[:300]}")
        if not state_dict(content[entry]):
            raise ConvertError(f"entry {entry!r} of {name} holds no tensors: choose another")
        return entry, content[entry]
    parts = {str(k): v for k, v in content.items()} if isinstance(content, dict) else {}
    holding = [k for k, v in parts.items() if not isinstance(v, Tensor) and not k.startswith("optim") and state_dict(v)]
    known = [k for k in ENTRIES if k in holding]
    if len(holding) > 1 and not known:
        raise ConvertError(f"{name} holds several sets of weights: choose with --entry: {', '.join(holding)[:300]}")
    if holding:
        choice = (known or holding)[0]
        return choice, parts[choice]
    if not state_dict(content):
        raise ConvertError(f"{name} holds no weights: give a checkpoint with a network or a state_dict")
    return "", content


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)


def _about(network: Any) -> dict[str, Any]:
    """Class, constructor arguments and plain attributes of a pickled module; nothing of a state_dict."""
    if not isinstance(network, Record):
        return {}
    described = _mapping(network.arguments[0]) if network.arguments else {}
    kind = described.get("class_name") or (str(network.name) if isinstance(network.name, Name) else "")
    attributes = _attributes(network)
    known = {str(k): v for k, v in attributes.items() if _plain(v) and not str(k).startswith("_")}
    given = {str(k): v for k, v in _mapping(attributes.get("_init_kwargs")).items() if _plain(v)}
    return {"class": str(kind), "attributes": known, "arguments": given}


def _kind(about: dict[str, Any], file: Path) -> str:
    if about.get("class", "").endswith("EDMPrecond"):
        return "edm"
    config = file.parent / "config.json"
    if config.is_file() and '"UNet2DModel"' in config.read_text(encoding="utf-8", errors="replace"):
        return "diffusers"
    return "weights"


def _stated_licence(content: Any) -> str | None:
    entries = content if isinstance(content, dict) else {}
    stated = next((entries[k] for k in ("license", "licence") if isinstance(entries.get(k), str)), None)
    return stated or None


def _file_hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
