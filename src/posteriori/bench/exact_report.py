"""The report of the exact benchmark: tables and text from its rows, nothing measured."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from posteriori.bench.calibration import FUNCTIONS, deviation, deviation_limit
from posteriori.bench.distances import DISTANCES
from posteriori.bench.exact_figures import curves, pictures, problem_of, ranks
from posteriori.bench.exact_problems import PriorSpec, ProblemSpec, make_operator, make_prior
from posteriori.bench.exact_recipe import FLOOR
from posteriori.bench.runner import Row
from posteriori.bench.tables import Table
from posteriori.checkpoint import write_atomically

if TYPE_CHECKING:
    from posteriori.bench.exact import ExactBenchmark

__all__ = ["evaluations_needed", "ratio", "summary", "write_report"]

NEAR = (0.0, 2.0, 4.0)  # multiples of the floor; 0 stands for the limit that 95 % of exact sets stay below


def reaches(row: Row, multiple: float) -> bool:
    """Whether sliced Wasserstein-2 is within a multiple of its floor, or within its limit (0)."""
    value = row["distances"]["sw2"]
    bound = multiple * row["floor"]["sw2"] if multiple else row["limit"]["sw2"]
    return value is not None and value <= bound


def ratio(row: Row, name: str = "sw2") -> float | None:
    """A distance as a multiple of its floor; ``None`` where samples diverged or there is nothing to get wrong."""
    value, floor = row["distances"][name], row["floor"][name]
    return None if value is None or floor < 1e-6 else abs(value) / floor


def _geometric(values: Sequence[float | None]) -> float | str:
    kept = [max(v, 1e-3) for v in values if v is not None]
    return statistics.geometric_mean(kept) if kept else ""


def _last(rows: Sequence[Row], name: str) -> list[Row]:
    """A method's row with the most evaluations, of every problem."""
    found: dict[object, Row] = {}
    for r in rows:
        best = found.get(problem_of(r))
        if r["method"] == name and (best is None or r["nfe"] > best["nfe"]):
            found[problem_of(r)] = r
    return list(found.values())


def summary(rows: Sequence[Row], names: Sequence[str]) -> Table:
    """Sliced Wasserstein over floor, geometric mean over the problems of a prior, at the most evaluations."""
    groups = list(dict.fromkeys((r["prior"], r["d"]) for r in rows))
    lines = []
    for name in names:
        last = _last(rows, name)
        cells = [_geometric([ratio(r) for r in last if (r["prior"], r["d"]) == g]) for g in groups]
        worst = max((v for r in last if (v := ratio(r)) is not None), default="")
        lines.append([name, max((r["nfe"] for r in last), default=""), *cells, worst])
    header = ["method", "NFE", *[f"{p} {d}" for p, d in groups], "worst"]
    title = "Sliced Wasserstein-2 distance to the posterior over its Monte Carlo floor (1 is exact)"
    return Table(f"{title}: geometric mean over operators and noise levels, at the most evaluations", header, lines)


def all_distances(rows: Sequence[Row], names: Sequence[str]) -> Table:
    """Every distance over its floor, median over problems, at the most evaluations."""
    lines = []
    for name in names:
        cells: list[object] = []
        for distance in DISTANCES:
            found = [v for r in _last(rows, name) if (v := ratio(r, distance)) is not None]
            cells.append(statistics.median(found) if found else "")
        lines.append([name, *cells])
    return Table(
        "Every distance over its floor, median over problems, at the most evaluations", ["method", *DISTANCES], lines
    )


def signed(rows: Sequence[Row], names: Sequence[str]) -> Table:
    """The distances that have a sign, median over problems."""
    kinds = DISTANCES[4:]
    lines = []
    for name in names:
        found = [[r["distances"][k] for r in _last(rows, name) if r["distances"][k] is not None] for k in kinds]
        lines.append([name, *[f"{statistics.median(f):+.3f}" if f else "" for f in found]])
    title = "Distances with a sign, median over problems: too far (+), too concentrated (log score -, coverage -)"
    return Table(title, ["method", *kinds], lines)


