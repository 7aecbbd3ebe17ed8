"""What the image benchmark measures: typed recipes of :mod:`posteriori.bench.images`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from posteriori.data import PhotoSource
from posteriori.methods.base import METHODS
from posteriori.precision import Precision

__all__ = ["Grid", "ImageMethod", "ImageRecipe", "Task", "standard_tasks"]


@dataclass(frozen=True)
class Task:
    """A degradation; its mask or kernel is drawn for every image.

    Attributes:
        kind: ``random`` pixels missing, a ``box`` missing at a random place, averages of blocks (``sr``), ``gaussian``
            blur with reflected borders, ``motion`` blur with a random kernel and wrapped borders.
        missing: share of missing pixels (random).
        box: side of the box over the side of the image (box).
        scale: side of a block (sr).
        blur_sigma: width in pixels (gaussian).
        intensity: of the camera shake, see :func:`posteriori.operators.motion_kernel` (motion).
        paper: the name of this task in the tables given with ``paper``.
    """

    kind: Literal["random", "box", "sr", "gaussian", "motion"]
    missing: float = 0.7
    box: float = 0.5
    scale: int = 4
    blur_sigma: float = 3.0
    intensity: float = 0.5
    paper: str = ""

    def __post_init__(self) -> None:
        if not (0 <= self.missing < 1 and 0 < self.box < 1 and self.scale >= 1 and self.blur_sigma > 0):
            raise ValueError("need 0 <= missing < 1, 0 < box < 1, scale >= 1 and blur_sigma > 0")


def standard_tasks() -> dict[str, Task]:
    """The five usual tasks and two extreme ones."""
    return {
        "random": Task("random", paper="Inpaint (random)"),
        "box": Task("box", paper="Inpaint (box)"),
        "sr4": Task("sr", paper="Super-res (4x)"),
        "gaussian": Task("gaussian", paper="Gaussian deblur"),
        "motion": Task("motion", paper="Motion deblur"),
        "random95": Task("random", missing=0.95),
        "sr16": Task("sr", scale=16),
    }


@dataclass(frozen=True)
class ImageMethod:
    """A method and what it is told.

    Attributes:
        method: its name in :data:`posteriori.methods.base.METHODS`; the recipe's own name for it when empty.
        model: key of the recipe's ``models``. Training-free methods take an unconditional network, or one that knows
            measurements, with nothing measured.
        nfe: evaluations per sample; those of its paper when empty.
        settings: over those recommended for the task.
        by_task: settings of single tasks, over ``settings``.
        images: measure it on no more images than this, for slow methods; 0: on all. The count is in every row.
    """

    method: str = ""
    model: str = "eps"
    nfe: list[int] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    by_task: dict[str, dict[str, Any]] = field(default_factory=dict)
    images: int = 0


@dataclass(frozen=True)
class Grid:
    """All combinations of methods and tasks on the first images of the test set.

    Attributes:
        images: how many.
        samples: of each image and method; the CRPS and intervals need 2 or more.
        tasks, methods: names; all of the recipe's when empty.
        nfe: evaluations per sample of single methods, in place of the methods' own.
        seeds: independent runs of every method on the same measurements.
    """

    images: int
    samples: int = 4
    tasks: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    nfe: dict[str, list[int]] = field(default_factory=dict)
    seeds: int = 1

    def __post_init__(self) -> None:
        if min(self.images, self.samples, self.seeds) < 1:
            raise ValueError("images, samples and seeds must be at least 1")


@dataclass(frozen=True)
class ImageRecipe:
    """What the image benchmark measures.

    Attributes:
        name: of the run.
        data: root folder that ``source`` is relative to.
        source: the test set: a folder or shards, see :class:`posteriori.data.PhotoSource`. Its order is that of names.
        size: images are centre squares shrunk to this side.
        grids, methods, tasks: see there.
        models: bundled names, folders or hub ids of trained models, by the names that methods call them.
        only: names of methods to measure now; all when empty.
        sigma_y: noise of the measurements.
        features: feature network of :func:`posteriori.perceptual.feature_network`, or ``none``.
        batch: images restored together, and kept in one row: what is lost when a run is killed. It changes no figure
            but the seconds.
        precision: of networks, ``"auto"`` bfloat16 where the device multiplies it itself; everything around them is in
            float32.
        keep_images: keep the samples themselves beside the rows, in 8 bits; needed for the MMD of pixels.
        seed: of masks, kernels and noise.
        paper: JSON file with a paper's own tables, to be shown beside these.
        paper_set: key of that file.
    """

    name: str
    source: PhotoSource
    size: int
    grids: list[Grid]
    methods: dict[str, ImageMethod]
    data: str = ""
    models: dict[str, str] = field(default_factory=dict)
    only: list[str] = field(default_factory=list)
    tasks: dict[str, Task] = field(default_factory=standard_tasks)
    sigma_y: float = 0.05
    features: Literal["none", "lite0", "inception"] = "lite0"
    batch: int = 16
    precision: Precision = "float32"
    keep_images: bool = False
    seed: int = 0
    paper: str = ""
    paper_set: str = ""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        if self.size < 8 or not self.sigma_y > 0:
            raise ValueError("size must be at least 8, sigma_y positive")
        if not (self.source.folder or self.source.shards):
            raise ValueError("source: the test set is a folder or shards")
        if not self.grids:
            raise ValueError("grids must not be empty")
        largest = max(g.images for g in self.grids)
        counts = [*(g.images for g in self.grids if g.images < largest), *(m.images for m in self.methods.values())]
        if any(c % self.batch for c in counts):  # grids share the rows of batches they have in common
            raise ValueError(
                f"images of methods, and of grids but the largest, must be multiples of batch ({self.batch})"
            )
        for name, spec in self.methods.items():
            if (spec.method or name) not in METHODS:
                raise ValueError(f"methods.{name}: no method {spec.method or name!r}: choose {', '.join(METHODS)}")
            _among(spec.by_task, self.tasks, f"methods.{name}.by_task")
        for grid in self.grids:
            _among(grid.tasks, self.tasks, "grids.tasks")
            _among(grid.methods, self.methods, "grids.methods")
            _among(grid.nfe, grid.methods or self.methods, "grids.nfe")
        _among(self.only, self.methods, "only")
        measured = {t for g in self.grids for t in g.tasks or self.tasks}
        for name, task in self.tasks.items():
            if name in measured and task.kind == "sr" and self.size % task.scale:
                raise ValueError(f"tasks.{name}: size {self.size} is no multiple of scale {task.scale}")

    def chosen(self, grid: Grid) -> list[str]:
        """Names of the methods of a grid that are measured."""
        return [n for n in grid.methods or self.methods if not self.only or n in self.only]


def _among(names: Any, known: Any, where: str) -> None:
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"{where}: {', '.join(unknown)} must be among {', '.join(known)}")
