"""Restoring one photo: from a problem and a denoiser to pictures and figures. Used by the commands and the demo.

    residual    sqrt(|y - A x|^2 / (m sigma_y^2))      1 for posterior samples, below 1 for means; null at sigma_y = 0
    psnr        10 log10(4 / mean (clamp(x) - x_0)^2)  over all pixels and channels, in dB

What is written to a folder appears there at once: files are prepared in a hidden folder beside it and moved.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from posteriori import metrics
from posteriori._version import __version__
from posteriori.checkpoint import CheckpointError, load, read_card, write_atomically
from posteriori.denoise import NetworkDenoiser
from posteriori.images import encode_png, to_picture
from posteriori.methods import MethodError, get_method
from posteriori.metrics import residual_squares
from posteriori.operators import LinearOperator
from posteriori.posterior import ExactPosterior
from posteriori.precision import PRECISIONS, ReducedPrecision, choose_precision
from posteriori.problems import InputError, RestorationProblem, TaskOptions
from posteriori.sheets import contact_sheet, std_map, with_colour_bar
from posteriori.tiling import TiledBackbone

__all__ = [
    "Restoration",
    "RestoreOptions",
    "file_hash",
    "fingerprint",
    "is_finished",
    "load_model",
    "psnr",
    "restore",
    "whitened_residual",
    "write",
]

# What a finished folder holds whatever the method; report.json is the last to arrive.
REPORT, SETTINGS = "report.json", "settings.json"


@dataclass(frozen=True)
class RestoreOptions:
    """How a problem is solved.

    Attributes:
        samples: posterior samples.
        nfe: network evaluations per sample.
        method: see :data:`posteriori.methods.METHODS`.
        model: bundled name, folder or hub id.
        seed: of the samples.
        precision: of the network, ``"float32"``, ``"bfloat16"``, or ``"auto"``
            (:func:`posteriori.precision.choose_precision`); all else is in float32.
    """

    samples: int = 4
    nfe: int = 8
    method: str = "eps"
    model: str = "photo"
    seed: int = 0
    precision: str = "auto"

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= 999:
            raise InputError(f"--samples is {self.samples}: give 1 to 999")
        if not 1 <= self.nfe <= 10000:
            raise InputError(f"--nfe is {self.nfe}: give 1 to 10000")
        if self.precision not in PRECISIONS:
            raise InputError(f"unknown precision {self.precision!r}: choose {', '.join(PRECISIONS)}")
        get_method(self.method)


@dataclass(frozen=True)
class Restoration:
    """Everything about one restored photo. Images are ``(1, C, H, W)``, ``C = 1`` for grey photos.

    Attributes:
        problem: what was solved.
        mmse: posterior mean in one evaluation or two, or ``None``.
        mean: mean of the samples, or the method's single answer.
        linear: the linear estimate.
        samples: ``(n, 1, C, H, W)``, or ``None``.
        std: pixelwise standard deviation of the samples, or ``None``. Of a single sample: its distance to ``mmse``.
        report: the figures, as written to ``report.json``.
    """

    problem: RestorationProblem
    mmse: Tensor | None
    mean: Tensor
    linear: Tensor
    samples: Tensor | None
    std: Tensor | None
    report: dict[str, Any]

    def picture(self, x: Tensor) -> Image.Image:
        """8-bit picture of one image, with the photo's alpha."""
        return to_picture(_grey(x, self.problem)[0], self.problem.alpha)


def load_model(name: str, device: str | torch.device = "cpu", precision: str = "float32") -> NetworkDenoiser:
    """A trained denoiser whose network is tiled when it can be, and works in the ``precision`` of
    :class:`RestoreOptions`."""
    denoiser = load(name, device)
    network = denoiser.backbone
    if (choose_precision(network, device) if precision == "auto" else precision) == "bfloat16":
        denoiser.backbone = ReducedPrecision(network)
    if isinstance(getattr(network, "stride", None), int):
        denoiser.backbone = TiledBackbone(denoiser.backbone)
    return denoiser


def network_precision(denoiser: NetworkDenoiser) -> str:
    """``"bfloat16"`` or ``"float32"``."""
    reduced = any(isinstance(m, ReducedPrecision) for m in denoiser.modules())
    return "bfloat16" if reduced else "float32"


def model_channels(name: str) -> int:
    """Image channels of a model, from its card."""
    network = read_card(name)["network"]
    if not isinstance(network, dict):
        raise CheckpointError(f"the card of model {name!r} has no network description: copy the model again")
    return int(network.get("image_channels") or network.get("in_channels") or 3)