def evaluations_needed(rows: Sequence[Row], name: str, multiple: float) -> tuple[float | None, int, int]:
    """Median over problems of the fewest evaluations from which on a method :func:`reaches` a multiple of the floor.

    Returns:
        The median, for which a problem the method fails in counts as infinity (``None``: it fails in most); in how
        many problems it succeeds; and of how many.
    """
    problems = list(dict.fromkeys(problem_of(r) for r in rows if r["method"] == name))
    needed: list[float] = []
    for p in problems:
        track = [r for r in rows if r["method"] == name and problem_of(r) == p]
        first = float("inf")
        for r in sorted(track, key=lambda r: r["nfe"], reverse=True):
            if not reaches(r, multiple):
                break
            first = r["nfe"]
        needed.append(first)
    reached = sum(n < float("inf") for n in needed)
    median = statistics.median_low(needed) if needed else float("inf")
    return (median if median < float("inf") else None), reached, len(needed)


def needed_table(rows: Sequence[Row], names: Sequence[str]) -> Table:
    """Evaluations needed for a distance."""
    lines = []
    for name in names:
        cells: list[object] = []
        for multiple in NEAR:
            median, reached, count = evaluations_needed(rows, name, multiple)
            cells += [f"{median:g}" if median is not None else "never", f"{reached}/{count}"]
        lines.append([name, *cells])
    header = ["method", *[c for m in NEAR for c in (f"NFE to {m:g} x floor" if m else "NFE to exact", "problems")]]
    title = (
        "Fewest evaluations from which on sliced Wasserstein-2 stays within what 95 % of exact sets reach, or within a "
        "multiple of the floor, median over problems (never: not in half of them)"
    )
    return Table(title, header, lines)


def by_problem(rows: Sequence[Row], names: Sequence[str]) -> Table:
    """Sliced Wasserstein over floor of every problem."""
    lines = []
    for p in dict.fromkeys(problem_of(r) for r in rows):
        mine = [r for r in rows if problem_of(r) == p]
        cells = [_geometric([ratio(r) for r in _last(mine, n)]) for n in names]
        lines.append([f"{p[0]} {p[1]}", p[3], f"{p[4]:g}", *cells, f"{mine[0]['floor']['sw2']:.4f}"])
    title = "Sliced Wasserstein-2 over floor for every problem, at the most evaluations"
    return Table(title, ["prior", "operator", "sigma_y", *names, "floor"], lines, names=3)


def costs(rows: Sequence[Row], names: Sequence[str]) -> Table:
    """What a method spends at its most evaluations."""
    lines = []
    for name in names:
        last = _last(rows, name)
        per = [statistics.median(r[k] / r["nfe"] for r in last) for k in ("evaluations", "backward", "seconds")]
        lines.append([name, f"{per[0]:.2f}", f"{per[1]:.2f}", f"{1000 * per[2]:.1f}"])
    header = ["method", "evaluations / NFE", "backward / NFE", "ms / NFE, all samples"]
    return Table("Cost, median over problems (the exact denoiser's time, not a network's)", header, lines)


def told_table(rows: Sequence[Row], right: Sequence[Row], names: Sequence[str]) -> Table:
    """Distances to the true posterior when the model is misstated."""
    models = list(dict.fromkeys((r["told"]["sigma_y"], r["told"]["blur"]) for r in rows))

    def cell(name: str, model: tuple[float, float] | None) -> object:
        chosen = [r for r in (rows if model else right) if r["method"] == name]
        if model:
            chosen = [r for r in chosen if (r["told"]["sigma_y"], r["told"]["blur"]) == model]
        else:
            problems = {problem_of(r) for r in rows}
            chosen = [r for r in chosen if problem_of(r) in problems]
        return _geometric([ratio(r) for r in _last(chosen, name)])

    lines = [[name if name != FLOOR else "exact samples of the model told", *[cell(name, m) for m in (None, *models)]]
             for name in (FLOOR, *names)]  # fmt: skip
    header = ["method", "right", *[f"sigma_y x {s:g}" if b == 1 else f"blur x {b:g}" for s, b in models]]
    return Table(
        "Sliced Wasserstein-2 to the true posterior over floor when the method is told a wrong model", header, lines
    )


