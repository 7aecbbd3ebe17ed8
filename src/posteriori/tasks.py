"""Random restoration tasks for amortized training: one network for all of them.

Every draw is an operator with parameters of its own for each sample of a group, and the noise level of each sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from posteriori.operators import (
    Blur,
    Downsampling,
    GaussianBlur,
    Identity,
    Inpainting,
    LinearOperator,
    Nothing,
    motion_kernel,
)

__all__ = ["TaskMixture", "box_mask", "free_form_mask", "random_mask"]

Rng = np.random.Generator


def random_mask(size: tuple[int, int], missing: float, rng: Rng) -> Tensor:
    """Mask ``(1, H, W)``, 1 = measured, with every pixel missing with probability ``missing``."""
    return torch.from_numpy((rng.random(size) >= missing).astype(np.float32))[None]


def box_mask(size: tuple[int, int], box: tuple[int, int], rng: Rng | None = None) -> Tensor:
    """Mask ``(1, H, W)``, 1 = measured, with a box missing: at a random place, or in the middle without ``rng``."""
    h, w = size
    bh, bw = min(box[0], h), min(box[1], w)
    top = (h - bh) // 2 if rng is None else int(rng.integers(h - bh + 1))
    left = (w - bw) // 2 if rng is None else int(rng.integers(w - bw + 1))
    mask = torch.ones(1, h, w)
    mask[:, top : top + bh, left : left + bw] = 0
    return mask


def free_form_mask(size: tuple[int, int], rng: Rng) -> Tensor:
    """Mask ``(1, H, W)``, 1 = measured, with some thick random strokes missing."""
    h, w = size
    rows, columns = np.mgrid[:h, :w]
    missing = np.zeros(size, dtype=bool)
    for _ in range(rng.integers(1, 5)):
        y, x, angle = rng.uniform(0, h), rng.uniform(0, w), rng.uniform(0, 2 * np.pi)
        radius = rng.uniform(0.02, 0.1) * min(size)
        for _ in range(rng.integers(4, 12)):
            missing |= (rows - y) ** 2 + (columns - x) ** 2 < radius**2
            angle += rng.normal(0, 0.6)
            y, x = y + radius * np.sin(angle), x + radius * np.cos(angle)
    return torch.from_numpy((~missing).astype(np.float32))[None]


@lru_cache(maxsize=4096)
def _motion(size: int, seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    return motion_kernel(size, float(rng.uniform(0.2, 0.9)), seed)


def _disk(size: int, radius: float) -> Tensor:
    grid = torch.arange(size) - size // 2
    distance = (grid[:, None] ** 2 + grid[None, :] ** 2).float().sqrt()
    kernel = (radius + 0.5 - distance).clamp(0, 1)
    return kernel / kernel.sum()


Values = Sequence[float] | None


def _inpaint(count: int, size: int, rng: Rng, values: Values) -> LinearOperator:
    if values:
        rates = rng.choice(values, count)
    else:
        rates = np.where(rng.random(count) < 0.4, 0.7, rng.uniform(0.2, 0.97, count))
    return Inpainting(torch.stack([random_mask((size, size), r, rng) for r in rates]))


def _box(count: int, size: int, rng: Rng, values: Values) -> LinearOperator:
    masks = []
    for _ in range(count):
        if values:
            side = int(rng.choice(values) * size)
            masks.append(box_mask((size, size), (side, side), rng))
            continue
        if rng.random() < 0.2:
            masks.append(free_form_mask((size, size), rng))
            continue
        sides = np.full(2, 0.5) if rng.random() < 0.5 else rng.uniform(0.15, 0.65, 2)
        box = (int(sides[0] * size), int(sides[1] * size))
        # half of them in the middle, where nothing but the surroundings helps
        masks.append(box_mask((size, size), box, rng if rng.random() < 0.5 else None))
    return Inpainting(torch.stack(masks))


def _sr(count: int, size: int, rng: Rng, values: Values) -> LinearOperator:
    factors = [int(f) for f in values or (4, 4, 4, 4, 2, 3, 8) if size % int(f) == 0]
    if not factors:
        raise ValueError(f"no factor of super-resolution among {values} divides crops of {size} pixels: change either")
    return Downsampling(int(rng.choice(factors)), "box" if rng.random() < 0.5 else "bicubic")


def _gaussian(count: int, size: int, rng: Rng, values: Values) -> LinearOperator:
    # A fixed set of widths, so that their factors are computed once.
    widths = np.geomspace(0.5, 6.0, 25)
    if values:
        sigmas = rng.choice(values, count)
    else:
        sigmas = np.where(rng.random(count) < 0.3, 3.0, rng.choice(widths, count))
    return GaussianBlur([float(s) for s in sigmas])


def _motions(count: int, size: int, rng: Rng, values: Values) -> LinearOperator:
    kernels = []
    largest = min(61, size - 1 + size % 2)
    for _ in range(count):
        if values:
            own = min(int(rng.choice(values)), largest)
        elif rng.random() < 0.15:
            kernels.append(_disk(largest, float(rng.uniform(1, 8))))
            continue
        else:
            own = largest if rng.random() < 0.5 or largest < 11 else int(rng.integers(4, (largest + 1) // 2)) * 2 + 1
        kernel = torch.zeros(largest, largest)
        start = (largest - own) // 2
        kernel[start : start + own, start : start + own] = _motion(own, int(rng.integers(2000)))
        kernels.append(kernel)
    return Blur(torch.stack(kernels), "circular", per_sample=True)


_DRAWS: dict[str, Callable[[int, int, Rng, Values], LinearOperator]] = {
    "none": lambda count, size, rng, values: Nothing(),
    "inpaint": _inpaint,
    "box": _box,
    "sr": _sr,
    "gaussian": _gaussian,
    "motion": _motions,
    "denoise": lambda count, size, rng, values: Identity(),
}
#: What the values of :attr:`TaskMixture.only` are, and which are allowed.
_VALUES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "inpaint": ("missing shares, between 0 and 1", lambda v: 0 < v < 1),
    "box": ("sides of a box over the crop's, between 0 and 1", lambda v: 0 < v < 1),
    "sr": ("factors, whole numbers between 1 and 64", lambda v: 1 < v < 64 and v % 1 == 0),
    "gaussian": ("widths in pixels, between 0 and 64", lambda v: 0 < v < 64),
    "motion": ("odd lengths in pixels, between 2 and 1000", lambda v: 2 < v < 1000 and v % 2 == 1),
}


@dataclass(frozen=True)
class TaskMixture:
    """Shares of the tasks in training, and the noise of their measurements.

    Attributes:
        shares: task -> share; ``"none"`` measures nothing, so that the network is also the unconditional prior.
            ``{none: 1}`` trains the prior alone.
        only: task -> the values that its parameter takes, all alike often, where a network is for these alone:
            missing shares of ``inpaint``, sides of a missing ``box`` (over the crop's, at random places), factors of
            ``sr``, widths of ``gaussian`` and odd lengths of ``motion`` in pixels. Tasks left out vary as ever.
        drop: probability that a measurement is withheld whatever its task, as in classifier-free guidance: the same as
            a share of ``"none"``, for a mixture that is not to be counted again.
        sigma_y: range of the measurement noise, log-uniform, in the units of images in [-1, 1].
        usual_sigma_y: a level given to ``usual_share`` of the samples.
        group: samples that share one operator (with parameters of their own).
    """

    shares: dict[str, float] = field(
        default_factory=lambda: {
            "none": 0.15,
            "inpaint": 0.19,
            "box": 0.16,
            "sr": 0.17,
            "gaussian": 0.12,
            "motion": 0.15,
            "denoise": 0.06,
        }
    )
    sigma_y: tuple[float, float] = (0.01, 0.2)
    usual_sigma_y: float = 0.05
    usual_share: float = 0.35
    group: int = 4
    drop: float = 0.0
    only: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = set(self.shares) - set(_DRAWS)
        if unknown:
            raise ValueError(f"unknown tasks {sorted(unknown)}: choose among {', '.join(_DRAWS)}")
        if any(s < 0 for s in self.shares.values()) or not sum(self.shares.values()) > 0:
            raise ValueError(f"shares must not be negative, nor all 0, got {self.shares}")
        if not 0 < self.sigma_y[0] <= self.sigma_y[1]:
            raise ValueError(f"sigma_y must be a range [low, high] with 0 < low <= high, got {list(self.sigma_y)}")
        for name, values in self.only.items():
            if name not in _VALUES:
                raise ValueError(f"only: {name!r} has no parameter to choose: choose among {', '.join(_VALUES)}")
            what, allowed = _VALUES[name]
            if not values or not all(map(allowed, values)):
                raise ValueError(f"only: {name} takes {what}, got {values}")
        if not 0 <= self.drop <= 1 or self.group < 1:
            raise ValueError(f"need 0 <= drop <= 1 and group >= 1, got {self.drop} and {self.group}")

    def groups(self, count: int) -> list[int]:
        """Sizes of the groups of a batch; small batches have one task per sample."""
        size = self.group if count >= 2 * self.group else 1
        return [size] * (count // size) + ([count % size] if count % size else [])

    def draw(self, count: int, size: int, rng: Rng) -> tuple[str, LinearOperator, Tensor]:
        """Task name, operator and ``sigma_y`` ``(count,)`` for ``count`` square images of side ``size``."""
        names = list(self.shares)
        p = np.array([self.shares[n] for n in names])
        name = names[int(rng.choice(len(names), p=p / p.sum()))]
        if self.drop and rng.random() < self.drop:
            name = "none"
        low, high = map(math.log, self.sigma_y)
        sigma_y = np.exp(rng.uniform(low, high, count))
        sigma_y = np.where(rng.random(count) < self.usual_share, self.usual_sigma_y, sigma_y)
        return name, _DRAWS[name](count, size, rng, self.only.get(name)), torch.from_numpy(sigma_y.astype(np.float32))
