"""What a user sees of a run: a progress line, ``metrics.jsonl``, trackers."""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

__all__ = ["Monitor", "drop_lines_after"]


def drop_lines_after(path: Path, step: int) -> None:
    """A killed run may have logged steps past its last checkpoint; they are about to be logged again."""
    if path.exists():
        # the last may be torn
        rows = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
        kept = "".join(row for row in rows if json.loads(row)["step"] <= step)
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_text(kept)
        temporary.replace(path)


class Monitor:
    """Progress of a run on a terminal; in a file, a line for every line of ``metrics.jsonl``.

    Args:
        steps: of the run.
        start: where it begins.
        show: ``False`` for silence, or a console.
    """

    def __init__(self, steps: int, start: int, show: bool | Console) -> None:
        self.console = show if isinstance(show, Console) else Console(stderr=True, quiet=not show)
        self.steps, self.start = steps, start
        self.live = bool(show) and self.console.is_terminal
        self._progress = Progress(
            TextColumn("training"), BarColumn(bar_width=None), MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"), TextColumn("{task.fields[rate]:.1f} images/s"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self.console, disable=not self.live,
            refresh_per_second=2, expand=True,
        )  # fmt: skip
        self._task = self._progress.add_task("training", total=steps, completed=start, loss="-", rate=0.0)
        self._recent: deque[tuple[float, int]] = deque([(time.monotonic(), 0)], maxlen=50)
        self._images, self._shown = 0, 0.0

    def __enter__(self) -> Monitor:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def headline(self, facts: dict[str, str]) -> None:
        """What is about to be trained, on what, with what."""
        table = Table.grid(padding=(0, 2))
        for name, value in facts.items():
            table.add_row(f"[bold]{name}[/bold]", value)
        self.console.print(Panel(table, title="posteriori train", title_align="left"))

    def say(self, text: str) -> None:
        """One line above the progress."""
        self.console.print(text, markup=False, highlight=False)

    @property
    def rate(self) -> float:
        """Images per second over the last steps."""
        (began, first), (ended, last) = self._recent[0], self._recent[-1]
        return (last - first) / max(ended - began, 1e-9)

    def advance(self, images: int) -> bool:
        """Count a step; whether it is time to show its loss (reading it would make a GPU wait)."""
        self._images += images
        now = time.monotonic()
        self._recent.append((now, self._images))
        due = self.live and now - self._shown > 0.5
        if due:
            self._shown = now
        return due

    def show(self, step: int, loss: float) -> None:
        """Update the progress line."""
        self._progress.update(self._task, completed=step, loss=f"{loss:.4f}", rate=self.rate)

    def log(self, path: Path, row: dict[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``."""
        with path.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        self.show(row["step"], row["loss"])
        if not self.live:
            done = row["step"] - self.start
            began = self._recent[0][0]
            per_step = (time.monotonic() - began) / max(min(done, len(self._recent) - 1), 1)
            left = time.strftime("%H:%M:%S", time.gmtime((self.steps - row["step"]) * per_step))
            self.say(
                f"step {row['step']}/{self.steps}  loss {row['loss']:.4f}  "
                f"{row['images_per_second']:.1f} images/s  {left} left"
            )