def calibration_table(rows: Sequence[Row], names: Sequence[str]) -> Table:
    """Deviation of the ranks from uniform, over what 95 % of uniform ones stay below."""
    lines = []
    for name in (FLOOR, *names):
        for r in rows:
            if r["method"] == name:
                limit = deviation_limit(r["draws"], r["samples"])
                cells = [deviation(r["ranks"][f], r["samples"]) / limit for f in FUNCTIONS]
                lines.append(
                    [name if name != FLOOR else "exact samples", f"{r['prior']} {r['d']}", r["operator"], *cells]
                )
    title = "Largest deviation of the ranks' distribution from uniform, over its 95 % limit (above 1: not calibrated)"
    return Table(title, ["method", "prior", "operator", *FUNCTIONS], lines, names=3)


def tuned_table(rows: Sequence[Row], names: Sequence[str]) -> Table:
    """Settings that tuning chose, with how often."""
    lines = []
    for name in names:
        chosen = [r for r in rows if r["method"] == name and "tuned" in r]
        setting = next(iter(chosen[0]["specification"]["tune"])) if chosen else ""
        for nfe in sorted({r["nfe"] for r in chosen}):
            best = [r["settings"][setting] for r in chosen if r["nfe"] == nfe]
            counts = ", ".join(f"{v:g}: {best.count(v)}" for v in sorted(set(best)))
            lines.append([name, setting, nfe, counts])
    return Table(
        "Settings tuned on another measurement: how many problems took which",
        ["method", "setting", "NFE", "chosen"],
        lines,
        names=2,
    )


