"""Where training images come from: folders, arrays, shards, Hugging Face data sets; one line of a recipe each.

Whatever the source, an image is an array ``(H, W, C)``: 8-bit with 0 to 255 for [-1, 1], or float32 in [-1, 1].
"""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

__all__ = ["DataError", "PhotoSource", "UnreadableError"]

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
KINDS = ("folder", "array", "shards", "dataset")


class DataError(ValueError):
    """Data that cannot be trained on: what is wrong, and what to try."""


class UnreadableError(Exception):
    """One sample that has to be skipped, and why."""


@dataclass(frozen=True)
class PhotoSource:
    """One source of images. Paths are relative to the recipe's ``data``; exactly one of the first four is given.

    Attributes:
        folder: image files, in folders below it too.
        array: a ``.npy`` or ``.npz`` file of images ``(N, H, W)``, ``(N, H, W, C)`` or ``(N, C, H, W)``.
        shards: WebDataset shards of image files: a path or URL with ``*`` (paths only) or ``{000..099}``. Streamed.
        dataset: a Hugging Face data set: a folder written by its ``save_to_disk``, or an id of the hub.
        match: regular expression that a file name in a folder must match in full (licences may need it).
        weight: share of the crops, relative to the other sources.
        value_range: the values that stand for black and white. Left out, images are 8-bit: 0 and 255. Arrays of
            another type have to say.
        key: which array of an ``.npz`` file, which column of a data set; where there is one alone it need not be said.
        split: of a data set from the hub.
        memory: whether a folder's images are decoded once and kept, which takes 3 bytes a pixel.
    """

    folder: str = ""
    match: str = ".*"
    weight: float = 1.0
    array: str = ""
    shards: str = ""
    dataset: str = ""
    value_range: tuple[float, float] | None = None
    key: str = ""
    split: str = "train"
    memory: bool = True

    def __post_init__(self) -> None:
        given = [k for k in KINDS if getattr(self, k)]
        if len(given) != 1:
            raise ValueError(f"a source is one of {', '.join(KINDS)}; given: {', '.join(given) or 'none of them'}")
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"value_range must be [black, white] with black < white, got {list(self.value_range)}")
        if not self.weight > 0:
            raise ValueError(f"weight must be positive, got {self.weight}")

    @property
    def place(self) -> str:
        """What the source was given as."""
        return self.folder or self.array or self.shards or self.dataset


def under(root: str, place: str) -> str:
    """``place`` below ``root``, which may be a folder or the beginning of a URL."""
    if "://" in place or not root or Path(place).is_absolute():
        return place
    return f"{root.rstrip('/')}/{place}" if "://" in root else str(Path(root) / place)


def as_image(values: np.ndarray, channels: int, value_range: tuple[float, float] | None) -> np.ndarray:
    """An array as ``(H, W, channels)``, 8-bit or float32 in [-1, 1].

    Raises:
        UnreadableError: on another shape, values that are not finite, or outside of ``value_range``.
    """
    image = values[:, :, None] if values.ndim == 2 else values
    if image.ndim != 3 or 0 in image.shape:
        raise UnreadableError(f"shape {values.shape} is not that of an image")
    if image.shape[2] not in (1, channels) and image.shape[0] in (1, channels):
        image = image.transpose(1, 2, 0)
    if image.shape[2] == 1 and channels > 1:
        image = image.repeat(channels, 2)
    if image.shape[2] != channels:
        raise UnreadableError(f"shape {values.shape} does not have {channels} channels, first or last")
    if value_range is None or (image.dtype == np.uint8 and value_range == (0.0, 255.0)):
        if image.dtype != np.uint8:
            raise UnreadableError(f"values are {image.dtype}, not 8-bit: give the source's value_range: [black, white]")
        return image
    low, high = value_range
    scaled = (2 * (image.astype(np.float32) - low) / (high - low) - 1).astype(np.float32)
    if not np.isfinite(scaled).all():
        raise UnreadableError("values are not finite")
    if np.abs(scaled).max() > 1.001:
        raise UnreadableError(f"values from {image.min():g} to {image.max():g} leave value_range [{low:g}, {high:g}]")
    return scaled.clip(-1, 1)


