r"""The test set and its measurements: everything about image ``i`` depends on ``i``, the task and the recipe's seed.

Whatever the method, the model and the batch, image ``i`` has the same mask or kernel and the same noise, and its
``k``-th sample starts from the same noise.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from posteriori.bench.images_recipe import Task
from posteriori.data import Augmentation, DataError, PhotoSource
from posteriori.data.crops import crop
from posteriori.data.sources import IMAGE_SUFFIXES, Folder, Indexed, UnreadableError, decode
from posteriori.data.streams import Shards
from posteriori.operators import Blur, Downsampling, GaussianBlur, Inpainting, LinearOperator, motion_kernel
from posteriori.pivot import measure
from posteriori.tasks import box_mask, random_mask

__all__ = ["Problem", "digest", "make_problem", "operators_for", "read_images"]


def _in_order(source: PhotoSource, root: str) -> Iterator[np.ndarray]:
    """Images of a source by name; those that cannot be read are left out."""
    if source.shards:
        yield from _in_shards(Shards(source, root, 3, seed=0, lanes=1))
        return
    folder: Indexed = Folder(source, root, 3)
    for i in range(len(folder)):
        try:
            yield folder.read(i)
        except UnreadableError:
            continue


def _in_shards(shards: Shards) -> Iterator[np.ndarray]:
    """As the shards have them, not shuffled as for training."""
    import webdataset

    for sample in webdataset.tarfile_to_samples()({"url": url} for url in shards.urls):
        names = [k for k in sample if f".{k.rpartition('.')[2]}" in IMAGE_SUFFIXES]
        name = shards.key or (names[0] if len(names) == 1 else "")
        try:
            yield decode(sample[name], shards.channels, shards.value_range)
        except (KeyError, UnreadableError):
            continue


def _square(image: np.ndarray, size: int) -> np.ndarray:
    """The centre square of an image ``(H, W, C)``, resampled as training crops are."""
    h, w = image.shape[:2]
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    whole = Augmentation(native_share=0.0, scale=(size / side, size / side), flip=0.0, turn=0.0)
    return crop(image[top : top + side, left : left + side], size, whole, np.random.default_rng(0))


def read_images(source: PhotoSource, root: str, size: int, count: int) -> Tensor:
    """The first ``count`` images, float32 ``(count, 3, size, size)`` in [-1, 1].

    Raises:
        DataError: when there are fewer.
    """
    images: list[Tensor] = []
    for image in _in_order(source, root):
        pixels = torch.from_numpy(_square(image, size).astype(np.float32)).permute(2, 0, 1)
        images.append(pixels / 127.5 - 1 if image.dtype == np.uint8 else pixels)
        if len(images) == count:
            return torch.stack(images)
    raise DataError(f"{source.place} holds {len(images)} readable images, {count} are asked for: lower grids.images")


def digest(values: Iterable[Tensor]) -> str:
    """Sixteen hexadecimal digits of tensors' contents."""
    state = hashlib.sha256()
    for v in values:
        state.update(v.detach().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()[:16]


def _seed(name: str, index: int, seed: int) -> int:
    return zlib.crc32(f"{name} {index} {seed}".encode())


def operators_for(task: Task, name: str, indices: Sequence[int], size: int, seed: int) -> LinearOperator:
    """The task's operator for a batch of images, with parameters of its own for each where they are random."""
    if task.kind == "sr":
        return Downsampling(task.scale)
    if task.kind == "gaussian":
        return GaussianBlur(task.blur_sigma)
    seeds = [_seed(name, i, seed) for i in indices]
    if task.kind == "motion":
        taps = min(61, size - 1 + size % 2)
        return Blur(torch.stack([motion_kernel(taps, task.intensity, s) for s in seeds]), "circular", per_sample=True)
    rngs = [np.random.default_rng(s) for s in seeds]
    side = max(1, round(task.box * size))
    if task.kind == "box":
        return Inpainting(torch.stack([box_mask((size, size), (side, side), r) for r in rngs]))
    return Inpainting(torch.stack([random_mask((size, size), task.missing, r) for r in rngs]))


@dataclass(frozen=True)
class Problem:
    """A batch of images, measured.

    Attributes:
        indices: in the test set.
        x_0, A, y: the images, the operator, the measurements.
    """

    indices: Sequence[int]
    x_0: Tensor
    A: LinearOperator
    y: Tensor

    def sampling_seeds(self, seed: int) -> list[int]:
        """For a method's samples, one for every image."""
        return [_seed("samples", i, seed) for i in self.indices]


def make_problem(task: Task, name: str, x_0: Tensor, first: int, sigma_y: float, seed: int) -> Problem:
    """Measure images ``first, first + 1, ...`` of the test set.

    Args:
        task, name: the task, and what the recipe calls it.
        x_0: ``(B, 3, size, size)``.
        first: index of the first one.
        sigma_y: noise.
        seed: of masks, kernels and noise.
    """
    indices = range(first, first + len(x_0))
    size = x_0.shape[-1]
    y = [
        measure(operators_for(task, name, [i], size, seed), x[None], sigma_y, seed=_seed(f"noise {name}", i, seed))
        for i, x in zip(indices, x_0, strict=True)
    ]
    return Problem(indices, x_0, operators_for(task, name, indices, size, seed), torch.cat(y))
