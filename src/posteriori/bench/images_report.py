"""The report of the image benchmark: documents, tables and figures from its rows, nothing measured.

Beside the document lie all files that another reader needs to write it again: the rows, and the distances between sets
(``sets.json``), which come from features that are kept in the folder of the run alone.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from posteriori.bench.images_figures import calibration_figure, curves
from posteriori.bench.images_page import page
from posteriori.bench.images_pictures import write_pictures
from posteriori.bench.images_pool import FEWEST, Entry, entries
from posteriori.bench.images_problems import Problem
from posteriori.bench.images_recipe import ImageRecipe
from posteriori.bench.images_tables import calibration, paper_table, quality, settings_table, win_tables, wins
from posteriori.bench.runner import Row, read_rows
from posteriori.bench.tables import Table
from posteriori.checkpoint import write_atomically
from posteriori.perceptual import FeatureNetwork, InceptionLpips, Lite0

__all__ = ["read_paper", "report_again", "write_report"]

NETWORKS: Mapping[str, type[FeatureNetwork]] = {"lite0": Lite0, "inception": InceptionLpips}
DIGITS = 6  # of numbers in committed rows


def read_paper(path: str, key: str) -> dict[str, Any]:
    """A paper's own tables: ``{set: {task: [{"method": ..., "nfe": ..., "psnr": ...}, ...]}, "source": ...}``.

    Raises:
        ValueError: when the file cannot be read, or has no such set.
    """
    try:
        content: dict[str, Any] = json.loads(Path(path).read_text())
        sets = [k for k, v in content.items() if isinstance(v, dict)]
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"paper: {path} cannot be read ({error}): give a JSON file of tables") from None
    if key not in sets:
        raise ValueError(f"paper_set is {key!r}: choose among {', '.join(sets)}")
    return content


def score_names(features: str) -> dict[str, str]:
    """What the scores of a feature network may be called."""
    network = NETWORKS.get(features)
    kinds = ("distance", "frechet", "kernel")
    return {k: getattr(network, f"{k}_name") if network else "" for k in kinds}


def _known(path: Path) -> dict[str, dict[str, float]]:
    return json.loads(path.read_text()) if path.exists() else {}


def short(row: Row) -> Row:
    """A row with fewer digits, a fourth of the bytes: numbers of single images to six."""

    def rounded(values: Sequence[float | None]) -> list[float | None]:
        return [None if v is None else float(f"{v:.{DIGITS}g}") for v in values]

    return {**row, "per_image": {k: rounded(v) for k, v in row["per_image"].items()}} if "per_image" in row else row


def _write_rows(rows: Sequence[Row], path: Path) -> None:
    """Compressed, the same bytes for the same rows."""
    lines = "".join(json.dumps(r, allow_nan=False) + "\n" for r in rows)
    write_atomically(path, gzip.compress(lines.encode(), mtime=0))


def report_again(plan: ImageRecipe, path: Path, document: Path) -> None:
    """Write a report from committed rows and the ``sets.json`` beside them.

    Args:
        plan: its tasks and methods are shown, whatever the file has besides.
        path: ``rows.jsonl`` or ``rows.jsonl.gz``.
        document: Markdown file.

    Raises:
        ValueError: when the file has no rows of the recipe.
    """
    chosen = set(plan.only or plan.methods)
    rows = [r for r in read_rows(path) if r.get("method") in chosen and r.get("task") in plan.tasks]
    if not rows:
        raise ValueError(f"{path} has no row of the recipe's tasks and methods")
    write_report(plan, rows, document, path.parent)


def write_report(
    plan: ImageRecipe,
    rows: Sequence[Row],
    document: Path,
    out: Path,
    features: Callable[[str], Path] | None = None,
    problem: Callable[[str, int], Problem] | None = None,
) -> None:
    """Write the document and what belongs to it beside it: page, figures, tables as LaTeX and CSV, rows, distances.

    Args:
        plan: the recipe.
        rows: of it, those that failed included.
        document: Markdown file. In another folder than ``out``, everything in its folder may be published: there are
            numbers alone, and the page with pictures is ``report.html`` in ``out``.
        out: folder of the run, or of the rows. Distances between sets are kept there.
        features: file of a row's features; without, distances between sets are those known.
        problem: measured images by task and count, for the viewer; without, there is none.
    """
    rows = [short(r) for r in rows]  # as they are committed, so that a report from committed rows is the same
    done = [r for r in rows if "error" not in r]
    known = _known(out / "sets.json")
    pooled = entries(done, features, known)
    if features is not None and known:
        write_atomically(out / "sets.json", json.dumps(known, indent=1).encode())
    by_task = {t: [e for e in pooled if e.task == t] for t in plan.tasks}
    by_task = {t: lines for t, lines in by_task.items() if lines}
    names = score_names(plan.features)
    paper = read_paper(plan.paper, plan.paper_set) if plan.paper else None

    folder = document.parent
    folder.mkdir(parents=True, exist_ok=True)
    elsewhere = folder.resolve() != out.resolve()
    drawn = None
    if by_task:
        curves(by_task, names, folder / "curves.png")
        drawn = folder / "calibration.png" if calibration_figure(by_task, folder / "calibration.png") else None
    summary = win_tables(by_task, names)
    tables = {t: _task_tables(t, lines, names, plan, paper) for t, lines in by_task.items()}
    settings, facts = settings_table(done), _facts(rows, done)
    head = HEAD.format(size=plan.size, sigma_y=plan.sigma_y, features=plan.features, fewest=FEWEST)
    introduction = head.split("\n\n")
    parts = [f"# {plan.name}: methods on a test set", *introduction, *_verdict(by_task, pooled)]
    parts += [f"{t.title}.\n\n{t.markdown()}" for t in summary.values()]
    if by_task:
        parts.append("![Quality of samples against network evaluations, for every task and method](curves.png)")
    if drawn:
        parts.append("![Coverage, residual and variance of every method's samples](calibration.png)")
    for task, found in tables.items():
        parts += [f"## {task}", *[f"{t.title}.\n\n{t.markdown()}" for t in found.values()]]
    if failed := sorted({f"- {r['method']}, {r['task']}: {r['error']}" for r in rows if "error" in r}):
        parts.append("Not measured:\n\n" + "\n".join(failed))
    parts += ["## How it was measured", "\n".join(f"- {k}: {v}" for k, v in facts.items())]
    parts.append(f"{settings.title}.\n\n{settings.markdown()}")
    write_atomically(document, ("\n\n".join(parts) + "\n").encode())

    every = summary | {k: t for found in tables.values() for k, t in found.items()} | {"settings": settings}
    write_atomically(folder / "tables.tex", ("\n\n".join(t.latex() for t in every.values()) + "\n").encode())
    for name, table in every.items():
        write_atomically(folder / "tables" / f"{name}.csv", table.csv().encode())
    if elsewhere:
        _write_rows(rows, folder / "rows.jsonl.gz")
        used = {e.set_id: known[e.set_id] for e in pooled if e.set_images}
        write_atomically(folder / "sets.json", (json.dumps(used, indent=1) + "\n").encode())

    pictures = write_pictures(done, features, problem, out) if features and problem and plan.keep_images else None

    def written(path: Path, shown: Mapping[str, Any] | None) -> None:
        text = page(
            title=f"{plan.name}: methods on a test set", introduction=[*introduction, *_verdict(by_task, pooled, 1)],
            by_task=by_task, names=names, wins=list(summary.values()),
            tables={t: list(found.values()) for t, found in tables.items()}, settings=settings, facts=facts,
            recipe=_shown_recipe(plan), figure=drawn, pictures=shown,
        )  # fmt: skip
        write_atomically(path, text.encode())

    written(document.with_suffix(".html"), None if elsewhere else pictures)
    if elsewhere and pictures:
        written(out / "report.html", pictures)


def _task_tables(
    task: str, lines: Sequence[Entry], names: Mapping[str, str], plan: ImageRecipe, paper: Mapping[str, Any] | None
) -> dict[str, Table]:
    found = {f"{task}-quality": quality(task, lines, names), f"{task}-calibration": calibration(task, lines)}
    theirs = paper_table(paper, plan.paper_set, task, plan.tasks[task].paper) if paper else None
    return found | ({f"{task}-paper": theirs} if theirs else {})


def _verdict(by_task: Mapping[str, Sequence[Entry]], pooled: Sequence[Entry], most: int | None = None) -> list[str]:
    """In how many cells EPS is best, and a list of the others; at most so many paragraphs."""
    won, count, lost = wins(by_task)
    if not count or all(e.method != "eps" for e in pooled):
        return []
    said = f"eps is best in {won} of {count} cells."
    if most == 1:
        return [said + (f" Not in: {'; '.join(lost)}." if lost else "")]
    return [f"**{said}**" + (" Not in:" if lost else ""), *(["\n".join(f"- {c}" for c in lost)] if lost else [])]


def _facts(rows: Sequence[Row], done: Sequence[Row]) -> dict[str, str]:
    """When another reader gets other figures: what they may differ in."""
    if not done:
        return {}

    def of(name: str) -> str:
        return ", ".join(dict.fromkeys(str(r[name]) for r in done if r.get(name)))

    versions = dict.fromkeys(", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in done)
    state = hashlib.sha256(json.dumps(sorted({(r["first"], r["images"], r["data"]) for r in done})).encode())
    return {
        "rows": f"{len(rows)}, {sum(r['seconds'] for r in done) / 60:.0f} minutes of sampling in all",
        "devices": of("device"), "versions": "; ".join(versions), "models": of("model") or "none",
        "precision": of("precision"), "test set": state.hexdigest()[:16],
    }  # fmt: skip


def _shown_recipe(plan: ImageRecipe) -> dict[str, Any]:
    """What readers can use of a recipe: not where things lay on the machine that measured."""
    return {k: v for k, v in asdict(plan).items() if k not in ("data", "source", "models", "paper")}


HEAD = """\
Images of {size}x{size} pixels in [-1, 1], measurement noise {sigma_y:g}; every method has the same operators, noise and
seeds. Features are those of `{features}`; a score that is not FID, KID or LPIPS carries the name of its network.
Distances between sets (of one sample of each image, from {fewest} images on) depend on the sets' size and are compared
at the largest alone. Methods measured on fewer images are compared on those: what the table shows of single images
is corrected by the paired difference from the method with the most.

`residual` is 1 for true posterior samples, `MSE one` 2 and `MSE mean` 1 + 1/samples over the error of the posterior
mean by one evaluation of EPS; `inside` is to agree with `nominal`. Methods with one answer, and one evaluation of EPS
or Palette, which is the posterior mean, have their absolute error as CRPS."""
