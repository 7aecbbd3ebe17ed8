"""The report of the image benchmark: tables from its rows and the features beside them, nothing measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posteriori.bench.images_pool import FEWEST, Entry, entries
from posteriori.bench.images_recipe import Task
from posteriori.bench.runner import Row
from posteriori.bench.tables import Table
from posteriori.checkpoint import write_atomically

if TYPE_CHECKING:
    from posteriori.bench.images import ImageBenchmark

__all__ = ["best_lines", "calibration", "paper_table", "quality", "read_paper", "wins", "write_report"]


@dataclass(frozen=True)
class Column:
    """A column: the value it shows, times ``scale``, with so many digits; the best is the ``largest`` or smallest."""

    name: str
    header: str
    digits: int = 2
    scale: float = 1.0
    largest: bool = False
    of_sets: bool = False


QUALITY = (
    Column("psnr", "PSNR", largest=True),
    Column("ssim", "SSIM", 3, largest=True),
    Column("distance", "{distance}", 3),
    Column("frechet", "{frechet}", of_sets=True),
    Column("kernel", "{kernel} x1000", scale=1000, of_sets=True),
    Column("mmd", "MMD features x1000", scale=1000, of_sets=True),
    Column("mmd_pixel", "MMD pixels x1000", scale=1000, of_sets=True),
    Column("crps", "CRPS pixels x100", scale=100),
    Column("crps_features", "CRPS features x100", scale=100),
)
CALIBRATION = (
    Column("psnr_mmse", "PSNR 1 NFE"),
    Column("psnr_mean", "PSNR mean"),
    Column("residual", "residual", 3),
    Column("ratio_one", "MSE one"),
    Column("ratio_mean", "MSE mean"),
    Column("inside_50", "inside 50"),
    Column("nominal_50", "nominal"),
    Column("width_50", "width", 3),
    Column("inside_90", "inside 90"),
    Column("nominal_90", "nominal"),
    Column("width_90", "width", 3),
    Column("diversity", "diversity", 3),
    Column("evaluations", "evaluations"),
    Column("backward", "backward", 1),
    Column("seconds", "s / sample", 3),
)


def _shown(columns: Sequence[Column], lines: Sequence[Entry]) -> list[Column]:
    return [c for c in columns if any(c.name in e.values for e in lines)]


def _cell(entry: Entry, column: Column) -> str:
    value = entry.values.get(column.name)
    return "" if value is None else f"{column.scale * value:.{column.digits}f}"


def best_lines(lines: Sequence[Entry], column: Column) -> set[int]:
    """Which lines are best, as the table shows them; none when there are fewer than two to compare.

    Distances between sets depend on the sets' size: only those of the largest are compared.
    """
    largest_set = max((e.set_images for e in lines), default=0)
    shown = {
        i: float(_cell(e, column))
        for i, e in enumerate(lines)
        if column.name in e.values and (not column.of_sets or e.set_images == largest_set)
    }
    if len({lines[i].method for i in shown}) < 2:
        return set()
    best = (max if column.largest else min)(shown.values())
    return {i for i, v in shown.items() if v == best}


def quality(task: str, lines: Sequence[Entry], names: dict[str, str]) -> Table:
    """The main table of a task: methods as lines, the best of every column in bold."""
    columns = _shown(QUALITY, lines)
    bold = {(i, 4 + j) for j, c in enumerate(columns) for i in best_lines(lines, c)}
    rows = [
        [e.method, e.nfe, f"{e.images} x {e.samples}", e.set_images or "", *[_cell(e, c) for c in columns]]
        for e in lines
    ]
    header = ["method", "NFE", "images x samples", "set", *[c.header.format(**names) for c in columns]]
    return Table(f"{task}: quality of one sample, the best in bold", header, rows, bold=frozenset(bold))


def calibration(task: str, lines: Sequence[Entry]) -> Table:
    """Whether samples can be trusted, and what they cost."""
    columns = _shown(CALIBRATION, lines)
    rows = [[e.method, e.nfe, *[_cell(e, c) for c in columns]] for e in lines]
    return Table(f"{task}: calibration and cost", ["method", "NFE", *[c.header for c in columns]], rows)


def wins(tables: dict[str, list[Entry]], method: str = "eps") -> tuple[int, int, list[str]]:
    """In how many cells (task and column) a method, at any number of evaluations, is best; of how many; the others."""
    won, count, lost = 0, 0, []
    for task, lines in tables.items():
        for column in _shown(QUALITY, lines):
            best = best_lines(lines, column)
            if best:
                count += 1
                won += any(lines[i].method == method for i in best)
                if all(lines[i].method != method for i in best):
                    lost.append(f"{task}, {column.name}: {', '.join(sorted({lines[i].method for i in best}))}")
    return won, count, lost


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


def paper_table(content: dict[str, Any], key: str, name: str, task: Task) -> Table | None:
    """A paper's own figures for a task; ``None`` when it has none."""
    rows = content[key].get(task.paper)
    if not rows:
        return None
    header = list(rows[0])
    title = f"{name}: the paper's own figures ({content.get('source', '')}; {key}, {content.get('backbone', '')})"
    return Table(title, header, [[str(r.get(h, "")) for h in header] for r in rows])


