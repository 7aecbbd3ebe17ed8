"""What the exact benchmark measures: typed recipes of :mod:`posteriori.bench.exact`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from posteriori.bench.exact_problems import OPERATORS, OperatorName, PriorSpec
from posteriori.bench.patches import PatchFit
from posteriori.methods.base import METHODS

__all__ = ["FLOOR", "Calibration", "ExactRecipe", "Grid", "MethodSpec", "Picture", "Told", "Tuning"]

FLOOR = "exact"  # the method that draws from the posterior itself


@dataclass(frozen=True)
class MethodSpec:
    """A method and what it is told.

    Attributes:
        method: its name in :data:`posteriori.methods.base.METHODS`; the recipe's own name for it when empty.
        settings: passed on.
        tune: one setting and its candidates; the best on another measurement of the same problem is taken, for every
            problem and number of evaluations by itself.
        nfe: evaluations it is measured at, where a grid has them; all when empty.
    """

    method: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    tune: dict[str, list[float]] = field(default_factory=dict)
    nfe: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.tune) > 1 or not all(self.tune.values()):
            raise ValueError("tune holds one setting with at least one candidate")


@dataclass(frozen=True)
class Told:
    """What methods are told, as multiples of the truth: the noise, and the width of the blur."""

    sigma_y: float = 1.0
    blur: float = 1.0


@dataclass(frozen=True)
class Grid:
    """All combinations of problems, methods and evaluations.

    Attributes:
        priors, operators, sigma_y, nfe: of the problems; images in [-1, 1].
        samples: of each method, and in each set of the floor.
        methods: names; all of the recipe's when empty.
        told: wrong models; the right one when empty.
        seeds: independent problems (prior, operator, signal, noise) for each combination.
    """

    priors: list[PriorSpec]
    sigma_y: list[float]
    nfe: list[int]
    operators: list[OperatorName] = field(default_factory=lambda: list(OPERATORS))
    samples: int = 1000
    methods: list[str] = field(default_factory=list)
    told: list[Told] = field(default_factory=lambda: [Told()])
    seeds: int = 1

    def __post_init__(self) -> None:
        for name in ("priors", "sigma_y", "nfe", "operators", "told"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        if self.samples < 10 or self.seeds < 1 or min(self.nfe) < 1 or not min(self.sigma_y) > 0:
            raise ValueError("samples must be at least 10, seeds and nfe at least 1, sigma_y positive")


@dataclass(frozen=True)
class Calibration:
    """Ranks of the truth over many draws of signal and measurement.

    Attributes:
        prior, operator, sigma_y: the problem.
        nfe: evaluations.
        draws: pairs of signal and measurement.
        samples: for each.
        methods: names; all of the recipe's when empty.
    """

    prior: PriorSpec
    operator: OperatorName
    sigma_y: float
    nfe: int = 100
    draws: int = 200
    samples: int = 99
    methods: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Tuning:
    """Settings are tuned at ``samples`` samples of a measurement that no figure is of."""

    samples: int = 200


@dataclass(frozen=True)
class Picture:
    """The problem in two dimensions whose samples are drawn; its rows keep ``points`` of them."""

    operator: OperatorName = "projection"
    sigma_y: float = 0.05
    nfe: int = 100
    points: int = 400


@dataclass(frozen=True)
class ExactRecipe:
    """What the exact benchmark measures.

    Attributes:
        name: of the run.
        methods: by the names that tables show.
        grids, calibration: see there.
        photos: folder that patch mixtures are fitted to; the few bundled photos when empty.
        fit, tuning, picture: see there.
        seed: of everything.
    """

    name: str
    methods: dict[str, MethodSpec]
    grids: list[Grid]
    calibration: list[Calibration] = field(default_factory=list)
    photos: str = ""
    fit: PatchFit = field(default_factory=PatchFit)
    tuning: Tuning = field(default_factory=Tuning)
    picture: Picture = field(default_factory=Picture)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, spec in self.methods.items():
            if name == FLOOR or (spec.method or name) not in METHODS:
                known = ", ".join(METHODS)
                raise ValueError(f"methods.{name}: {spec.method or name!r} is no method (or taken): choose {known}")
        asked = [*(g.methods for g in self.grids), *(c.methods for c in self.calibration)]
        for methods in asked:
            unknown = set(methods) - set(self.methods)
            if unknown:
                raise ValueError(f"{', '.join(sorted(unknown))} must be one of methods: {', '.join(self.methods)}")
