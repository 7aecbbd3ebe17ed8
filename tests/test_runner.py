"""The grid runner: rows that survive a kill, tables that say what the rows say."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from posteriori.bench.runner import Cell, Rows, identity, measure_cells
from posteriori.bench.tables import Table


def cells(count: int, made: list[int]) -> list[Cell]:
    def make(i: int) -> Cell:
        return Cell({"method": "m", "nfe": i, "settings": {"a": [1, 2]}}, lambda: made.append(i) or {"value": i * i})  # type: ignore[func-returns-value]

    return [make(i) for i in range(count)]


def test_half_a_row_is_measured_again_and_no_other(tmp_path: Path) -> None:
    """The row after half a row would be lost with it, or every later run would stop at it."""
    path = tmp_path / "rows.jsonl"
    made: list[int] = []
    assert measure_cells(iter(cells(4, made)), Rows(path), limit=3) == 3
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])  # the process died in the third row
    assert measure_cells(iter(cells(4, made)), Rows(path)) == 2
    assert made == [0, 1, 2, 2, 3]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["value"] for r in rows] == [0, 1, 4, 9]
    assert len({r["id"] for r in rows}) == 4
    assert measure_cells(iter(cells(4, made)), Rows(path)) == 0


def test_a_changed_setting_is_another_row(tmp_path: Path) -> None:
    """A figure measured under other settings would be taken for this one."""
    rows = Rows(tmp_path / "rows.jsonl")
    rows.append({"method": "m", "settings": {"a": 1}}, {"value": 1})
    assert {"settings": {"a": 1}, "method": "m"} in rows
    assert {"settings": {"a": 1.5}, "method": "m"} not in rows
    assert identity({"a": 1, "b": 2}) == identity({"b": 2, "a": 1})


def test_other_files_are_not_overwritten(tmp_path: Path) -> None:
    """Results of another program, or rows edited by hand, would be mixed with ours."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"psnr": 1}\n')
    with pytest.raises(ValueError, match="line 1: not a row"):
        Rows(path)


def test_refusals_are_results_and_bugs_are_not(tmp_path: Path) -> None:
    """A method that does not fit would stop the grid; a bug would be written down as a result."""

    def refuse() -> dict[str, object]:
        raise ValueError("needs\n singular values")

    def fail() -> dict[str, object]:
        raise ZeroDivisionError

    rows = Rows(tmp_path / "rows.jsonl")
    measure_cells(iter([Cell({"m": 1}, refuse)]), rows)
    assert rows[{"m": 1}]["error"] == "needs singular values"
    with pytest.raises(ZeroDivisionError):
        measure_cells(iter([Cell({"m": 2}, fail)]), rows)
    assert {"m": 2} not in Rows(tmp_path / "rows.jsonl")


def test_what_diverged_is_null(tmp_path: Path) -> None:
    """``NaN`` is no JSON: other programs could not read the file."""
    rows = Rows(tmp_path / "rows.jsonl")
    rows.append({"m": 1}, {"distances": {"sw2": math.nan}, "list": [math.inf, 1.0]})
    (line,) = (tmp_path / "rows.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=lambda c: pytest.fail(c))
    assert row["distances"] == {"sw2": None}
    assert row["list"] == [None, 1.0]


SLOW = """
    import sys, time
    from posteriori.bench.runner import Cell, Rows, measure_cells

    def compute(i):
        time.sleep(0.05)
        return {"value": i, "filler": "x" * 200_000}

    measure_cells(iter([Cell({"cell": i}, lambda i=i: compute(i)) for i in range(12)]), Rows(sys.argv[1]))
"""


def start(path: Path, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", textwrap.dedent(SLOW), str(path)]
    return subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)


def test_a_killed_process_continues(tmp_path: Path) -> None:
    """SIGKILL at some moment of the run: what was finished would be repeated or lost."""
    path = tmp_path / "rows.jsonl"
    process = start(path)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not path.exists() or path.read_bytes().count(b"\n") < 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = path.read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    kept = whole.count(b"\n")
    assert 3 <= kept < 12
    assert start(path).wait(timeout=60) == 0
    after = path.read_bytes()
    assert after.startswith(whole)
    assert sorted(json.loads(line)["value"] for line in after.splitlines()) == list(range(12))


def test_processes_share_a_grid(tmp_path: Path) -> None:
    """Two processes would measure the same cells, or tear each other's rows."""
    path = tmp_path / "rows.jsonl"
    running = [start(path, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    assert [p.wait(timeout=60) for p in running] == [0, 0]
    assert sorted(json.loads(line)["value"] for line in path.read_text().splitlines()) == list(range(12))


def test_meter_sees_time_and_memory() -> None:
    """The cost columns would be noise. In a process of its own: other tests leave memory that is taken again unseen."""
    code = """
import time
from posteriori.bench.runner import Meter
with Meter() as small:
    time.sleep(0.05)
with Meter() as large:
    block = bytearray(200 * 2**20)
    block[:: 2**12] = b"1" * len(block[:: 2**12])  # touch every page
print(small.seconds, large.memory - small.memory)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, more = map(float, out.split())
    assert seconds >= 0.05
    assert more > 150


def test_tables_say_the_same_three_times() -> None:
    """A cell that breaks the LaTeX or moves a column would make three different tables."""
    table = Table("100 % of a_b", ["name", "x & y", "z"], [["a_b", 1.234, ""], ["c", "never", 2]])
    assert table.markdown().splitlines()[2] == "| a_b | 1.23 |  |"
    latex = table.latex()
    assert r"\caption{100 \% of a\_b}" in latex
    assert r"name & x \& y & z \\" in latex
    assert r"a\_b & 1.23 &  \\" in latex
    assert r"\begin{tabular}{lrr}" in latex
    assert table.csv().splitlines() == ["name,x & y,z", "a_b,1.234,", "c,never,2"]
