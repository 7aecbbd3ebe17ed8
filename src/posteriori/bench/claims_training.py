"""Verdicts on what a network is given, on fine-tuning, and on what sampling costs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posteriori.bench import ablation, finetune
from posteriori.bench.claims_common import Claim, Evidence, Finding, Interval, Part, State, below
from posteriori.bench.cost import TASKS
from posteriori.bench.cost_report import median_interval

__all__ = ["CLAIMS", "Trained", "cost_ratios", "read_training"]


@dataclass(frozen=True)
class Trained:
    """What a form of training came to, over its seeds.

    Attributes:
        study: ``ablation`` or ``finetune``.
        task: inpaint or sr.
        form: of :data:`posteriori.bench.finetune.FORMS`; from random weights it ends with ``-scratch``.
        values: mean over seeds and half the spread between them, by the columns of
            :data:`posteriori.bench.ablation.SHOWN`.
    """

    study: str
    task: str
    form: str
    values: Mapping[str, tuple[float, float]]


def read_training(paths: Sequence[Path]) -> list[Trained]:
    """Results of :mod:`posteriori.bench.ablation` and ``finetune``: their ``results.jsonl``, or the tables they write.

    Raises:
        ValueError: when a file is neither.
    """
    found: list[Trained] = []
    for path in paths:
        try:
            text = path.read_text()
            read = _from_rows(text) if path.suffix == ".jsonl" else _from_tables(text)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path} cannot be read ({error!r}): give results.jsonl or the Markdown table") from None
        if not read:
            raise ValueError(f"{path} holds no results of posteriori.bench.ablation or finetune")
        tuned = any(not form.endswith("-scratch") for _, form in read if form != "paper-pivot") and any(
            form.endswith("-scratch") or form == "paper-pivot" for _, form in read
        )
        study = "finetune" if tuned else "ablation"
        for (task, form), values in read.items():
            name = form if tuned or form.endswith("-scratch") else f"{form}-scratch"  # the ablation has no other kind
            found.append(Trained(study, task, name, values))
    return found


_Read = dict[tuple[str, str], dict[str, tuple[float, float]]]


def _from_rows(text: str) -> _Read:
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in text.splitlines():
        row = json.loads(line)
        grouped.setdefault((row["task"], row["form"]), []).append(row)
    return {
        key: {
            k: (float(np.mean([r[k] for r in rows])), float(np.ptp([r[k] for r in rows])) / 2) for k in ablation.SHOWN
        }
        for key, rows in grouped.items()
    }


def _from_tables(text: str) -> _Read:
    forms = {title: form for form, title in {**finetune.NAMES, **ablation.NAMES}.items()}
    columns = {title: key for key, (title, _) in ablation.SHOWN.items()}
    header: list[str] = []
    found: _Read = {}
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip().strip("|").split("|")]
        if cells[:2] == ["task", "form"]:
            header = cells
        elif header and len(cells) == len(header) and cells[1] in forms:
            values = {}
            for title, cell in zip(header[2:], cells[2:], strict=True):
                numbers = [float(n) for n in re.findall(r"-?\d+\.?\d*", cell)]
                scale = 0.01 if columns[title] == "crps" else 1.0
                values[columns[title]] = (scale * numbers[0], scale * (numbers[1] if len(numbers) > 1 else 0.0))
            found[(cells[0], forms[cells[1]])] = values
    return found


def _better(a: tuple[float, float], b: tuple[float, float], larger: bool = False) -> State:
    """Whether ``a`` is better than ``b`` by more than half the spreads between seeds together."""
    gain = (a[0] - b[0]) if larger else (b[0] - a[0])
    error = a[1] + b[1]
    return "holds" if gain > error else "does not hold" if gain < -error else "undecided"


def _compare(
    evidence: Evidence, pairs: Iterable[tuple[str, str]], columns: Sequence[tuple[str, bool]] = (("crps", False),)
) -> list[Part]:
    """The first form of each pair against the second, in every study and task that has both."""
    known = {(t.study, t.task, t.form): t.values for t in evidence.training}
    places = dict.fromkeys((t.study, t.task) for t in evidence.training)
    parts = []
    for one, two in pairs:
        for study, task in places:
            a, b = known.get((study, task, one)), known.get((study, task, two))
            for column, larger in columns:
                if a and b and column in a and column in b:
                    title, digits = ablation.SHOWN[column]
                    scale = 100 if column == "crps" else 1
                    shown = " against ".join(
                        f"{scale * v[column][0]:.{digits}f} ± {scale * v[column][1]:.{digits}f}" for v in (a, b)
                    )
                    name = f"{study}, {task}: {one} against {two}"
                    parts.append(Part(name, _better(a[column], b[column], larger), f"{title} {shown}"))
    return parts


def pivot_input(evidence: Evidence) -> Finding:
    """Rule: given the pivot and y a network learns the conditional mean better than given x_t and y (Palette), with the
    same scalars, budget and random numbers: lower loss and lower CRPS, by more than half the spreads between seeds of
    both together, in every task, from random weights and fine-tuned."""
    pairs = [("paper", "palette"), ("paper-scratch", "palette-scratch")]
    return Finding(_compare(evidence, pairs, (("validation_loss", False), ("crps", False))))


def pivot_alone(evidence: Evidence) -> Finding:
    """Rule: the pivot is sufficient, so a network needs no y beside it: fine-tuned on the pivot alone its CRPS is no
    worse than Palette's by more than half the spreads between seeds, in every task."""
    parts = _compare(evidence, [("paper-pivot", "palette")])
    note = "Its mean of one evaluation against its samples: " + "; ".join(
        f"{t.task} {t.values['psnr_mmse'][0]:.2f} against {t.values['psnr_sample'][0]:.2f} dB (a mean is never worse)"
        for t in evidence.training
        if t.form == "paper-pivot"
    )
    return Finding(parts, note=note if parts else "")


