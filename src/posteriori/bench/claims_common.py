r"""What verdicts are made of: figures of single images, compared by a paired bootstrap, and rules that combine them.

Two methods are measured on the same images with the same measurements, so a difference between them is a mean over
images of paired differences. Its 95 % interval comes from resampling images, widened by what a bootstrap of few images
lacks (Student's factor and the variance's lost degree of freedom: 1.29 for 8 images, 1.03 for 64). A comparison *holds*
when the interval lies within the bound, *does not hold* when it lies outside, and is *undecided* when the bound is
inside it. A claim holds when all of its comparisons do, does not when one does not, and is not measured when there is
none.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import norm as normal
from scipy.stats import t as student
from torch import Tensor

from posteriori.bench import runner
from posteriori.bench.images_pool import FEWEST
from posteriori.bench.runner import Row

__all__ = [
    "FEW", "Claim", "Evidence", "Finding", "Interval", "Part", "State", "Verdict", "above", "below", "combine",
    "difference", "frechet", "paired", "ratio", "read_rows", "within",
]  # fmt: skip

State = Literal["holds", "does not hold", "undecided", "not measured"]
FEW = 8  # images below which nothing is judged
RESAMPLES = 2000
Images = Mapping[int, float]


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval from ``images`` images."""

    value: float
    low: float
    high: float
    images: int = 0

    def text(self, digits: int = 3) -> str:
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def below(interval: Interval | None, bound: float) -> State:
    """Whether the estimated quantity is at most ``bound``."""
    if interval is None:
        return "not measured"
    return "holds" if interval.high <= bound else "does not hold" if interval.low > bound else "undecided"


def above(interval: Interval | None, bound: float) -> State:
    """Whether the estimated quantity is at least ``bound``."""
    if interval is None:
        return "not measured"
    return "holds" if interval.low >= bound else "does not hold" if interval.high < bound else "undecided"


def within(interval: Interval | None, low: float, high: float) -> State:
    """Whether the estimated quantity is between two bounds."""
    return combine([above(interval, low), below(interval, high)])


def combine(states: Iterable[State]) -> State:
    """The state of a claim from those of its comparisons (module's head)."""
    found = [s for s in states if s != "not measured"]
    bad: tuple[State, ...] = ("does not hold", "undecided")
    for state in bad:
        if state in found:
            return state
    return "holds" if found else "not measured"