def write_report(run: ImageBenchmark, rows: list[Row], document: Path) -> None:
    """Write the document, and all tables as LaTeX and CSV in the run's folder."""
    plan = run.plan
    done = [r for r in rows if "error" not in r]
    pooled = entries(done, run.features_path)
    by_task = {t: [e for e in pooled if e.task == t] for t in plan.tasks}
    by_task = {t: lines for t, lines in by_task.items() if lines}
    network = run.network
    names = {"distance": "", "frechet": "", "kernel": ""}
    if network is not None:
        names = {"distance": network.distance_name, "frechet": network.frechet_name, "kernel": network.kernel_name}
    tables: dict[str, Table] = {}
    parts = [HEAD.format(name=plan.name, size=plan.size, sigma_y=plan.sigma_y, features=plan.features, fewest=FEWEST)]
    won, count, lost = wins(by_task)
    if count and any(e.method == "eps" for e in pooled):
        parts.append(f"**eps is best in {won} of {count} cells.**" + (" Not in:" if lost else ""))
        parts += ["\n".join(f"- {cell}" for cell in lost)] if lost else []
    for task, lines in by_task.items():
        parts.append(f"## {task}")
        found = {f"{task}-quality": quality(task, lines, names), f"{task}-calibration": calibration(task, lines)}
        paper = paper_table(run.paper, plan.paper_set, task, plan.tasks[task]) if run.paper else None
        found |= {f"{task}-paper": paper} if paper else {}
        for name, table in found.items():
            tables[name] = table
            parts.append(f"{table.title}.\n\n{table.markdown()}")
    if failed := sorted({f"- {r['method']}, {r['task']}: {r['error']}" for r in rows if "error" in r}):
        parts.append("Not measured:\n\n" + "\n".join(failed))
    if done:
        versions = ", ".join(f"{k} {v}" for k, v in done[-1]["versions"].items())
        minutes = sum(r["seconds"] for r in done) / 60
        devices = ", ".join(sorted({r["device"] for r in done}))
        parts.append(f"{len(rows)} rows; {minutes:.0f} minutes of sampling in all on {devices} ({versions}).")
    write_atomically(document, ("\n\n".join(parts) + "\n").encode())
    write_atomically(run.out / "tables.tex", "\n\n".join(t.latex() for t in tables.values()).encode())
    for name, table in tables.items():
        write_atomically(run.out / "tables" / f"{name}.csv", table.csv().encode())


HEAD = """# {name}: methods on a test set

Images of {size}x{size} pixels in [-1, 1], measurement noise {sigma_y:g}; every method has the same operators, noise and
seeds. Features are those of `{features}`; a score that is not FID, KID or LPIPS carries the name of its network.
Distances between sets (of one sample of each image, from {fewest} images on) depend on the sets' size and are compared
at the largest alone. `residual` is 1 for true posterior samples, `MSE one` 2 and `MSE mean` 1 + 1/samples over the
error of the posterior mean by one evaluation of EPS; `inside` is to agree with `nominal`."""