def matrix(evidence: Evidence) -> Finding:
    """Rule (of posteriori, not of the paper): the matrix c(Q) in the place of the backbone's scalars, with the linear
    estimate as a channel, is better than the paper's form with y: lower loss and lower CRPS, by more than half the
    spreads between seeds together, in every task, from random weights and fine-tuned."""
    pairs = [("spectral", "paper"), ("spectral-scratch", "paper-scratch")]
    return Finding(_compare(evidence, pairs, (("validation_loss", False), ("crps", False))), "not in the paper")


def fine_tuning(evidence: Evidence) -> Finding:
    """Rule: for as many steps, fine-tuning an unconditional model is better than training from random weights: for the
    forms of EPS (the paper's with y, and c(Q)), lower CRPS of samples and higher PSNR of the mean of one evaluation, by
    more than half the spreads between seeds together, in every task."""
    pairs = [("paper", "paper-scratch"), ("spectral", "spectral-scratch")]
    return Finding(_compare(evidence, pairs, (("crps", False), ("psnr_mmse", True))))


def cost_ratios(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str, str], Interval]:
    """Seconds over those of the bare network for as many evaluations, by device, method, solver and task: the median of
    the turns with its interval.

    Args:
        rows: of :mod:`posteriori.bench.cost`; those without a ``ratio`` are left out.
    """
    found: dict[tuple[str, str, str, str], list[float]] = {}
    for row in rows:
        if isinstance(row.get("ratio"), int | float):
            place = (row.get("device", ""), row["method"], row.get("solver", ""), row.get("task", ""))
            found.setdefault(place, []).append(float(row["ratio"]))
    return {k: Interval(float(np.median(v)), *median_interval(v)[:2]) for k, v in found.items()}


def _paper_cost(evidence: Evidence) -> dict[str, float]:
    cost = evidence.paper.get("cost", {})
    return {k.lower(): float(v) for k, v in cost.items() if isinstance(v, int | float)}


def cost_unconditional(evidence: Evidence) -> Finding:
    """Rule: sampling with EPS takes at most 1.1 times the time of the same network's bare sampling loop with as many
    evaluations: with the default solver, Euler and Heun, in every task with an exact solve, on every device measured.
    Median of the turns, with the interval of a median. Operators solved by iteration are listed, not judged."""
    parts, notes = [], []
    for (device, method, solver, task), found in cost_ratios(evidence.cost).items():
        if method == "eps" and task in TASKS:
            parts.append(Part(f"{task}, {solver}, {device}", below(found, 1.1), f"{found.text()} times"))
        elif method == "eps":
            notes.append(f"{task}, {solver}, {device}: {found.text()} times")
    paper = _paper_cost(evidence)
    base = next((v for k, v in paper.items() if "unconditional" in k), None)
    stated = f"{paper['eps']:g} s against {base:g} s, {paper['eps'] / base:.3f} times" if base else ""
    return Finding(parts, stated, "; ".join(notes))


def cost_cheapest(evidence: Evidence) -> Finding:
    """Rule: at equal numbers of evaluations every training-free method that the paper times (DDNM, MPGD, DAPS, DPS,
    PiGDM) takes longer than EPS with its default solver: the intervals of their ratios to the bare network lie apart,
    in every task and on every device measured."""
    ratios = cost_ratios(evidence.cost)
    parts = []
    for (device, method, _, task), found in ratios.items():
        own = ratios.get((device, "eps", "exponential", task))
        if method in ("ddnm", "mpgd", "daps", "dps", "pigdm") and own:
            state: State = "holds" if found.low > own.high else "does not hold" if found.high < own.low else "undecided"
            text = f"{found.value / own.value:.2f} times eps ({found.text(2)} against {own.text(2)} times the network)"
            parts.append(Part(f"{task}, {method}, {device}", state, text))
    paper = _paper_cost(evidence)
    shown = [f"{k} {v / paper['eps']:.2f}" for k, v in paper.items() if k != "eps" and "unconditional" not in k]
    return Finding(parts, f"times the time of EPS: {', '.join(shown)}" if shown else "")


COST = "python -m posteriori.bench.cost --out runs/cost"
ABLATION = "python -m posteriori.bench.ablation PHOTOS --out runs/ablation"
FINETUNE = "python -m posteriori.bench.finetune PHOTOS --out runs/finetune"

CLAIMS = (
    Claim("cost-unconditional", "EPS costs what unconditional sampling costs", cost_unconditional, COST),
    Claim("cost-cheapest", "EPS is faster than every training-free method", cost_cheapest, COST),
    Claim("pivot-input", "The pivot is a better input than x_t", pivot_input, f"{ABLATION}\n{FINETUNE}"),
    Claim("pivot-alone", "The pivot alone, behind the backbone's scalars, is enough", pivot_alone, FINETUNE),
    Claim("matrix", "c(Q) in the scalars' place beats the paper's form", matrix, f"{ABLATION}\n{FINETUNE}"),
    Claim("fine-tuning", "Fine-tuning beats training from scratch", fine_tuning, FINETUNE),
)
