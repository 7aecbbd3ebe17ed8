"""Random crops of an image: place, scale and orientation, all from one random generator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

__all__ = ["Augmentation", "crop"]


@dataclass(frozen=True)
class Augmentation:
    """How crops are varied.

    Attributes:
        native_share: share of crops taken at the photo's own resolution.
        scale: range of the resampling factor of the others, log-uniform; a factor below 1 shrinks the photo.
        flip: probability of a left-right flip.
        turn: probability of an up-down flip, and of a transposition.
    """

    native_share: float = 0.5
    scale: tuple[float, float] = (0.5, 1.25)
    flip: float = 0.5
    turn: float = 0.05


def crop(image: np.ndarray, size: int, augmentation: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """A random crop ``(size, size, C)`` of an image ``(H, W, C)``, 8-bit or float; small images are enlarged."""
    a = augmentation
    h, w = image.shape[:2]
    factor = 1.0
    if rng.random() >= a.native_share:
        factor = float(np.exp(rng.uniform(np.log(a.scale[0]), np.log(a.scale[1]))))
    side = min(size / factor, min(h, w))  # pixels of the photo that the crop covers
    if abs(side - size) < 1:
        top, left = rng.integers(h - size + 1), rng.integers(w - size + 1)
        result = image[top : top + size, left : left + size]
    else:
        top, left = rng.uniform(0, h - side), rng.uniform(0, w - side)
        result = _resize(image, size, (left, top, left + side, top + side))
    if rng.random() < a.flip:
        result = result[:, ::-1]
    if rng.random() < a.turn:
        result = result[::-1]
    if rng.random() < a.turn:
        result = result.transpose(1, 0, 2)
    return np.ascontiguousarray(result)


def _resize(image: np.ndarray, size: int, box: tuple[float, float, float, float]) -> np.ndarray:
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box))
    planes = [
        np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.BICUBIC, box=box))
        for plane in np.moveaxis(image, 2, 0)
    ]
    result = np.stack(planes, 2)
    # bicubic interpolation overshoots; the range is a promise (8-bit planes are clipped by the library)
    return result if image.dtype == np.uint8 else result.clip(-1, 1)