def edges(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Methods whose tuning chose the largest or smallest candidate in most rows: they might do better outside."""
    found = []
    for name in names:
        chosen = [r for r in rows if r["method"] == name and "tuned" in r]
        for setting, candidates in chosen[0]["specification"]["tune"].items() if chosen else ():
            for end in (min(candidates), max(candidates)):
                count = sum(r["settings"][setting] == end for r in chosen)
                if 2 * count > len(chosen):
                    found.append(
                        f"{name} took {setting} = {end:g}, the end of its candidates, in {count} of {len(chosen)}"
                    )
    return "; ".join(found) + (": a wider search may do better." if found else "")


def write_report(run: ExactBenchmark, rows: list[Row], document: Path) -> None:
    """Write the document, its figures in ``figures/`` beside it, and all tables as LaTeX and CSV in the run's folder.

    The document has no figure that is not in the rows."""
    done = [r for r in rows if "error" not in r]
    names = [n for n in run.plan.methods if any(r["method"] == n for r in done)]
    exact = [r for r in done if r["kind"] == "distances"]
    grid = [r for r in exact if r["method"] != FLOOR]
    wrong = [r for r in done if r["kind"] == "wrong model"]
    ranked = [r for r in done if r["kind"] == "calibration"]
    folder = document.parent / "figures"

    def picture(name: str, draw: Callable[[Path], None], caption: str) -> str:
        path = folder / f"{run.name}-{name}.png"
        draw(path)
        return f"![{caption}]({os.path.relpath(path, document.parent)})"

    tables: dict[str, Table] = {}
    parts = [HEAD.format(recipe=run.name)]

    def add(name: str, table: Table, text: str = "") -> None:
        tables[name] = table
        parts.append("\n\n".join(t for t in (f"{table.title}.", table.markdown(), text) if t))

    if grid:
        parts.append("## Distance to the posterior\n\n" + verdict(grid, names))
        add("summary", summary(grid, names))
        add("distances", all_distances(grid, names))
        add("signed", signed(grid, names))
        parts.append("## Evaluations\n")
        add("needed", needed_table(grid, names))
        parts.append(picture("curves", lambda p: curves(grid, names, p), "Distance over floor against evaluations"))
    pictured = [r for r in exact if "points" in r]
    if pictured:
        shown = run.plan.picture
        text = f"## In two dimensions\n\nPosterior density (blue) and samples at {shown.nfe} evaluations: mixture, "
        parts.append(text + f"{shown.operator}, sigma_y = {shown.sigma_y:g}.")
        A = make_operator(shown.operator, 2, run.plan.seed)
        spec = ProblemSpec(
            PriorSpec("mixture", 2, pictured[0]["components"]), shown.operator, shown.sigma_y, run.plan.seed
        )
        prior = make_prior(spec.prior, A, run.plan.seed)
        truth = run.truth(spec, prior)
        parts.append(picture("pictures", lambda p: pictures(pictured, names, truth, p), "Samples of every method"))
    if ranked:
        parts.append("## Calibration\n\n" + CALIBRATION)
        add("calibration", calibration_table(ranked, names))
        first = [r for r in ranked if problem_of(r) == problem_of(ranked[0])]
        parts.append(picture("ranks", lambda p: ranks(first, names, p), "Rank histograms; grey: 99 % of uniform ones"))
    if wrong:
        parts.append("## Told a wrong model\n\n" + WRONG)
        add("wrong-model", told_table(wrong, exact, names))
    if grid:
        parts.append("## Every problem\n")
        add("problems", by_problem(grid, names))
        add("costs", costs(grid, names))
        if any("tuned" in r for r in grid):
            add("tuned", tuned_table(grid, names), edges(grid, names))
    failed = [r for r in rows if "error" in r]
    if failed:
        parts.append("Not measured:\n\n" + "\n".join(sorted({f"- {r['method']}: {r['error']}" for r in failed})))
    seconds = sum(r.get("seconds", 0) for r in done)
    versions = ", ".join(f"{k} {v}" for k, v in done[-1]["versions"].items()) if done else ""
    parts.append(f"{len(rows)} rows; {seconds / 60:.0f} minutes of sampling in all ({versions}).")
    write_atomically(document, ("\n\n".join(parts) + "\n").encode())
    write_atomically(run.out / "tables.tex", "\n\n".join(t.latex() for t in tables.values()).encode())
    for name, table in tables.items():
        write_atomically(run.out / "tables" / f"{name}.csv", table.csv().encode())


def verdict(rows: Sequence[Row], names: Sequence[str]) -> str:
    """In words, how near the floor each method comes."""
    lines = []
    for name in names:
        last = _last(rows, name)
        values = [v for r in last if (v := ratio(r)) is not None]
        if values:
            exact = sum(reaches(r, 0.0) for r in last)
            lines.append(
                f"- **{name}**: not to be told from exact samples in {exact} of {len(last)} problems; "
                f"median {statistics.median(values):.2f} times the floor, worst {max(values):.1f}"
            )
    start = "By sliced Wasserstein-2, at the most evaluations of each problem (exact samples themselves pass in 95 %):"
    return f"{start}\n\n" + "\n".join(lines)


HEAD = """# The exact benchmark

Every method against posteriors that are known in closed form, with a denoiser that makes no error: what is measured is
the method and nothing else. Priors are Gaussians and Gaussian mixtures (random ones whose posteriors keep several
modes, and mixtures fitted to patches of photos), operators select pixels, blur, average or project, and the posterior
is a Gaussian mixture again.

    posteriori benchmark recipes/{recipe}.yaml --set photos=FOLDER

(Patch mixtures are fitted to the photos in FOLDER; without it, to the few that come with the package.)

**What this says about EPS, and what it does not.** EPS needs `E[x_0 | x_t, y]`, and an exact prior gives it exactly:
its only error here is the discretisation of time. Palette needs the same function of the same arguments and would give
the same samples, number for number; how well a network *learns* it from the pivot or without is another question
([ablation](ablation.md)). The training-free methods know the prior's denoiser `E[x_0 | x_t]`, exactly too, and
approximate the rest: their distances are the price of the approximation. `ddnm` and `ddrm` differ in their start alone
and give nearly equal samples here.

Every distance stands beside its Monte Carlo **floor**, what as many *exact* samples give on average: 1 is exact, and
nothing can be expected below. Step sizes for which no value is published are tuned for every problem and number of
evaluations on another measurement (last table). `eps` samples by the default solver of `po.sample`, `eps-euler` by
Euler's. Definitions: `posteriori.bench.distances`, `posteriori.bench.exact_problems`."""

CALIBRATION = """Over many draws of signal and measurement the rank of the truth among posterior samples is uniform
(simulation-based calibration), here for a combination of what the operator sees (`seen`), of what it hardly sees
(`hidden`), for the log density (`density`) and for the distance to a random point (`distance`: TARP's coverage)."""

WRONG = """Exactness is exactness for the model that was told. With a wrong `sigma_y` or blur EPS samples the wrong
posterior exactly, as the first line (exact samples of the model told) shows; a method can only be nearer to the truth
by an error that happens to oppose that of the model."""
