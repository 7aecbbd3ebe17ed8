r"""A grid of measurements that survives being killed: one row of JSON for each, tables and figures from the rows alone.

    recipe (YAML)  ->  cells  ->  rows.jsonl  ->  report.md, tables.tex, figures

A *cell* is what identifies a measurement (method, task, settings, seed) and the function that makes it. Its row is
written in one piece when the measurement is finished: a killed run continues where it stopped, repeats no row and loses
none. Several processes may share a file (``RANK`` and ``WORLD_SIZE``, as accelerate and torchrun set them, divide the
cells); each row is written under a lock, and whoever finishes last writes the report.

To add a benchmark, write a class with the members of :class:`Benchmark` and a line in :data:`KINDS`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import platform
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import IO, Any, ClassVar, Protocol

import torch

from posteriori._version import __version__
from posteriori.bench.common import say
from posteriori.recipe import RecipeError

__all__ = [
    "KINDS", "Benchmark", "Cell", "Meter", "Rows", "benchmark", "identity", "measure_cells", "read_rows",
    "report_again", "versions",
]  # fmt: skip

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One measurement: ``key`` says which (plain values that JSON keeps), ``compute`` makes it."""

    key: Row
    compute: Callable[[], Row]


class Benchmark(Protocol):
    """A kind of benchmark. ``out`` is the folder of the run, where anything worth keeping may be kept."""

    name: str
    #: The dataclass that a recipe of this kind is read into.
    recipe: ClassVar[type]

    def __init__(self, recipe: Any, out: Path, device: str) -> None: ...

    def cells(self) -> Iterator[Cell]:
        """All cells, cheap to list, those that share work one after another."""

    def report(self, rows: list[Row], document: Path) -> None:
        """Write ``document`` (Markdown) and what belongs to it beside it, from rows alone."""

    @classmethod
    def report_again(cls, recipe: Any, rows: Path, document: Path) -> None:
        """The same from a file of rows, without models, data or the folder of the run."""


# kind, as a recipe states it -> "module:class"
KINDS = {"exact": "posteriori.bench.exact:ExactBenchmark", "images": "posteriori.bench.images:ImageBenchmark"}


def identity(key: Row) -> str:
    """Sixteen hexadecimal digits that tell a cell from all others."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def versions() -> Row:
    """What a figure may depend on beside the recipe."""
    installed = {name: metadata.version(name) for name in ("torch", "numpy")}
    return {"posteriori": __version__, "python": platform.python_version(), **installed}


def _finite(value: Any) -> Any:
    """JSON has no infinities: what diverged is ``null``."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