def decode(file: str | Path | bytes, channels: int, value_range: tuple[float, float] | None) -> np.ndarray:
    """An image file, by path or content, as :func:`as_image` gives it.

    Raises:
        UnreadableError: when it is not a whole image.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
            return from_pil(opened, channels, value_range)
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:  # what broken files make PIL raise
        raise UnreadableError(str(error) or type(error).__name__) from None


def from_pil(opened: Image.Image, channels: int, value_range: tuple[float, float] | None) -> np.ndarray:
    """A PIL image as :func:`as_image` gives it."""
    if value_range is None:
        opened = opened.convert({1: "L", 3: "RGB", 4: "RGBA"}.get(channels, "RGB"))
    return as_image(np.asarray(opened), channels, value_range)


class Indexed(ABC):
    """Images that can be read in any order."""

    #: Reasons for what was skipped when the source was opened, and of how many.
    skipped: list[str]
    files: int

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, i: int) -> np.ndarray:
        """Image ``i``.

        Raises:
            UnreadableError: when it has to be skipped.
        """


class Folder(Indexed):
    """Image files of a folder and the folders below it."""

    def __init__(self, source: PhotoSource, root: str, channels: int) -> None:
        folder = Path(under(root, source.folder))
        if not folder.is_dir():
            raise DataError(f"no folder {folder}: give the data with --set data=PATH")
        pattern = re.compile(source.match)
        self.paths = sorted(
            p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and pattern.fullmatch(p.name)
        )
        self.skipped, self.files = [], len(self.paths)
        self.channels, self.value_range = channels, source.value_range
        self.index: list[tuple[int, tuple[int, ...]]] = []
        self.pixels: torch.Tensor | None = None
        if source.memory:
            self._load()
        if not self.paths:
            reason = f" (the first: {self.skipped[0]})" if self.skipped else ""
            raise DataError(f"{folder} holds no readable photo matching {source.match!r}{reason}")

    def _load(self) -> None:
        """Decode all into one flat tensor: other processes then share its memory instead of copying every photo."""
        images, readable = [], []
        for path in self.paths:
            try:
                images.append(decode(path, self.channels, self.value_range))
                readable.append(path)
            except UnreadableError as reason:
                self.skipped.append(f"{path}: {reason}")
        self.paths = readable
        if images:
            starts = np.cumsum([0, *(image.size for image in images)])
            self.index = [(int(s), image.shape) for s, image in zip(starts, images, strict=False)]
            self.pixels = torch.from_numpy(np.concatenate([image.reshape(-1) for image in images]))

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, i: int) -> np.ndarray:
        if self.pixels is None:
            try:
                return decode(self.paths[i], self.channels, self.value_range)
            except UnreadableError as reason:
                raise UnreadableError(f"{self.paths[i]}: {reason}") from None
        start, shape = self.index[i]
        return self.pixels.numpy()[start : start + int(np.prod(shape))].reshape(shape)


class Arrays(Indexed):
    """Images of one array; an ``.npy`` file is mapped, not read."""

    def __init__(self, source: PhotoSource, root: str, channels: int) -> None:
        self.path = Path(under(root, source.array))
        self.key, self.channels, self.value_range = source.key, channels, source.value_range
        self.skipped, self.files = [], 0
        self._values: np.ndarray | None = None
        values = self.values
        if values.ndim not in (3, 4) or not len(values):
            raise DataError(f"{self.path} has shape {values.shape}: images are (N, H, W), (N, H, W, C) or (N, C, H, W)")
        if values.dtype != np.uint8 and self.value_range is None:
            raise DataError(
                f"{self.path} holds {values.dtype} values: say what is black and what is white, "
                "for example value_range: [0, 1]"
            )

    @property
    def values(self) -> np.ndarray:
        """The array; opened again in a process that the source was sent to."""
        if self._values is None:
            try:
                found = np.load(self.path, mmap_mode="r", allow_pickle=False)
            except FileNotFoundError:
                raise DataError(f"no array {self.path}: give the data with --set data=PATH") from None
            except (OSError, ValueError, EOFError) as error:
                raise DataError(f"{self.path} is not a NumPy array ({error})") from None
            if isinstance(found, np.lib.npyio.NpzFile):
                key = self.key or (found.files[0] if len(found.files) == 1 else "")
                if key not in found.files:
                    raise DataError(f"{self.path} holds the arrays {', '.join(found.files)}: choose with key: NAME")
                found = found[key]
            self._values = found
        return self._values

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_values": None}  # a mapped array would be copied as a whole

    def __len__(self) -> int:
        return len(self.values)

    def read(self, i: int) -> np.ndarray:
        try:
            return as_image(np.asarray(self.values[i]), self.channels, self.value_range)
        except UnreadableError as reason:
            raise UnreadableError(f"{self.path}[{i}]: {reason}") from None


class HubDataset(Indexed):
    """Images of a Hugging Face data set."""

    def __init__(self, source: PhotoSource, root: str, channels: int) -> None:
        try:
            import datasets
        except ModuleNotFoundError:
            raise DataError("Hugging Face data sets need datasets: pip install 'posteriori[datasets]'") from None
        folder = Path(under(root, source.dataset))
        try:
            found: Any = (
                datasets.load_from_disk(str(folder))
                if folder.is_dir()
                else datasets.load_dataset(source.dataset, split=source.split)
            )
        except Exception as error:  # whatever the hub, the network or a damaged folder make it raise
            first = " ".join(str(error).split())[:200]
            raise DataError(f"data set {source.dataset!r} cannot be opened ({first})") from None
        if isinstance(found, datasets.DatasetDict):
            if source.split not in found:
                raise DataError(f"{source.dataset} has the splits {', '.join(found)}: choose with split: NAME")
            found = found[source.split]
        names = [n for n, feature in found.features.items() if isinstance(feature, datasets.Image)]
        self.column = source.key or (names[0] if len(names) == 1 else "")
        if self.column not in found.column_names:
            raise DataError(f"{source.dataset} has the columns {', '.join(found.column_names)}: choose with key: NAME")
        self.rows, self.place = found, source.dataset
        self.channels, self.value_range = channels, source.value_range
        self.skipped, self.files = [], 0

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, i: int) -> np.ndarray:
        try:
            value = self.rows[i][self.column]
            if isinstance(value, Image.Image):
                return from_pil(value, self.channels, self.value_range)
            array = np.asarray(value)
            return as_image(
                array.astype(np.uint8) if self.value_range is None and array.dtype.kind in "iu" else array,
                self.channels, self.value_range,
            )  # fmt: skip
        except (OSError, SyntaxError, ValueError, UnreadableError) as reason:
            raise UnreadableError(f"{self.place}[{i}]: {reason}") from None
