"""The report of :mod:`posteriori.bench.cost`: a summary by method, every contest, and CSV, from rows alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path

from posteriori.bench.runner import Row
from posteriori.bench.tables import Table
from posteriori.checkpoint import write_atomically

__all__ = ["Result", "median_interval", "paper_ratios", "results", "write_report"]

METHOD = """\
Seconds over those of the unconditional sampler of the same network at the same number of evaluations. That sampler is
EDM's loop on the bare network, without operator and solve: Euler steps, or Heun's where the method takes Heun's. Both
are timed in turn. A ratio is the median of those of the turns, in brackets its 95 % interval from the ordered values
(with fewer than six turns, the lowest and highest); in the first table turns of all tasks are taken together.
"Beside the network" is the time outside the network's forward passes over that of the unconditional sampler: the same
cost without the scatter of the network's own time."""
TASKS = """\
Direct solves: random and box inpainting, averages of 4x4 pixels, Gaussian blur with reflected borders, motion blur with
wrapped borders. Conjugate gradients: motion blur with borders of zeros."""


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Interval of a median that holds for every distribution: the nearest two of the ``n`` ordered values between which
    it lies with probability ``level``.

    It lies between the ``k``-th from below and the ``k``-th from above unless fewer than ``k`` values are on one side
    of it, and their number is ``Binomial(n, 1/2)``.

    Returns:
        Lower end, upper end, and the probability; lowest and highest value where they are too few for ``level``.
    """
    ordered, n = sorted(values), len(values)

    def covered(k: int) -> float:
        return 1 - 2 * sum(comb(n, i) for i in range(k)) / 2**n

    k = max((k for k in range(1, n // 2 + 1) if covered(k) >= level), default=1)
    return ordered[k - 1], ordered[-k], max(covered(k), 0.0)


def paper_ratios(path: str | Path | None) -> dict[str, float]:
    """A paper's own ratios by lower-case method: seconds over those of its unconditional sampler.

    Raises:
        ValueError: when the file has no key ``cost`` with an entry ``... (unconditional)``.
    """
    if path is None:
        return {}
    cost = json.loads(Path(path).read_text()).get("cost", {})
    seconds = {k.lower(): float(v) for k, v in cost.items() if isinstance(v, int | float)}
    base = next((v for k, v in seconds.items() if "(unconditional)" in k), None)
    if base is None:
        raise ValueError(f"{path}: 'cost' needs the seconds of every method and of one '... (unconditional)'")
    return {k: v / base for k, v in seconds.items() if "(unconditional)" not in k}


@dataclass(frozen=True)
class Result:
    """What the turns of a contest come to; without ratios where the method does not fit the operator."""

    rows: Sequence[Row]

    @property
    def first(self) -> Row:
        return self.rows[0]

    @property
    def name(self) -> tuple[str, str]:
        return self.first["method"], self.first["solver"]

    @property
    def ratios(self) -> list[float]:
        return [r["ratio"] for r in self.rows if "ratio" in r]

    @property
    def direct(self) -> bool:
        """Whether solves are exact: in closed form, not by conjugate gradients."""
        return str(self.first.get("operator", "exact")).startswith("exact")

    @property
    def beside(self) -> list[float]:
        """What the method spends beside the network over the seconds of the unconditional sampler; empty where that is
        not known, or the network is gone through backward too."""
        if self.first.get("network_seconds") is None or self.first["backward"]:
            return []
        return [(r["seconds"] - r["network_seconds"]) / r["unconditional_seconds"] for r in self.rows]

    def milliseconds(self, field: str) -> float:
        """Median for one image."""
        return 1e3 * statistics.median(r[field] for r in self.rows) / int(self.first["batch"])


def results(rows: Sequence[Row]) -> list[Result]:
    """Rows by contest, in their order."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for r in rows:
        groups.setdefault((r["method"], r["solver"], r["task"]), []).append(r)
    return [Result(g) for g in groups.values()]


def _percent(values: Sequence[float]) -> str:
    return f"{100 * statistics.median(values):.2f} %" if values else "-"


def _ratio(values: Sequence[float]) -> str:
    low, high, _ = median_interval(values)
    return f"{statistics.median(values):.3f} ({low:.3f} to {high:.3f})"


def _summary(found: Sequence[Result], paper: dict[str, float]) -> Table:
    """All turns of a method together, tasks with a closed form and those with conjugate gradients apart."""
    lines: list[list[object]] = []
    for name in dict.fromkeys(r.name for r in found if r.first["task"]):
        own = [r for r in found if r.name == name]
        fitting = [r for r in own if r.ratios]
        parts = []
        for direct in (True, False):
            here = [r for r in fitting if r.direct is direct]
            medians = [statistics.median(r.ratios) for r in here]
            parts.append(_ratio([x for r in here for x in r.ratios]) if here else "-")
            if direct:
                parts.append(f"{min(medians):.3f} to {max(medians):.3f}" if here else "-")
        parts.insert(2, _percent([x for r in fitting if r.direct for x in r.beside]))
        counts = [fitting[0].first[k] for k in ("evaluations", "backward")] if fitting else ["-", "-"]
        known = f"{paper[name[0]]:.3f}" if name[0] in paper else "-"
        lines.append([name[0], name[1] or "-", *counts, *parts, known])
    header = ["method", "solver", "evaluations", "backward passes", "direct solve", "tasks, lowest to highest",
              "beside the network", "conjugate gradients", "paper"]  # fmt: skip
    return Table("Seconds over those of unconditional sampling", header, lines, names=2)