@contextmanager
def _locked(stream: IO[Any]) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows: one process only
        yield
        return
    fcntl.flock(stream, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(stream, fcntl.LOCK_UN)


def _ends_a_line(stream: IO[bytes]) -> bool:
    stream.seek(-1, os.SEEK_END)
    return stream.read(1) == b"\n"


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a file, which may be compressed (``.gz``); what follows the last line's end is left out.

    Raises:
        ValueError: when it cannot be read, or a line is no row: the file is something else's, or was edited by hand.
    """
    try:
        content = Path(path).read_bytes()
        lines = (gzip.decompress(content) if Path(path).suffix == ".gz" else content).split(b"\n")[:-1]
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: rows cannot be read ({error})") from None
    found: list[Row] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            found.append({"id": row["id"], **row})
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: not a row of a benchmark: move the file away") from None
    return found


class Rows:
    """The rows of a file, found by their cell's :func:`identity`.

    Half a row at its end, of a process that was killed while it wrote, is dropped by the next one that writes.

    Raises:
        ValueError: when a line other than the last is no row: the file is something else's, or was edited by hand.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._rows = {r["id"]: r for r in read_rows(self.path)} if self.path.exists() else {}

    def __contains__(self, key: Row) -> bool:
        return identity(key) in self._rows

    def __getitem__(self, key: Row) -> Row:
        return self._rows[identity(key)]

    def of(self, cells: Iterator[Cell]) -> list[Row]:
        """The rows there are of these cells, in their order: a file may hold those of other recipes too."""
        return [self[c.key] for c in cells if c.key in self]

    def append(self, key: Row, values: Row) -> Row:
        """Add a row, on disk when this returns."""
        row = _finite({"id": identity(key), **key, **values})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as stream, _locked(stream):
            if stream.tell() and not _ends_a_line(stream):
                stream.seek(0)
                stream.truncate(stream.read().rfind(b"\n") + 1)
            stream.write(json.dumps(row, allow_nan=False).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._rows[row["id"]] = row
        return row


@dataclass
class Meter:
    """Seconds and peak memory of a block of code: ``with Meter(device) as meter: ...``, then ``meter.row()``.

    Memory is that of the process on the CPU (what it holds at its worst, loaded libraries included), and what tensors
    took on a GPU.
    """

    device: str = "cpu"
    seconds: float = field(default=0.0, init=False)
    memory: float = field(default=0.0, init=False)

    def __enter__(self) -> Meter:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            _reset_peak()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._began
        gpu = self.device.startswith("cuda")
        self.memory = torch.cuda.max_memory_allocated() / 2**20 if gpu else _peak()

    def row(self) -> Row:
        return {"seconds": round(self.seconds, 4), "peak_memory_mib": round(self.memory, 1)}


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak counts from here
    except OSError:
        return


def _peak() -> float:
    """Largest memory of the process in MiB: since the reset on Linux, in its life elsewhere."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def measure_cells(cells: Iterator[Cell], rows: Rows, limit: int | None = None) -> int:
    """Measure the cells that have no row, this process's share of them; returns how many were measured.

    A ``ValueError`` of a cell (the method does not fit the operator, say) is its result: the row says why. Any other
    error is a bug and ends the run.

    Args:
        limit: stop after this many.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    wanted = [c for i, c in enumerate(cells) if i % world == rank]
    missing = [c for c in wanted if c.key not in rows]
    say(f"{len(wanted)} measurements, {len(wanted) - len(missing)} of them done")
    setting = {"versions": versions(), "threads": torch.get_num_threads()}
    for count, cell in enumerate(missing[:limit], 1):
        try:
            values = cell.compute()
        except ValueError as error:
            values = {"error": " ".join(str(error).split())}
        rows.append(cell.key, {**values, **setting})
        shown = " ".join(str(v) for v in cell.key.values() if isinstance(v, str | int | float))
        say(f"[{count}/{len(missing)}] {shown}" + (f": {values['error']}" if "error" in values else ""))
    return len(missing[:limit])


def _read(path: str | Path, overrides: list[str] | None) -> tuple[type[Benchmark], Any]:
    """The benchmark that a recipe is for, and the recipe."""
    from posteriori.recipe import build, read_recipe

    content = read_recipe(path, overrides)
    kind = content.pop("kind", None) if isinstance(content, dict) else None
    if kind not in KINDS:
        raise RecipeError(f"{path}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    module, _, name = KINDS[kind].partition(":")
    made: type[Benchmark] = getattr(import_module(module), name)
    return made, build(made.recipe, content)


def report_again(
    path: str | Path, rows: str | Path, overrides: list[str] | None = None, document: str | Path | None = None
) -> Path:
    """Write a report from a file of rows: nothing is measured, no model and no data are needed.

    Args:
        path, overrides: as for :func:`benchmark`.
        rows: ``rows.jsonl`` or ``rows.jsonl.gz``.
        document: Markdown file of the report, ``report.md`` beside the rows when left out.

    Returns:
        The document.

    Raises:
        RecipeError: when the recipe or the rows cannot be used.
    """
    made, recipe = _read(path, overrides)
    target = Path(document) if document is not None else Path(rows).parent / "report.md"
    try:
        made.report_again(recipe, Path(rows), target)
    except ValueError as error:
        raise error if isinstance(error, RecipeError) else RecipeError(str(error)) from None
    return target


def benchmark(
    path: str | Path,
    out: str | Path | None = None,
    overrides: list[str] | None = None,
    *,
    limit: int | None = None,
    document: str | Path | None = None,
    device: str = "cpu",
) -> Path:
    """Run a recipe, or what is missing of it, and write its report.

    Args:
        path: the recipe; its key ``kind`` says which benchmark it is for.
        out: folder of the run, ``runs/<name of the recipe>`` when left out.
        overrides: ``key=value`` pairs.
        limit: measure at most this many rows now; the report is of the rows there are.
        document: Markdown file of the report, ``report.md`` in ``out`` when left out.
        device: where methods run.

    Returns:
        The document.

    Raises:
        RecipeError: when the recipe cannot be used.
    """
    made, recipe = _read(path, overrides)
    folder = Path(out) if out is not None else Path("runs") / recipe.name
    try:
        rows = Rows(folder / "rows.jsonl")
        run = made(recipe, folder, device)
        measure_cells(run.cells(), rows, limit)
    except ValueError as error:
        raise error if isinstance(error, RecipeError) else RecipeError(str(error)) from None
    target = Path(document) if document is not None else folder / "report.md"
    rows = Rows(folder / "rows.jsonl")  # with those of other processes
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or all(c.key in rows for c in run.cells()):
        run.report(rows.of(run.cells()), target)
    return target
