"""Other people's pretrained models, all as the same :class:`NetworkDenoiser` on one schedule.

With nothing measured (``A = 0``) the denoiser is the original model, whatever the preconditioning: what is new starts
at zero weight.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posteriori.backbones.cards import describe
from posteriori.backbones.peers import from_azula, from_deepinv
from posteriori.backbones.pipelines import PretrainedError, from_diffusers, is_diffusers_folder
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
}


def load_pretrained(source: Any, *, kind: str | None = None, **options: Any) -> NetworkDenoiser:
    """A pretrained diffusion or flow model as a denoiser, ready to be fine-tuned.

    Args:
        source: a folder, file or hub id ``"owner/name"``, or the model itself.
        kind: ``"diffusers"``, ``"denoiser"`` (a network that returns the image), ``"network"`` (one that predicts),
            ``"guided-diffusion"``, ``"deepinv"`` or ``"azula"``; found from the source where it can be.
        options: of that kind (``from_diffusers``, ``from_denoiser``, ...), among them ``labels`` of a class-conditional
            model and ``conditioned=False`` for the network without inputs for the measurement.

    Returns:
        The denoiser in evaluation mode, weights in float32, with a card as attribute ``card``.

    Raises:
        PretrainedError: when there is no such model or it follows no convention known here.
    """
    place = _locate(source) if isinstance(source, str | Path) else source
    found = kind or _recognise(place)
    if found not in _KINDS:
        raise PretrainedError(f"unknown kind {found!r}: choose one of {', '.join(_KINDS)}")
    try:
        denoiser = _KINDS[found](place, **options)
    except TypeError as error:
        if "keyword" not in str(error):
            raise
        raise PretrainedError(f"options of kind {found!r}: {error}") from None
    denoiser.card = {  # type: ignore[assignment]
        **describe(denoiser),
        "name": place.name if isinstance(place, Path) else type(source).__name__,
        "value_range": [-1, 1],
        "tasks": {"none": 1.0},
        "training_data": {"description": "as its authors say", "licence": _licence(place)},
        "base": {"source": str(source) if isinstance(place, Path) else type(source).__name__, "kind": found,
                 "licence": _licence(place)},
    }  # fmt: skip
    return denoiser.eval().float()


def _licence(place: Any) -> str:
    """The licence in the front matter of a model card on a hub."""
    readme = place / "README.md" if isinstance(place, Path) else None
    if readme is not None and readme.is_file():
        head = readme.read_text(encoding="utf-8", errors="replace").split("---")
        if len(head) > 2 and (stated := re.search(r"^license:\s*(\S+)\s*$", head[1], re.MULTILINE)):
            return stated[1]
    return "not stated"


def _recognise(source: Any) -> str:
    if isinstance(source, Path):
        if is_diffusers_folder(source):
            return "diffusers"
    else:
        package = type(source).__module__.partition(".")[0]
        if package in ("diffusers", "deepinv", "azula"):
            return package
    what = str(source) if isinstance(source, Path) else type(source).__name__
    raise PretrainedError(
        f"cannot tell what {what} is: give kind='denoiser' for a network that returns the image, kind='network' with "
        f"prediction=... for one that predicts, or one of {', '.join(_KINDS)}"
    )


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
