"""From a photo and a task to the linear inverse problem ``y = A x_0 + sigma_y noise``.

Choices made here, and why:

- Grey photos go through a colour network as three equal channels. Their noise is then equal too: one noisy grey value
  seen three times, not three measurements. For a grey ``x_0`` the likelihood of three channels at noise ``sigma`` is
  that of the one at ``sigma / sqrt(3)``, so the network is told ``sqrt(3) sigma_y``; results are averaged to grey.
- Where nothing else is said, the missing box lies in the middle and its side is half the shorter side of the photo.
- A noise level that is to be estimated is moved into the range that the model knows, and the photo's owner is told.
- Sizes that the scale does not divide are cropped at the right and bottom, with a warning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from posteriori import operators
from posteriori.images import LARGEST, SMALLEST, Photo, read_kernel, read_mask, read_photo
from posteriori.loading import load_operator
from posteriori.noise_level import estimate_sigma_y
from posteriori.operators import LinearOperator
from posteriori.pivot import measure
from posteriori.tasks import box_mask, random_mask

__all__ = ["TASKS", "InputError", "RestorationProblem", "TaskOptions", "build_problem", "read_input"]

BOUNDARIES = ("reflect", "replicate", "zero", "circular")
# Options that change a task; one that would be ignored is an error, not a surprise.
TASKS: dict[str, frozenset[str]] = {
    "inpaint": frozenset({"mask", "missing"}),
    "box": frozenset({"mask", "box"}),
    "sr": frozenset({"scale", "sr_kernel", "kernel", "boundary"}),
    "gaussian": frozenset({"blur_sigma", "boundary"}),
    "motion": frozenset({"kernel", "boundary"}),
    "denoise": frozenset(),
    "custom": frozenset({"operator"}),
}
# The measurement's noise is drawn from a stream of its own: samples use the seed itself.
_NOISE_STREAM = 0x5EED


class InputError(ValueError):
    """Options or files that do not make a problem: what, why, and what to try."""


@dataclass(frozen=True)
class TaskOptions:
    """A task with its options; ``None`` means the task's default.

    Attributes:
        task: a key of :data:`TASKS`.
        sigma_y: noise standard deviation, images in [-1, 1]; ``"auto"``: estimated from the measurement.
        degrade: whether photos are clean and to be degraded first.
        mask: image file, white = missing (inpaint, box).
        missing: share of missing pixels (inpaint with ``degrade``); 0.7.
        box: height and width of the missing box in the middle (box with ``degrade``); half the shorter side.
        scale: factor between the large and the small photo (sr); 4.
        sr_kernel: ``"box"`` or ``"bicubic"`` (sr); box.
        blur_sigma: width of the blur in pixels (gaussian); 3.
        kernel: file with a kernel (motion; sr: its antialiasing filter); motion with ``degrade`` draws a camera shake.
        boundary: what lies outside the photo; reflect, for motion circular.
        operator: ``module:name`` of an operator, or of a function from a shape ``(3, H, W)`` to one (custom).
        seed: of masks, kernels and noise.
    """

    task: str
    sigma_y: float | Literal["auto"]
    degrade: bool = False
    mask: Path | None = None
    missing: float | None = None
    box: tuple[int, int] | None = None
    scale: int | None = None
    sr_kernel: str | None = None
    blur_sigma: float | None = None
    kernel: Path | None = None
    boundary: str | None = None
    operator: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise InputError(f"unknown task {self.task!r}: choose {', '.join(TASKS)}")
        if self.sigma_y == "auto":
            if self.degrade:
                raise InputError("--degrade adds the noise, so --sigma-y has to say how much: give a number, not auto")
        elif not (math.isfinite(self.sigma_y) and self.sigma_y >= 0):
            raise InputError(
                f"sigma_y is {self.sigma_y}: give the noise's standard deviation for images in [-1, 1], 0 or more"
            )
        named = {f.name for f in fields(self)} - {"task", "sigma_y", "degrade", "seed"}
        for name in sorted(named - TASKS[self.task]):
            if getattr(self, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} has no effect on task {self.task}: leave it out")
        if self.boundary is not None and self.boundary not in BOUNDARIES:
            raise InputError(f"unknown boundary {self.boundary!r}: choose {', '.join(BOUNDARIES)}")
        if self.sr_kernel is not None and self.sr_kernel not in ("box", "bicubic"):
            raise InputError(f"unknown sr kernel {self.sr_kernel!r}: choose box or bicubic")
        if self.sr_kernel is not None and self.kernel is not None:
            raise InputError("--sr-kernel and --kernel exclude each other: give one")
        if self.boundary is not None and self.task == "sr" and self.kernel is None:
            raise InputError("--boundary has no effect on the box and bicubic kernels of task sr: leave it out")
        if self.missing is not None and not 0 < self.missing < 1:
            raise InputError(f"--missing is {self.missing:g}: give the share of missing pixels, between 0 and 1")
        if self.missing is not None and not self.degrade:
            raise InputError("--missing draws a random mask for --degrade; a degraded photo needs --mask FILE")
        if self.box is not None and not self.degrade:
            raise InputError("--box cuts a box out for --degrade; a degraded photo needs --mask FILE")
        if self.mask is not None and (self.missing is not None or self.box is not None):
            raise InputError("--mask says which pixels are missing already: leave --missing and --box out")
        if self.scale is not None and self.scale < 2:
            raise InputError(f"--scale is {self.scale}: give a whole number from 2 on")
        if self.blur_sigma is not None and not (math.isfinite(self.blur_sigma) and self.blur_sigma > 0):
            raise InputError(f"--blur-sigma is {self.blur_sigma}: give a positive number of pixels")
        if self.task == "motion" and self.kernel is None and not self.degrade:
            raise InputError("task motion needs --kernel FILE (.npy, .txt or an image), or --degrade to draw one")
        if self.task == "custom" and self.operator is None:
            raise InputError("task custom needs --operator module:function")
        if self.seed < 0:
            raise InputError(f"--seed is {self.seed}: give a whole number from 0 on")

    @property
    def factor(self) -> int:
        """How much larger the restored photo is than the measured one."""
        return (self.scale or 4) if self.task == "sr" else 1


@dataclass(frozen=True)
class RestorationProblem:
    """A problem with a batch of one.

    Attributes:
        A: the operator.
        y: measurement as the network's channels, ``(1, C, ...)``.
        sigma_y: noise of the measurement, as given, or estimated and moved into the range the model knows.
        sigma_model: noise the network is told (larger for grey photos, see the module's head).
        grey: whether results are averaged to one channel.
        x_0: the clean photo ``(1, C, H, W)`` with ``degrade``.
        alpha: to be put back on results, ``(1, H, W)``.
        shown: the measurement brought to the photo's size, ``(1, C, H, W)``: its missing pixels filled with the mean
            of the measured ones, a small photo enlarged bicubically; ``None`` when there is no such picture.
        mask, kernel: what was drawn or read, to be kept with the measurement.
        estimate: of the noise, when it was to be estimated.
        notes: what the user should know.
    """

    A: LinearOperator
    y: Tensor
    sigma_y: float
    sigma_model: float
    grey: bool
    x_0: Tensor | None = None
    alpha: Tensor | None = None
    shown: Tensor | None = None
    mask: Tensor | None = None
    kernel: Tensor | None = None
    estimate: float | None = None
    notes: list[str] = field(default_factory=list)


def read_input(path: Path, options: TaskOptions) -> Photo:
    """The photo, or with super-resolution the small photo, whose result has to be within the sizes allowed."""
    small = options.task == "sr" and not options.degrade
    photo = read_photo(path, -(-SMALLEST // options.factor) if small else SMALLEST)
    if small and max(photo.size) * options.factor > LARGEST:
        h, w = photo.size
        raise InputError(
            f"{path} is {w}x{h}, {options.factor} times that is more than {LARGEST} pixels: lower --scale, or crop it"
        )
    return photo


def build_problem(
    photo: Photo,
    options: TaskOptions,
    channels: int = 3,
    device: str | torch.device = "cpu",
    known: tuple[float, float] = (0.0, math.inf),
) -> RestorationProblem:
    """The inverse problem of a photo.

    Args:
        photo: what :func:`read_input` gave.
        options: the task.
        channels: of the network's images.
        device: where tensors are put.
        known: noise that the network was trained for, to which an estimate is moved.

    Raises:
        ValueError: when photo and options do not fit, or the noise cannot be estimated.
    """
    if channels == 1 and not photo.grey:
        raise InputError("this model restores grey photos only: convert the photo, or use another model")
    notes: list[str] = []
    photo = _cropped(photo, options, notes)
    shape = (channels, photo.size[0] * _enlarged(options), photo.size[1] * _enlarged(options))
    mask, alpha, kernel = None, photo.alpha, None
    if options.task in ("inpaint", "box"):
        mask, alpha = _mask(photo, options, notes)
        A: LinearOperator = operators.Inpainting(mask.to(device))
    else:
        if options.kernel is not None:
            kernel = read_kernel(options.kernel)
        elif options.task == "motion":
            kernel = operators.motion_kernel(min(61, min(photo.size) // 2 * 2 - 1), 0.5, options.seed)
        A = _BUILDERS[options.task](options, kernel, shape)
        if not A.exact:
            notes.append(
                f"{A.describe()} has no exact solve: conjugate gradients make it about a hundred times slower"
                + ("; --boundary circular is exact" if options.task == "motion" else "")
            )
    if alpha is not None and _enlarged(options) > 1:
        size = (shape[1], shape[2])
        alpha = functional.interpolate(alpha[None], size=size, mode="bicubic", align_corners=False)[0].clamp(0, 1)

    pixels = photo.pixels[None].to(device)
    tripled = photo.grey and channels == 3
    # A custom operator may mix channels: its grey photos are colour photos with equal channels.
    grey = photo.grey and options.task != "custom"
    if tripled and not grey:
        pixels = pixels.expand(-1, 3, -1, -1)
    x_0 = None
    if options.degrade:
        assert options.sigma_y != "auto"
        x_0 = pixels
        y = measure(A, x_0, options.sigma_y, seed=options.seed ^ _NOISE_STREAM)
    else:
        y = pixels
        if mask is not None:
            y = y * mask.to(device)  # what a missing pixel holds does not matter
        signal = A.signal_shape(y.shape[1:]) if options.task == "custom" else shape
        if len(signal) != 3 or signal[0] != channels:
            raise InputError(f"the operator's signals have shape {tuple(signal)}, the model's ({channels}, H, W)")
    shown = _shown(y, mask, options)
    louder = math.sqrt(3) if tripled and grey else 1.0
    estimate = None
    if options.sigma_y != "auto":
        sigma_y = options.sigma_y
    else:
        estimate = float(estimate_sigma_y(A, y)[0])
        sigma_y = min(max(estimate, known[0] / louder), known[1] / louder)
        if sigma_y != estimate:
            notes.append(
                f"its noise is estimated as {estimate:.3g} = {estimate * 127.5:.2g}/255, outside what the model knows: "
                f"{sigma_y:.3g} = {sigma_y * 127.5:.3g}/255 is used"
            )
    if tripled and grey:
        y = y.expand(-1, 3, *y.shape[2:])
        x_0 = x_0.expand(-1, 3, -1, -1) if x_0 is not None else None
        shown = shown.expand(-1, 3, -1, -1) if shown is not None else None
    return RestorationProblem(
        A=A,
        y=y.contiguous(),
        sigma_y=sigma_y,
        sigma_model=sigma_y * louder,
        grey=grey,
        x_0=x_0,
        alpha=alpha,
        shown=shown,
        mask=mask,
        kernel=kernel,
        estimate=estimate,
        notes=notes,
    )


def _enlarged(options: TaskOptions) -> int:
    """Factor from the file's size to the restored size."""
    return 1 if options.degrade else options.factor


def _cropped(photo: Photo, options: TaskOptions, notes: list[str]) -> Photo:
    h, w = photo.size
    f = options.factor
    if not options.degrade or (h % f == 0 and w % f == 0):
        return photo
    h, w = h // f * f, w // f * f
    if min(h, w) < SMALLEST:
        raise InputError(f"a photo of {photo.size[1]}x{photo.size[0]} is too small for --scale {f}: use a larger one")
    notes.append(f"{photo.size[1]}x{photo.size[0]} is no multiple of {f}: cropped to {w}x{h} (right and bottom edge)")
    alpha = photo.alpha[:, :h, :w] if photo.alpha is not None else None
    return Photo(photo.pixels[:, :h, :w], alpha)


def _mask(photo: Photo, options: TaskOptions, notes: list[str]) -> tuple[Tensor, Tensor | None]:
    """Mask ``(1, H, W)``, 1 = measured, and the alpha that is left to put back."""
    alpha = photo.alpha
    if options.mask is not None:
        mask = read_mask(options.mask, photo.size)
    elif options.degrade:
        rng = np.random.default_rng(options.seed)
        if options.task == "inpaint":
            mask = random_mask(photo.size, 0.7 if options.missing is None else options.missing, rng)
        else:
            side = min(photo.size) // 2
            mask = box_mask(photo.size, options.box or (side, side))
    elif alpha is not None and bool((alpha == 0).any()):
        mask, alpha = (alpha > 0).float(), None
        notes.append("the photo's transparent pixels are taken as missing")
    else:
        raise InputError(
            f"task {options.task} needs to know what is missing: give --mask FILE (white = missing), a photo with "
            "transparent pixels, or --degrade for a clean photo"
        )
    if not bool(mask.any()):
        raise InputError("the mask hides every pixel: leave some to start from")
    if bool(mask.all()):
        notes.append("the mask hides nothing (white = missing): this is denoising")
    return mask, alpha


def _shown(y: Tensor, mask: Tensor | None, options: TaskOptions) -> Tensor | None:
    if mask is not None:
        m = mask.to(y)
        mean = (y * m).sum((-2, -1), keepdim=True) / m.sum()
        return y * m + mean * (1 - m)
    if options.task == "sr":
        return functional.interpolate(y, scale_factor=options.factor, mode="bicubic", align_corners=False)
    return None if options.task == "custom" else y


def _sr(options: TaskOptions, kernel: Tensor | None, shape: tuple[int, ...]) -> LinearOperator:
    filter_ = options.sr_kernel or "box" if kernel is None else kernel
    return operators.Downsampling(options.factor, filter_, options.boundary or "reflect")  # type: ignore[arg-type]


def _gaussian(options: TaskOptions, kernel: Tensor | None, shape: tuple[int, ...]) -> LinearOperator:
    width = 3.0 if options.blur_sigma is None else options.blur_sigma
    return operators.GaussianBlur(width, boundary=options.boundary or "reflect")  # type: ignore[arg-type]


def _motion(options: TaskOptions, kernel: Tensor | None, shape: tuple[int, ...]) -> LinearOperator:
    assert kernel is not None
    if any(k > n for k, n in zip(kernel.shape, shape[-2:], strict=True)):
        raise InputError(f"the kernel is {kernel.shape[1]}x{kernel.shape[0]}, larger than the photo: crop it")
    return operators.Blur(kernel, options.boundary or "circular")  # type: ignore[arg-type]


def _custom(options: TaskOptions, kernel: Tensor | None, shape: tuple[int, ...]) -> LinearOperator:
    assert options.operator is not None
    return load_operator(options.operator, shape)


_BUILDERS: dict[str, Callable[[TaskOptions, Tensor | None, tuple[int, ...]], LinearOperator]] = {
    "sr": _sr,
    "gaussian": _gaussian,
    "motion": _motion,
    "denoise": lambda options, kernel, shape: operators.Identity(),
    "custom": _custom,
}
