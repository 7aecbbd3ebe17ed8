"""Training images: folders of photos, as random crops at several scales, in [-1, 1].

Photos are decoded once and kept as 8-bit arrays. Every crop is a function of ``(seed, step)`` alone, so a resumed run
sees exactly what an uninterrupted one would have seen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["Augmentation", "PhotoSource", "Photos"]

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class PhotoSource:
    """A folder of photos.

    Attributes:
        folder: where they are.
        match: regular expression that a file name must match in full (licences may need it).
        weight: share of the crops, relative to the other sources.
    """

    folder: str
    match: str = ".*"
    weight: float = 1.0


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


@dataclass
class Photos:
    """Photos in memory, with random access by crop.

    Args:
        sources: folders with weights.
        augmentation: how crops are varied.

    Raises:
        ValueError: when a folder is missing or holds no readable photo that matches.
    """

    sources: Sequence[PhotoSource]
    augmentation: Augmentation = field(default_factory=Augmentation)
    skipped: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        # One flat tensor per source: other processes then share its memory instead of copying every photo.
        self._pixels: list[Tensor] = []
        self._index: list[list[tuple[int, int, int]]] = []  # start, height, width
        for source in self.sources:
            folder = Path(source.folder)
            if not folder.is_dir():
                raise ValueError(f"no folder {folder}: give the data with --set data=PATH")
            pattern = re.compile(source.match)
            files = sorted(
                p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and pattern.fullmatch(p.name)
            )
            images = []
            for path in files:
                try:
                    with Image.open(path) as opened:
                        images.append(np.asarray(opened.convert("RGB")))
                except OSError:
                    self.skipped.append(str(path))
            if not images:
                raise ValueError(f"{folder} holds no readable photo matching {source.match!r}")
            starts = np.cumsum([0, *(image.size for image in images)])
            self._index.append([(int(s), *image.shape[:2]) for s, image in zip(starts, images, strict=False)])
            self._pixels.append(torch.from_numpy(np.concatenate([image.reshape(-1) for image in images])))

    def __len__(self) -> int:
        return sum(len(index) for index in self._index)

    def photo(self, source: int, number: int) -> np.ndarray:
        """A photo as an 8-bit array ``(H, W, 3)``."""
        start, h, w = self._index[source][number]
        return self._pixels[source].numpy()[start : start + h * w * 3].reshape(h, w, 3)

    def crops(self, count: int, size: int, rng: np.random.Generator) -> Tensor:
        """``count`` random crops, float32 ``(count, 3, size, size)`` in [-1, 1].

        Photos smaller than the crop are enlarged to it.
        """
        weights = np.array([s.weight for s in self.sources], dtype=np.float64)
        picks = rng.choice(len(self.sources), count, p=weights / weights.sum())
        crops = [self._crop(self.photo(p, int(rng.integers(len(self._index[p])))), size, rng) for p in picks]
        return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1

    def _crop(self, image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        a = self.augmentation
        h, w = image.shape[:2]
        factor = 1.0
        if rng.random() >= a.native_share:
            factor = float(np.exp(rng.uniform(np.log(a.scale[0]), np.log(a.scale[1]))))
        side = min(size / factor, min(h, w))  # pixels of the photo that the crop covers
        if abs(side - size) < 1:
            top, left = rng.integers(h - size + 1), rng.integers(w - size + 1)
            crop = image[top : top + size, left : left + size]
        else:
            top, left = rng.uniform(0, h - side), rng.uniform(0, w - side)
            box = (left, top, left + side, top + side)
            crop = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box))
        if rng.random() < a.flip:
            crop = crop[:, ::-1]
        if rng.random() < a.turn:
            crop = crop[::-1]
        if rng.random() < a.turn:
            crop = crop.transpose(1, 0, 2)
        return np.ascontiguousarray(crop)
