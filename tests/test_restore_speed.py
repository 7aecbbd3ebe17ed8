"""The speed table: what is counted, and how it gets into the document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from posteriori.bench import restore_speed
from posteriori.bench.restore_speed import MARKS, Case, Clocked, insert, measure, table
from posteriori.denoise import NetworkDenoiser
from posteriori.problems import RestorationProblem
from posteriori.schedule import VE


class Clock:
    """A clock that only what is told to takes time on."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Slow(nn.Module):
    """A network that takes a known time."""

    def __init__(self, seconds: float = 0.0, clock: Clock | None = None) -> None:
        super().__init__()
        self.seconds, self.clock, self.calls = seconds, clock, 0

    def forward(self, inputs: Tensor, c_noise: Tensor, conditioning: object) -> Tensor:
        self.calls += 1
        if self.clock:
            self.clock.now += self.seconds
        return torch.zeros_like(inputs)


def test_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn that warms up counted in, one precision's time booked on the other, work outside counted as inside."""
    clock = Clock()
    monkeypatch.setattr(restore_speed, "time", clock)
    build = restore_speed.build_problem

    def slow_build(*arguments: Any) -> RestorationProblem:
        clock.now += 0.25
        return build(*arguments)

    monkeypatch.setattr(restore_speed, "build_problem", slow_build)
    networks = {"float32": Slow(0.75, clock), "bfloat16": Slow(0.25, clock)}
    denoisers = {name: NetworkDenoiser(network, VE()) for name, network in networks.items()}
    row = measure(Case("denoise", 16, 0, 3), denoisers)
    assert [network.calls for network in networks.values()] == [4, 4]
    assert denoisers["float32"].backbone is networks["float32"]
    assert row["turns"] == 3
    assert row["float32"] == {"seconds": [1.0] * 3, "outside": [0.25] * 3}
    assert row["bfloat16"] == {"seconds": [0.5] * 3, "outside": [0.5] * 3}


def test_samples_are_the_command(tmp_path: Path) -> None:
    """The time of samples would lack the mean, or the files."""
    network = Clocked(Slow())
    restore_speed.run(Case("denoise", 16, 3, 1), NetworkDenoiser(network, VE()), tmp_path)
    names = {p.name for p in (tmp_path / "result").iterdir()}
    assert {"mmse.png", "mean.png", "std.png", "sample-03.png", "report.png", "report.json"} <= names
    assert json.loads((tmp_path / "result" / "report.json").read_text())["evaluations"] == 1 + 3 * 8


def test_table_and_document() -> None:
    """Medians with their range, memory beside its own case, and nothing else of the document touched."""
    times = {"seconds": [3.0, 1.0, 2.0], "outside": [0.1, 0.3, 0.2]}
    key = {"task": "sr", "size": 256, "samples": 8}
    rows = [
        {"kind": "time", "threads": 2, **key, "turns": 3, "float32": times, "bfloat16": {k: [0.25] for k in times}},
        {"kind": "memory", "precision": "bfloat16", **key, "mib": 512.4},
        {"kind": "start", "threads": 1, "seconds": [1.5]},
    ]
    lines = table(rows).splitlines()
    assert lines[2] == "| sr | 256x256 | 8 samples | 2 | float32 | 3 | 2.00 (1.00 to 3.00) | 20.0 (10.0 to 30.0) |  |"
    assert lines[3].endswith("| bfloat16 | 3 | 0.25 (0.25 to 0.25) | 25.0 (25.0 to 25.0) | 512 |")
    assert lines[-1] == "Before it, imports and the model: 1.50 (1.50 to 1.50) s with 1 thread."
    document = f"words\n{MARKS[0]}\nold\n{MARKS[1]}\nmore\n"
    assert insert(document, "new") == f"words\n{MARKS[0]}\nnew\n{MARKS[1]}\nmore\n"
    with pytest.raises(ValueError, match="add both"):
        insert("words", "new")
