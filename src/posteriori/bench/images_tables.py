"""Tables of the image benchmark from pooled entries: quality, calibration and cost, and who is best how often."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posteriori.bench.images_pool import Entry
from posteriori.bench.runner import Row
from posteriori.bench.tables import Table

__all__ = [
    "CALIBRATION", "QUALITY", "Column", "best_lines", "calibration", "cell", "comparable", "paper_table", "quality",
    "settings_table", "shown", "win_tables", "wins",
]  # fmt: skip

Names = Mapping[str, str]
Tasks = Mapping[str, Sequence[Entry]]


@dataclass(frozen=True)
class Column:
    """A column: the value it shows, times ``scale``, with so many digits; the best is the ``largest`` or smallest."""

    name: str
    header: str
    digits: int = 2
    scale: float = 1.0
    largest: bool = False
    of_sets: bool = False

    def title(self, names: Names) -> str:
        """The header, with the names of the feature network's scores."""
        return self.header.format(**names)


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
    Column("nominal_50", "nominal 50"),
    Column("width_50", "width 50", 3),
    Column("inside_90", "inside 90"),
    Column("nominal_90", "nominal 90"),
    Column("width_90", "width 90", 3),
    Column("diversity", "diversity", 3),
    Column("evaluations", "evaluations"),
    Column("backward", "backward", 1),
    Column("seconds", "s / sample", 3),
)


def shown(columns: Sequence[Column], lines: Sequence[Entry]) -> list[Column]:
    """The columns that any of the lines has."""
    return [c for c in columns if any(c.name in e.values for e in lines)]


def cell(entry: Entry, column: Column) -> str:
    """What the table shows."""
    value = entry.values.get(column.name)
    return "" if value is None else f"{column.scale * value:.{column.digits}f}"


def comparable(lines: Sequence[Entry], column: Column) -> list[int]:
    """Lines that have the column. Distances depend on the sets' size: only those of the largest sets are compared."""
    largest = max((e.set_images for e in lines), default=0)
    return [
        i for i, e in enumerate(lines) if column.name in e.values and (not column.of_sets or e.set_images == largest)
    ]


def best_lines(lines: Sequence[Entry], column: Column) -> set[int]:
    """Which lines are best, as the table shows them; none when there are fewer than two methods to compare."""
    values = {i: float(cell(lines[i], column)) for i in comparable(lines, column)}
    if len({lines[i].method for i in values}) < 2:
        return set()
    best = (max if column.largest else min)(values.values())
    return {i for i, v in values.items() if v == best}


def quality(task: str, lines: Sequence[Entry], names: Names) -> Table:
    """The main table of a task: methods as lines, the best of every column in bold."""
    columns = shown(QUALITY, lines)
    bold = {(i, 4 + j) for j, c in enumerate(columns) for i in best_lines(lines, c)}
    rows = [
        [e.method, e.nfe, f"{e.images} x {e.samples}", e.set_images or "", *[cell(e, c) for c in columns]]
        for e in lines
    ]
    header = ["method", "NFE", "images x samples", "set", *[c.title(names) for c in columns]]
    return Table(f"{task}: quality of one sample, the best in bold", header, rows, bold=frozenset(bold))


def calibration(task: str, lines: Sequence[Entry]) -> Table:
    """Whether samples can be trusted, and what they cost."""
    columns = shown(CALIBRATION, lines)
    rows = [[e.method, e.nfe, *[cell(e, c) for c in columns]] for e in lines]
    return Table(f"{task}: calibration and cost", ["method", "NFE", *[c.header for c in columns]], rows)


def _winners(tables: Tasks) -> dict[tuple[str, str], set[str]]:
    """The best methods, at any number of evaluations, of every cell (task and column) that has any."""
    return {
        (task, column.name): {lines[i].method for i in best}
        for task, lines in tables.items()
        for column in shown(QUALITY, lines)
        if (best := best_lines(lines, column))
    }


def wins(tables: Tasks, method: str = "eps") -> tuple[int, int, list[str]]:
    """In how many cells a method, at any number of evaluations, is best; of how many; the others."""
    cells = _winners(tables)
    lost = [f"{task}, {column}: {', '.join(sorted(best))}" for (task, column), best in cells.items()
            if method not in best]  # fmt: skip
    return len(cells) - len(lost), len(cells), lost


def win_tables(tables: Tasks, names: Names) -> dict[str, Table]:
    """How often every method is best: in how many tasks by column, in how many columns by task. Ties count for all."""
    cells = _winners(tables)
    methods = list(dict.fromkeys(e.method for lines in tables.values() for e in lines))
    titles = {c.name: c.title(names) for c in QUALITY}

    def table(title: str, place: int, keys: Sequence[str], headers: Sequence[str]) -> Table:
        of = [[best for at, best in cells.items() if at[place] == key] for key in keys]
        header = ["method", *[f"{h} (of {len(o)})" for h, o in zip(headers, of, strict=True)], f"all (of {len(cells)})"]
        counts = [[sum(m in best for best in o) for o in [*of, list(cells.values())]] for m in methods]
        top = [max(column) for column in zip(*counts, strict=True)]
        bold = {(i, j + 1) for i, line in enumerate(counts) for j, n in enumerate(line) if n == top[j] and n}
        return Table(title, header, [[m, *n] for m, n in zip(methods, counts, strict=True)], bold=frozenset(bold))

    if not cells:
        return {}
    columns = [c.name for c in QUALITY if any(at[1] == c.name for at in cells)]
    tasks = [t for t in tables if any(at[0] == t for at in cells)]
    return {
        "wins-by-column": table(
            "In how many tasks a method is best, at any number of evaluations", 1, columns, [titles[c] for c in columns]
        ),
        "wins-by-task": table(
            "In how many columns a method is best, at any number of evaluations", 0, tasks, tasks
        ),
    }  # fmt: skip


def paper_table(content: Mapping[str, Any], key: str, name: str, title: str) -> Table | None:
    """A paper's own figures for a task; ``None`` when it has none.

    Args:
        content, key: of :func:`posteriori.bench.images_report.read_paper`.
        name, title: of the task, here and in the paper.
    """
    rows = content[key].get(title)
    if not rows:
        return None
    header = list(rows[0])
    told = f"{name}: the paper's own figures ({content.get('source', '')}; {key}, {content.get('backbone', '')})"
    return Table(told, header, [[str(r.get(h, "")) for h in header] for r in rows])


def settings_table(rows: Sequence[Row]) -> Table:
    """What every method was told or chose, tasks with the same in one line, and the hash of its model's weights."""
    groups: dict[tuple[str, str, str], dict[str, dict[str, None]]] = {}
    for r in rows:
        chosen = {**r.get("settings", {}), **r.get("told", {})}
        chosen = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in chosen.items()}
        told = json.dumps(chosen, sort_keys=True)[1:-1].replace('"', "")
        group = groups.setdefault((r["method"], r.get("model", ""), told), {"tasks": {}, "nfe": {}})
        group["tasks"][r["task"]] = group["nfe"][str(r["nfe"])] = None
    lines = [
        [method, ", ".join(g["tasks"]), ", ".join(g["nfe"]), model, told] for (method, model, told), g in groups.items()
    ]
    return Table("Settings of methods", ["method", "tasks", "NFE", "model", "settings"], lines, names=5)
