"""Other people's pretrained models, all as the same :class:`NetworkDenoiser` on one schedule.

With nothing measured (``A = 0``) the denoiser is the original model, whatever the preconditioning: what is new starts
at zero weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posteriori.backbones.pipelines import PretrainedError, from_diffusers, is_diffusers_folder
from posteriori.denoise import NetworkDenoiser

__all__ = ["PretrainedError", "load_pretrained"]

_KINDS = {"diffusers": from_diffusers}


def load_pretrained(source: Any, *, kind: str | None = None, **options: Any) -> NetworkDenoiser:
    """A pretrained diffusion or flow model as a denoiser, ready to be fine-tuned.

    Args:
        source: a folder, file or hub id ``"owner/name"``, or the model itself.
        kind: ``"diffusers"`` (see :func:`from_diffusers`); found from the source when left out.
        options: of that kind, among them ``labels`` of a class-conditional model and ``conditioned=False`` for the
            network without channels for the measurement.

    Returns:
        The denoiser in evaluation mode, weights in float32.

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
        if "unexpected keyword" in str(error):
            raise PretrainedError(f"kind {found!r}: {error}") from None
        raise
    return denoiser.eval().float()


def _recognise(source: Any) -> str:
    if isinstance(source, Path):
        if is_diffusers_folder(source):
            return "diffusers"
    elif type(source).__module__.startswith("diffusers."):
        return "diffusers"
    raise PretrainedError(f"cannot tell what kind of model {source!s:.200} is: give kind={' or '.join(_KINDS)}")


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