def whitened_residual(A: LinearOperator, x: Tensor, y: Tensor, sigma_y: float) -> float | None:
    """``sqrt(|y - A x|^2 / (m sigma_y^2))`` over the ``m`` measured entries; ``None`` at ``sigma_y = 0``."""
    if sigma_y == 0:
        return None
    return float((residual_squares(A, x, y, sigma_y).sum() / A.measurement_count(y).sum()).sqrt())


def psnr(x: Tensor, x_0: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of an image clamped to [-1, 1]; at most 100, so that it is a number in JSON."""
    return min(float(metrics.psnr(x, x_0)), 100.0)


def _grey(x: Tensor, problem: RestorationProblem) -> Tensor:
    return x.mean(-3, keepdim=True) if problem.grey else x


def _spread(x: Tensor, like: Tensor) -> Tensor:
    """A grey image as the channels of the problem."""
    return x.expand(*x.shape[:-3], like.shape[-3], *x.shape[-2:])


def _std(samples: Tensor) -> Tensor:
    """``samples.std(0)``, which takes more than ten times as long."""
    mean, squares = samples.mean(0), torch.zeros_like(samples[0])
    for x in samples:
        squares += (x - mean).square()
    return (squares / (len(samples) - 1)).sqrt()


@torch.no_grad()
def restore(
    problem: RestorationProblem,
    denoiser: NetworkDenoiser,
    task: TaskOptions,
    options: RestoreOptions,
    advance: Callable[[int], None] = lambda _: None,
) -> Restoration:
    """Solve a problem.

    Args:
        problem: from :func:`posteriori.problems.build_problem`.
        denoiser: from :func:`load_model`.
        task, options: what to do.
        advance: called with the network evaluations just spent.

    Raises:
        InputError: when measurement, noise, model and method do not fit.
    """
    began = time.monotonic()
    try:
        posterior = ExactPosterior(denoiser, problem.A, problem.y, problem.sigma_model)
        linear = get_method("linear")(posterior).mean
    except ValueError as error:
        grey = " (grey photos: sigma_y times sqrt(3), see the documentation)" if problem.grey else ""
        raise InputError(f"{error}{grey}") from None
    method = get_method(options.method)
    try:
        settings = method.settings(task.task)
        estimate = method(posterior, options.samples, options.nfe, options.seed, advance, **settings)
    except MethodError as error:
        raise InputError(f"--method {error}") from None
    seconds = time.monotonic() - began

    def reduced(x: Tensor | None) -> Tensor | None:
        return None if x is None else _spread(_grey(x, problem), problem.y)

    mmse, mean, samples = reduced(estimate.mmse), reduced(estimate.mean), reduced(estimate.samples)
    linear = _spread(_grey(linear, problem), problem.y)
    assert mean is not None
    std = None
    if samples is not None and len(samples) > 1:
        std = _std(samples)
    elif samples is not None and mmse is not None:
        std = (samples[0] - mmse).abs()

    def residual_of(x: Tensor | None) -> float | None:
        return None if x is None else whitened_residual(problem.A, x, problem.y, problem.sigma_y)

    def psnr_of(x: Tensor | None) -> float | None:
        return None if x is None or problem.x_0 is None else psnr(x, problem.x_0)

    drawn = [] if samples is None else list(samples)
    report = {
        "task": task.task,
        "operator": problem.A.describe(),
        "method": options.method,
        "model": options.model,
        "precision": network_precision(denoiser),
        "sigma_y": problem.sigma_y,
        "sigma_y_source": "given" if problem.estimate is None else "estimated",
        "sigma_y_estimate": problem.estimate,
        "nfe": options.nfe,
        "evaluations": estimate.evaluations,
        "backward_passes": estimate.backward,
        "settings": estimate.settings,
        "seed": options.seed,
        "seconds": round(seconds, 3),
        "residual": {
            "linear": residual_of(linear),
            "mmse": residual_of(mmse),
            "mean": residual_of(mean),
            "samples": [residual_of(s) for s in drawn],
        },
        "psnr": None
        if problem.x_0 is None
        else {
            "input": psnr_of(problem.shown),
            "linear": psnr_of(linear),
            "mmse": psnr_of(mmse),
            "mean": psnr_of(mean),
            "samples": [psnr_of(s) for s in drawn],
        },
    }
    return Restoration(problem, mmse, mean, linear, samples, std, report)


def report_sheet(result: Restoration, title: str) -> Image.Image:
    """Contact sheet of one restoration."""
    p, figures = result.problem, result.report
    cells: list[tuple[str, Image.Image | None]] = []

    def add(name: str, x: Tensor | None, db: float | None, residual: float | None = None) -> None:
        if x is not None:
            parts = [f"{db:.1f} dB"] if db is not None else []
            parts += [f"residual {residual:.2f}"] if residual is not None else []
            cells.append((f"{name}\n{', '.join(parts)}", result.picture(x)))

    residual = figures["residual"]
    db = figures["psnr"] or dict.fromkeys(("input", "linear", "mmse", "mean", "samples"))
    add("input", p.shown, db["input"])
    add("linear estimate", result.linear, db["linear"], residual["linear"])
    add("posterior mean", result.mmse, db["mmse"], residual["mmse"])
    drawn = [] if result.samples is None else list(result.samples[:8])
    add(f"mean of {figures['method']} samples" if drawn else figures["method"], result.mean, db["mean"],
        residual["mean"])  # fmt: skip
    for k, x in enumerate(drawn):
        add(f"sample {k + 1}", x, db["samples"][k] if db["samples"] else None, residual["samples"][k])
    if result.std is not None:
        picture, top = std_map(_grey(result.std, p)[0])
        cells.append(("standard deviation\n", with_colour_bar(picture, top)))
    add("truth", p.x_0, None)
    columns = 4 if len(cells) > 5 else len(cells)
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    s = figures["sigma_y"]
    footer = f"{figures['operator']}, sigma_y {s:g} = {s * 127.5:.1f}/255, {figures['nfe']} evaluations a sample"
    return contact_sheet(rows, heading=title, footer=footer)


def fingerprint(task: TaskOptions, options: RestoreOptions) -> dict[str, Any]:
    """What the results of every photo depend on: options, version, and hashes of the model and of all files named.

    Raises:
        ValueError: when a file or the model is missing.
    """
    settings: dict[str, Any] = {"version": __version__, "model_sha256": read_card(options.model)["sha256"]}
    for key, value in {**asdict(task), **asdict(options)}.items():
        settings[key] = (
            file_hash(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        )
    module = Path((task.operator or "").rpartition(":")[0])
    if module.suffix == ".py" and module.is_file():
        settings["operator_file"] = file_hash(module)
    return settings


def file_hash(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        InputError: when it cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the name") from None


def is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a folder holds the complete result of exactly these settings."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        known = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    names = ["mean.png", "report.png"]
    names += [f"sample-{k + 1:02d}.png" for k in range(len(report.get("residual", {}).get("samples", [])))]
    return bool(known == settings) and all((folder / name).is_file() for name in names)


def write(result: Restoration, folder: Path, settings: dict[str, Any]) -> None:
    """Write the files of one restoration; ``report.json`` comes last. Older results of the folder are replaced."""
    files: dict[str, bytes] = {}
    problem = result.problem
    if result.mmse is not None:
        files["mmse.png"] = encode_png(result.picture(result.mmse))
    files["mean.png"] = encode_png(result.picture(result.mean))
    if result.std is not None:
        picture, top = std_map(_grey(result.std, problem)[0])
        files["std.png"] = encode_png(picture, scale=f"black 0, brightest {top:g} (images in [-1, 1])")
    for k, x in enumerate([] if result.samples is None else result.samples):
        files[f"sample-{k + 1:02d}.png"] = encode_png(result.picture(x))
    if problem.x_0 is not None:
        files["measurement.npy"] = _npy(_grey(problem.y, problem)[0])
        if problem.mask is not None:
            files["mask.png"] = encode_png(to_picture(1 - 2 * problem.mask))
        if problem.kernel is not None:
            files["kernel.npy"] = _npy(problem.kernel)
    files["report.png"] = encode_png(report_sheet(result, f"{folder.name}: {result.report['task']}"))
    files[SETTINGS] = (json.dumps(settings, indent=1) + "\n").encode()
    files[REPORT] = (json.dumps(result.report, indent=1, allow_nan=False) + "\n").encode()
    _publish(files, folder)


def _npy(x: Tensor) -> bytes:
    stream = io.BytesIO()
    np.save(stream, x.cpu().numpy(), allow_pickle=False)
    return stream.getvalue()


def _publish(files: dict[str, bytes], folder: Path) -> None:
    """A new folder appears complete; in an old one ``report.json`` is missing while the other files change."""
    if folder.exists():
        (folder / REPORT).unlink(missing_ok=True)
        for old in [*folder.glob("sample-*.png"), *(folder / n for n in ("mmse.png", "std.png", "mask.png"))]:
            if old.name not in files:
                old.unlink(missing_ok=True)
        for name, data in files.items():
            write_atomically(folder / name, data)
        return
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        for name, data in files.items():
            (partial / name).write_bytes(data)
        partial.chmod(0o755)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