def _contests(found: Sequence[Result], paper: dict[str, float]) -> Table:
    lines: list[list[object]] = []
    for r in found:
        if not r.first["task"]:
            continue
        known = f"{paper[r.name[0]]:.3f}" if r.name[0] in paper else "-"
        if not r.ratios:
            lines.append([r.name[0], r.name[1] or "-", r.first["task"], "refused", *["-"] * 7, known])
            continue
        lines.append([
            r.name[0], r.name[1] or "-", r.first["task"], "direct" if r.direct else "CG", r.first["evaluations"],
            r.first["backward"], f"{r.milliseconds('seconds'):.1f}", f"{r.milliseconds('unconditional_seconds'):.1f}",
            len(r.ratios), _ratio(r.ratios), _percent(r.beside), known,
        ])  # fmt: skip
    header = ["method", "solver", "task", "solve", "evaluations", "backward passes", "ms", "unconditional, ms", "turns",
              "ratio", "beside the network", "paper"]  # fmt: skip
    return Table("Every method and task", header, lines, names=4)


def _table(found: Sequence[Result], paper: dict[str, float]) -> Table:
    """Numbers for programs."""
    lines: list[list[object]] = []
    for r in (r for r in found if r.ratios):
        low, high, covered = median_interval(r.ratios)
        seconds = [f"{r.milliseconds(k) / 1e3:.6g}" for k in ("seconds", "unconditional_seconds")]
        lines.append([
            *(r.first[k] for k in ("model", "device", "threads", "nfe", "batch", "size", "method", "solver", "task")),
            r.first.get("operator", ""), r.first["evaluations"], r.first["backward"], len(r.ratios),
            *(f"{v:.5g}" for v in (statistics.median(r.ratios), low, high, covered)), *seconds,
            f"{statistics.median(r.beside):.5g}" if r.beside else "",
            f"{paper[r.name[0]]:.5g}" if r.name[0] in paper else "",
        ])  # fmt: skip
    header = ["model", "device", "threads", "nfe", "batch", "size", "method", "solver", "task", "operator",
              "evaluations", "backward", "turns", "ratio", "low", "high", "coverage", "seconds_per_image",
              "unconditional_seconds_per_image", "beside_network", "paper"]  # fmt: skip
    return Table("Cost", header, lines, names=10)


def _own_share(found: Sequence[Result]) -> str:
    shares = [
        1 - x["unconditional_network_seconds"] / x["unconditional_seconds"]
        for r in found
        for x in r.rows
        if r.first["task"] and x.get("unconditional_network_seconds") is not None
    ]
    return f",\n  which spends {_percent(shares)} of its time beside them" if shares else ""


def _network(found: Sequence[Result]) -> str:
    """What the samplers spend beside the network."""
    text = []
    for r in (r for r in found if r.ratios):
        match r.name:
            case "network", _:
                each = r.milliseconds("seconds") / r.first["evaluations"]
                text.append(
                    f"- A bare evaluation of the network takes {each:.2f} ms an image; evaluations alone take\n"
                    f"  {_ratio(r.ratios)} times the unconditional sampler{_own_share(found)}."
                )
            case "inputs", _:
                text.append(
                    "- The network has inputs for a measurement, which that sampler fills with constants. An\n"
                    f"  evaluation takes {_ratio(r.ratios)} times one without them; that is not in the ratios below."
                )
            case "unconditional", solver:
                beside = f" ({_percent(r.beside)} beside the network)" if r.beside else ""
                text.append(f"- `posteriori.sample` with nothing measured, {solver}: {_ratio(r.ratios)}{beside}.")
    return "\n".join(text)


def write_report(rows: Sequence[Row], document: Path, paper: str | Path | None = None) -> None:
    """Write the Markdown document, and beside it the numbers under the same name with ``.csv``.

    Args:
        rows: of one setting.
        document: the Markdown file.
        paper: see :func:`paper_ratios`.
    """
    found, theirs = results(rows), paper_ratios(paper)
    if not found:
        raise ValueError("there are no rows to report")
    first = found[0].first
    where = f"{first['threads']} thread{'s' * (first['threads'] > 1)} of a CPU" if first["device"] == "cpu" else "a GPU"
    networks = {
        "photo": "the network of the 32-pixel recipes",
        "unet": "a small diffusers U-Net without the smooth estimate",
    }
    model = networks.get(first["model"], f"model {Path(first['model']).name}")
    setting = (
        f"Measured on {where}, torch {first['versions']['torch']}: {model},\nimages {first['size']}x{first['size']}, "
        f"batches of {first['batch']}, {first['nfe']} evaluations (as many below that as a method's step divides). "
        "Ratios\nof few turns are as good as the machine was quiet."
    )
    refused = {r.name[0] for r in found if not r.ratios}
    parts = [
        "# What a method costs",
        "<!-- written by python -m posteriori.bench.cost -->",
        METHOD,
        setting,
        _network(found),
        _summary(found, theirs).markdown(),
        TASKS
        + (f"\nNot for an operator without singular values at hand: {', '.join(sorted(refused))}." if refused else "")
        + ("\nPaper: its seconds over those of its unconditional sampler." if theirs else ""),
        "## Every task",
        _contests(found, theirs).markdown(),
    ]
    write_atomically(document, ("\n\n".join(p for p in parts if p) + "\n").encode())
    write_atomically(document.with_suffix(".csv"), _table(found, theirs).csv().encode())
