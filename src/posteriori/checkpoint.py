"""Trained denoisers on disk: safetensors weights beside a JSON card. No pickle, so loading runs no foreign code.

A card holds everything needed to rebuild the denoiser, and everything a user should know before trusting it: what it
was trained on and under which licence, which tasks and noise it knows, its value range, and its measured figures.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from posteriori.backbones.cards import build_denoiser, build_network, describe
from posteriori.backbones.pipelines import PretrainedError
from posteriori.denoise import NetworkDenoiser

__all__ = [
    "CheckpointError", "build_denoiser", "build_network", "bundled_models", "describe", "load", "locate", "read_card",
    "save", "write_atomically",
]  # fmt: skip

FORMAT = 1
REQUIRED = (
    "format", "name", "network", "schedule", "scaling", "preconditioning", "sigma_y_range", "value_range", "tasks",
    "training_data", "sha256",
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded: what is wrong, and what to try."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary name in the same folder, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save(
    denoiser: NetworkDenoiser,
    folder: str | Path,
    card: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write ``model.safetensors`` and ``model.json`` into a folder.

    Args:
        denoiser: what to save.
        folder: created when missing.
        card: the fields of :data:`REQUIRED` that :func:`describe` does not know (``name``, ``value_range``, ``tasks``,
            ``training_data``), and whatever else is worth saying; the denoiser's own card when left out.
        dtype: precision of the stored weights, e.g. ``torch.bfloat16``; their own when left out.

    Returns:
        Path of the weights.

    Raises:
        ValueError: when the card lacks a field, or cannot state how the denoiser is made.
    """
    own = getattr(denoiser, "card", None) or {}
    known = describe(denoiser, (card or {}).get("network"))
    stated = {**own, **known} if card is None else {**known, **card}
    if "base" in own:
        stated.setdefault("base", own["base"])  # where a pretrained model came from, and under which licence
    missing = [field for field in REQUIRED if field not in (*stated, "format", "sha256")]
    if missing:
        raise ValueError(f"the card lacks {', '.join(missing)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().contiguous() for k, v in denoiser.backbone.state_dict().items()}
    if dtype is not None:
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    weights = folder / "model.safetensors"
    temporary = folder / ".model.safetensors.partial"
    save_file(state, temporary)
    temporary.chmod(0o644)  # safetensors writes files that only their owner can read
    text = card_text({**stated, "format": FORMAT, "sha256": _hash(temporary)})
    temporary.replace(weights)
    write_atomically(folder / "model.json", text.encode())
    return weights


def card_text(card: dict[str, Any]) -> str:
    """A card as indented JSON, lists of numbers in one line: the table of a schedule has a thousand."""
    numbers = re.compile(r"\[[^\[\]{}\"]*\]")
    return numbers.sub(lambda found: re.sub(r"\n\s*", " ", found[0]), json.dumps(card, indent=1)) + "\n"


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _bundled_folder() -> Path:
    return Path(str(resources.files("posteriori"))) / "assets" / "models"


def bundled_models() -> list[str]:
    """Names of the models that come with the package."""
    folder = _bundled_folder()
    return sorted(p.parent.name for p in folder.glob("*/model.json")) if folder.is_dir() else []


def locate(name: str | Path) -> Path:
    """Folder of a model by bundled name, path or hub id."""
    if str(name) in bundled_models():
        return _bundled_folder() / str(name)
    path = Path(name)
    if path.is_dir():
        return path
    if path.name == "model.safetensors" and path.is_file():
        return path.parent
    if isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(name, allow_patterns=["model.json", "model.safetensors"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise CheckpointError(
                f"no model {name!r}: it is neither bundled ({', '.join(bundled_models())}), nor a folder, and the hub "
                f"could not be asked ({type(error).__name__})"
            ) from None
    raise CheckpointError(
        f"no model {str(name)!r}: give a bundled name ({', '.join(bundled_models()) or 'none'}), a folder with "
        "model.safetensors and model.json, or a hub id 'owner/name'"
    )


def read_card(name: str | Path) -> dict[str, Any]:
    """The card of a model, checked for completeness.

    Raises:
        CheckpointError: when the model or its card is missing, unreadable or incomplete.
    """
    folder = locate(name)
    path = folder / "model.json"
    try:
        card = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no model.json: a model is a pair of model.safetensors and it") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): copy the model again") from None
    missing = [field for field in REQUIRED if not isinstance(card, dict) or field not in card]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}: copy the model again, or export it anew")
    if card["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {card['format']}, this version reads {FORMAT}: update posteriori")
    return card


def load(name: str | Path, device: str | torch.device = "cpu", network: nn.Module | None = None) -> NetworkDenoiser:
    """Load a trained denoiser.

    Args:
        name: a bundled name (``"photo"``), a folder, or a hub id ``"owner/name"``.
        device: where to put it.
        network: for a fine-tuned network of your own, which no card can make: one of its class, with any weights.

    Returns:
        The denoiser in evaluation mode, weights in float32, with its card as attribute ``card``.

    Raises:
        CheckpointError: when something is missing, the file's hash is not the card's, or weights do not fit.
    """
    card = read_card(name)
    weights = locate(name) / "model.safetensors"
    if not weights.is_file():
        raise CheckpointError(f"{weights} is missing: copy the model again")
    if _hash(weights) != card["sha256"]:
        raise CheckpointError(f"{weights} does not have the hash that its card states: copy the model again")
    try:
        denoiser = build_denoiser(card, network)
        state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(weights).items()}
        denoiser.backbone.load_state_dict(state)
    except PretrainedError as error:
        raise CheckpointError(str(error)) from None
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]  # torch lists every tensor, one per line
        raise CheckpointError(f"{weights} does not fit its card ({reason}): copy the model again") from None
    denoiser.card = card  # type: ignore[assignment]
    return denoiser.eval().requires_grad_(False).to(device)
