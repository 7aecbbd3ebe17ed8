"""Other people's pretrained models, all as the same :class:`NetworkDenoiser` on one schedule.

With nothing measured (``A = 0``) the denoiser is the original model, whatever the preconditioning: what is new starts
at zero weight.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from posteriori.backbones.cards import describe
from posteriori.backbones.peers import from_azula, from_deepinv, from_edm, make_deepinv
from posteriori.backbones.pipelines import (
    PretrainedError,
    from_diffusers,
    is_diffusers_folder,
    read_json,
    read_weights,
)
from posteriori.backbones.wrapped import from_denoiser, from_guided_diffusion, from_network
from posteriori.denoise import NetworkDenoiser

__all__ = ["PretrainedError", "load_pretrained"]

_KINDS: dict[str, Callable[..., NetworkDenoiser]] = {
    "diffusers": from_diffusers,
    "denoiser": from_denoiser,
    "network": from_network,
    "guided-diffusion": from_guided_diffusion,
    "deepinv": from_deepinv,
    "azula": from_azula,
    "edm": from_edm,
}


def load_pretrained(source: Any, *, kind: str | None = None, **options: Any) -> NetworkDenoiser:
    """A pretrained diffusion or flow model as a denoiser, ready to be fine-tuned.

    Args:
        source: a folder, a safetensors file or a hub id ``"owner/name"``, or the model itself.
        kind: ``"diffusers"``, ``"denoiser"`` (a network that returns the image), ``"network"`` (one that predicts),
            ``"guided-diffusion"``, ``"deepinv"``, ``"azula"`` or ``"edm"`` (what ``posteriori convert`` made of one of
            EDM's pickles); found from the source where it can be.
        options: of that kind (``from_diffusers``, ``from_denoiser``, ...), among them ``labels`` of a class-conditional
            model and ``conditioned=False`` for the network without inputs for the measurement. Where the source is a
            file of weights, ``network`` is the module that they belong to; deepinv's may be given by name, with its
            arguments as ``config``.

    Returns:
        The denoiser in evaluation mode, weights in float32, with a card as attribute ``card``.

    Raises:
        PretrainedError: when there is no such model or it follows no convention known here.
    """
    place = _locate(source) if isinstance(source, str | Path) else source
    found = kind or _recognise(place)
    if found not in _KINDS:
        raise PretrainedError(f"unknown kind {found!r}: choose one of {', '.join(_KINDS)}")
    model = place
    if isinstance(place, Path) and found not in ("diffusers", "edm"):
        model = _with_weights(options.pop("network", None), place, options.get("config"))
    try:
        denoiser = _KINDS[found](model, **options)
    except TypeError as error:
        if "keyword" not in str(error):
            raise
        raise PretrainedError(f"options of kind {found!r}: {error}") from None
    on_disk = isinstance(place, Path)
    name, licence = (place.name if on_disk else type(source).__name__), _licence(place)
    denoiser.card = {  # type: ignore[assignment]
        **describe(denoiser),
        "name": name,
        "value_range": [-1, 1],
        "tasks": {"none": 1.0},
        "training_data": {"description": "as its authors say", "licence": licence},
        "base": {"source": str(source) if on_disk else name, "kind": found, "licence": licence},
    }
    return denoiser.eval().float()


def _recognise(source: Any) -> str:
    if isinstance(source, Path):
        if is_diffusers_folder(source):
            return "diffusers"
        if _converted(source).get("kind") == "edm":
            return "edm"
    else:
        package = type(source).__module__.partition(".")[0]
        if package in ("diffusers", "deepinv", "azula"):
            return package
    what = str(source) if isinstance(source, Path) else type(source).__name__
    raise PretrainedError(
        f"cannot tell what {what} is: give kind='denoiser' for a network that returns the image, kind='network' with "
        f"prediction=... for one that predicts, or one of {', '.join(_KINDS)}"
    )


def _converted(place: Path) -> dict[str, Any]:
    """The card that ``posteriori convert`` wrote, or nothing."""
    return read_json((place if place.is_dir() else place.parent) / "weights.json")


def _with_weights(network: Any, place: Path, config: dict[str, Any] | None) -> nn.Module:
    """A module with the weights of a file. Checkpoints often have a wrapper's name before every name."""
    if isinstance(network, str):
        network = make_deepinv(network, config or {})
    if not isinstance(network, nn.Module):
        raise PretrainedError(f"{place} holds weights only: give the module that they belong to as network=...")
    network = copy.deepcopy(network)
    state = read_weights(place)
    wrappers = {key.partition(".")[0] for key in state} if not set(state) & set(network.state_dict()) else set()
    if len(wrappers) == 1:
        state = {key.partition(".")[2]: value for key, value in state.items()}
    try:
        missing, unexpected = network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise PretrainedError(f"the weights in {place} are of another network ({reason})") from None
    untrained = sorted(set(missing) & dict(network.named_parameters()).keys())  # buffers may be constants
    if untrained or unexpected:
        names = ", ".join([*untrained, *unexpected][:5])
        raise PretrainedError(f"the weights in {place} are of another network ({names}): check its arguments")
    return network


def _licence(place: Any) -> str:
    if not isinstance(place, Path):
        return "not stated"
    return _converted(place).get("licence") or readme_licence(place if place.is_dir() else place.parent) or "not stated"


def readme_licence(folder: Path) -> str | None:
    """The licence in the front matter of a folder's ``README.md``, as hubs have it."""
    readme = folder / "README.md"
    head = readme.read_text(encoding="utf-8", errors="replace").split("---") if readme.is_file() else []
    stated = re.search(r"^license:\s*(\S+)\s*$", head[1], re.MULTILINE) if len(head) > 2 else None
    return stated[1] if stated else None


def _locate(source: str | Path) -> Path:
    """The source on this disk; a hub id is downloaded, without pickled files."""
    path = Path(source)
    if path.exists():
        return path
    if isinstance(source, str) and source.count("/") == 1 and not source.startswith((".", "/")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "README.md"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise PretrainedError(
                f"no model {source!r}: it is no file or folder, and the hub could not be asked ({type(error).__name__})"
            ) from None
    raise PretrainedError(f"no model {str(source)!r}: give a file, a folder, or a hub id 'owner/name'")