def paired(a: Images, b: Images, statistic: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Interval | None:
    """A statistic of the means of two columns over the images that both have; ``None`` for fewer than ``FEW``.

    Args:
        a, b: by image. A NaN is an answer that diverged: an infinite error.
        statistic: of means ``(k,)`` and ``(k,)``.
    """
    common = sorted(set(a) & set(b))
    if len(common) < FEW:
        return None
    x, y = (np.array([c[i] for i in common]) for c in (a, b))
    x, y = np.where(np.isnan(x), np.inf, x), np.where(np.isnan(y), np.inf, y)
    drawn = np.random.default_rng(0).integers(0, len(common), (RESAMPLES, len(common)))
    with np.errstate(invalid="ignore"):
        value = float(statistic(x.mean(keepdims=True), y.mean(keepdims=True))[0])
        found = statistic(x[drawn].mean(1), y[drawn].mean(1))
        low, high = (float(v) for v in np.quantile(found, [0.025, 0.975], method="inverted_cdf"))
    if all(math.isfinite(v) for v in (value, low, high)):
        n = len(common)
        wider = float(student.ppf(0.975, n - 1) / normal.ppf(0.975)) * math.sqrt(n / (n - 1))
        low, high = value + wider * (low - value), value + wider * (high - value)
    return Interval(value, low, high, len(common))


def ratio(a: Images, b: Images) -> Interval | None:
    """Mean of ``a`` over mean of ``b``."""
    return paired(a, b, lambda x, y: x / y)


def difference(a: Images, b: Images) -> Interval | None:
    """Mean of ``a`` minus mean of ``b``."""
    return paired(a, b, lambda x, y: x - y)


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two sets of features ``(N, d)``, ``(M, d)``.

    As :func:`posteriori.perceptual.frechet_distance`. With centred features ``Z_1``, ``Z_2`` over the roots of their
    counts less one, ``tr (C_1 C_2)^(1/2)`` is the sum of the singular values of ``Z_1 Z_2^T``, ``(N, M)``: for fewer
    images than features much faster than the eigenvalues of a ``(d, d)`` matrix.
    """
    a, b = a.double(), b.double()
    z = [(v - v.mean(0)) / math.sqrt(len(v) - 1) for v in (a, b)]
    shift = float((a.mean(0) - b.mean(0)).square().sum())
    spread = sum(float(v.square().sum()) for v in z)
    return shift + spread - 2 * float(torch.linalg.svdvals(z[0] @ z[1].mT).sum())


@dataclass(frozen=True)
class Part:
    """One comparison: ``name`` says of what, ``text`` has the numbers."""

    name: str
    state: State
    text: str


@dataclass(frozen=True)
class Finding:
    """What a claim's rule found.

    Attributes:
        parts: comparisons, all of which have to hold.
        paper: what the paper's own figures say of the claim, with numbers.
        note: what a reader should know beside.
    """

    parts: list[Part]
    paper: str = ""
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """A claim, judged. ``reason`` is one line: the comparison that decides, with its numbers."""

    id: str
    claim: str
    rule: str
    paper: str
    ours: str
    state: State
    reason: str
    parts: list[Part]
    note: str
    commands: str


@dataclass(frozen=True)
class Claim:
    """A claim of the paper as an experiment.

    Attributes:
        id: its name.
        words: the claim.
        judge: its docstring is the rule, written before the results were there.
        commands: what measures it; ``{run}`` stands for the recipes' name.
    """

    id: str
    words: str
    judge: Callable[[Evidence], Finding]
    commands: str

    def verdict(self, evidence: Evidence) -> Verdict:
        """Judge the claim by what was measured."""
        finding = self.judge(evidence)
        parts = [p for p in finding.parts if p.state != "not measured"]
        state = combine(p.state for p in parts)
        held = sum(p.state == "holds" for p in parts)
        ours = f"holds in {held} of {len(parts)} comparisons" if parts else "not measured"
        deciding = next((p for p in parts if p.state == state), None)
        reason = f"{deciding.name}: {deciding.text}" if deciding else "no rows for it"
        rule = " ".join((inspect.getdoc(self.judge) or "").split())
        paper = finding.paper or "the paper's tables have no figures of it"
        return Verdict(self.id, self.words, rule, paper, ours, state, reason, parts, finding.note, self.commands)


def read_rows(paths: Sequence[Path]) -> tuple[list[Row], dict[str, Path]]:
    """Rows of several runs on one test set, and where the features of each are, by its ``id``.

    A measurement that is there twice (repeated with another version, say) counts as it was measured last.

    Raises:
        ValueError: when runs differ in their images or noise, or a method was measured with two models: they cannot be
            compared image by image.
    """
    found: dict[tuple[Any, ...], Row] = {}
    features: dict[str, Path] = {}
    for path in paths:
        for row in runner.read_rows(path):  # a run may be writing
            if row.get("kind") != "images" or "error" in row:
                continue
            names = ("method", "task", "nfe", "seed", "first", "images", "samples")
            found[tuple(row[n] for n in names)] = row
            features[row["id"]] = path.parent / "features" / f"{row['id']}.npz"
    rows = list(found.values())
    for what, key in (("images", ("first", "images")), ("model", ("method",)), ("sigma_y", ())):
        field_of = "data" if what == "images" else what
        seen: dict[tuple[Any, ...], Any] = {}
        for row in rows:
            place = tuple(row[k] for k in key)
            if seen.setdefault(place, row.get(field_of)) != row.get(field_of):
                raise ValueError(f"rows differ in their {what} ({row['method']}, {row['task']}): give runs of one set")
    return rows, features


@dataclass
class Evidence:
    """Everything verdicts are made from.

    Attributes:
        rows: of the image benchmark, without errors.
        features: where a row's features are, by its ``id``.
        known: distances between sets, where features are not at hand (``sets.json`` of a report).
        cost: rows of the cost benchmark.
        training: see :func:`posteriori.bench.claims_training.read_training`.
        paper: the content of a file of a paper's tables; ``{}`` without one.
        paper_set: the set in it that is nearest to the test set.
    """

    rows: Sequence[Row] = ()
    features: Mapping[str, Path] = field(default_factory=dict)
    known: MutableMapping[str, dict[str, float]] = field(default_factory=dict)
    cost: Sequence[Row] = ()
    training: Sequence[Any] = ()
    paper: Mapping[str, Any] = field(default_factory=dict)
    paper_set: str = ""

    @cached_property
    def groups(self) -> dict[tuple[str, str, int], list[Row]]:
        """Rows by task, method and number of evaluations."""
        found: dict[tuple[str, str, int], list[Row]] = {}
        for row in self.rows:
            found.setdefault((row["task"], row["method"], row["nfe"]), []).append(row)
        return found

    @property
    def tasks(self) -> dict[str, str]:
        """Tasks in the order of the rows, with their names in the paper's tables ("" where it has none)."""
        return {r["task"]: r.get("degradation", {}).get("paper", "") for r in self.rows}

    def lines(self, task: str) -> list[tuple[str, int]]:
        """Methods and numbers of evaluations measured for a task."""
        return [(method, nfe) for t, method, nfe in self.groups if t == task]

    def nfes(self, task: str, method: str) -> list[int]:
        return sorted(n for m, n in self.lines(task) if m == method)

    def nfe(self, task: str, method: str, wanted: int = 20) -> int | None:
        """``wanted`` where it was measured; otherwise the nearest above 1."""
        found = [n for n in self.nfes(task, method) if n > 1]
        return min(found, key=lambda n: (abs(math.log(n / wanted)), n), default=None)

    def values(
        self, task: str, method: str, nfe: int | None, column: str, samples: int | None = None
    ) -> dict[int, float]:
        """A column by image, averaged over seeds; ``{}`` if not measured.

        From the rows with the most samples of the image, or from those with so many ``samples``.
        """
        found: dict[int, tuple[int, list[float]]] = {}
        for row in self.groups.get((task, method, -1 if nfe is None else nfe), []):
            if samples not in (None, row["samples"]):
                continue
            for i, value in enumerate(row["per_image"].get(column, []), row["first"]):
                most, values = found.get(i, (0, []))
                if row["samples"] > most:
                    most, values = row["samples"], []
                if row["samples"] == most:
                    values.append(math.nan if value is None else float(value))
                found[i] = (most, values)
        return {i: float(np.mean(values)) for i, (_, values) in found.items()}

    def of_mean(self, task: str, column: str = "mse", method: str = "eps") -> dict[int, float]:
        """A column of the posterior mean by one evaluation."""
        found: dict[int, float] = {}
        for nfe in self.nfes(task, method):
            for i, v in self.values(task, method, nfe, f"{column}_mmse").items():
                found.setdefault(i, v)
        return found or self.values(task, method, 1, column)

    def pooled(self, task: str, method: str, nfe: int) -> list[dict[int, tuple[np.ndarray, np.ndarray]]]:
        """Features of one sample and of the truth, by image, of one list per kind of grid (largest first)."""
        by_samples: dict[int, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
        for row in self.groups.get((task, method, nfe), []):
            path = self.features.get(row["id"])
            if row["seed"] != 0 or path is None or not path.exists():
                continue
            samples, truth = _features(path)
            if samples is not None and truth is not None:
                pairs = {row["first"] + i: (samples[i], truth[i]) for i in range(row["images"])}
                by_samples.setdefault(row["samples"], {}).update(pairs)
        return sorted(by_samples.values(), key=len, reverse=True)

    def feature_pairs(self, task: str, method: str, nfe: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Features of one sample and of the truth, by image."""
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for grid in self.pooled(task, method, nfe):
            found |= {i: pair for i, pair in grid.items() if i not in found}
        return found

    def enough(self, images: Iterable[int]) -> bool:
        """Whether a distance between sets of these images says anything."""
        return len(list(images)) >= FEWEST

    def paper_lines(self, name: str) -> list[tuple[str, int, dict[str, float]]]:
        """A task's table in the paper: method (our name for it), evaluations, figures by the paper's columns."""
        rows = self.paper.get(self.paper_set, {}).get(name, []) if name else []
        return [
            (r["method"].lower(), int(r["nfe"]), {k: v for k, v in r.items() if k not in ("method", "nfe")})
            for r in rows
        ]

    @property
    def paper_tables(self) -> dict[str, list[tuple[str, int, dict[str, float]]]]:
        """All tables of the paper's set."""
        return {name: self.paper_lines(name) for name in self.paper.get(self.paper_set, {})}


@lru_cache(maxsize=4096)
def _features(path: Path) -> tuple[np.ndarray | None, np.ndarray | None]:
    """First samples and truths of a file, ``(images, F)``; ``None`` where they were not kept or diverged."""
    with np.load(path, allow_pickle=False) as arrays:
        if "samples" not in arrays:
            return None, None
        samples, truth = arrays["samples"][0], arrays["truth"][0]
    return (samples, truth) if bool(np.isfinite(samples).all()) else (None, None)
