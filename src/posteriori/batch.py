"""What the commands do beyond one photo: many photos with progress and resuming, the demonstration, the models."""

from __future__ import annotations

import json
import math
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from posteriori.checkpoint import bundled_models, locate, read_card, write_atomically
from posteriori.demo import SHOWN, DemoRow, demo_sheet, run_demo
from posteriori.denoise import NetworkDenoiser
from posteriori.images import encode_png, find_photos, read_kernel
from posteriori.memory import keep_freed_memory
from posteriori.methods import get_method
from posteriori.problems import InputError, TaskOptions, build_problem, read_input
from posteriori.restore import (
    Restoration,
    RestoreOptions,
    file_hash,
    fingerprint,
    is_finished,
    load_model,
    model_channels,
    restore,
    write,
)

__all__ = ["models_table", "restore_all", "show_demo"]


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.2f}/s" if speed else "")


class _Screen:
    """Progress on stderr, results on stdout, each message on one line however narrow the terminal."""

    def __init__(self, total: int) -> None:
        self.out, self.err = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("evaluations"), _Rate(),
            TimeRemainingColumn(), console=self.err, transient=True, disable=not self.err.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> _Screen:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, evaluations: int) -> None:
        self._progress.advance(self._task, evaluations)

    def working_on(self, name: str) -> None:
        self._progress.update(self._task, description=escape(name))

    def skip(self, evaluations: int) -> None:
        """Work that turned out not to be needed: neither done nor left."""
        self._progress.update(self._task, total=(self._progress.tasks[0].total or 0) - evaluations)

    def say(self, text: str) -> None:
        self.out.print(text, markup=False, highlight=False)

    def complain(self, kind: str, text: str) -> None:
        self.err.print(f"{kind}: {' '.join(text.split())}", markup=False, highlight=False)

    def fail(self, path: Path, error: Exception) -> None:
        """One line that names the photo."""
        text = str(error) or type(error).__name__
        self.complain("error", text if str(path) in text else f"{path}: {text}")


@contextmanager
def _warnings_on(screen: _Screen, name: str) -> Iterator[None]:
    """Library warnings (a solve that did not converge) as one line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        yield
    for message in dict.fromkeys(
        str(w.message) for w in caught if issubclass(w.category, (RuntimeWarning, UserWarning))
    ):
        screen.complain("warning", f"{name}: {message}")


def restore_all(
    inputs: list[Path], output: Path, task: TaskOptions, options: RestoreOptions, device: str, force: bool = False
) -> int:
    """Restore photos one by one, each independent of the others; returns how many could not be.

    A photo that cannot be used costs one line, and the others are restored all the same.

    Raises:
        ValueError: when something is wrong whatever the photo: options, model, output.
    """
    paths = find_photos(inputs)
    shared = fingerprint(task, options)
    channels = model_channels(options.model)
    low, high = read_card(options.model)["sigma_y_range"] or (0.0, math.inf)  # a pretrained prior knows no measurement
    _check_shared(task, options, low, high)
    spent = get_method(options.method).evaluations(options.samples, options.nfe)
    denoiser: NetworkDenoiser | None = None
    failures = 0
    with _Screen(len(paths) * spent) as screen:
        for path in paths:
            folder = output / path.stem
            screen.working_on(path.name)
            try:
                settings = {"input": file_hash(path), **shared}
                if not force and is_finished(folder, settings):
                    screen.skip(spent)
                    screen.say(f"{path.name}: finished before, skipped ({folder})")
                    continue
                problem = build_problem(read_input(path, task), task, channels, device, (low, high))
            except (ValueError, MemoryError) as error:
                failures += 1
                screen.skip(spent)
                screen.fail(path, error)
                continue
            _make(output)
            if denoiser is None:
                keep_freed_memory()
                denoiser = load_model(options.model, device, options.precision)
                screen.say(_header(task, options, problem.A.describe()))
            if problem.estimate is not None:
                s = problem.estimate
                screen.say(f"{path.name}: sigma_y estimated as {s:.3g} in [-1, 1] = {s * 127.5:.3g} in 0-255")
            for note in problem.notes:
                screen.complain("warning", f"{path}: {note}")
            try:
                with _warnings_on(screen, path.name):
                    result = restore(problem, denoiser, task, options, screen.advance)
            except InputError as error:
                failures += 1
                screen.fail(path, error)
                continue
            try:
                write(result, folder, settings)
            except OSError as error:
                raise InputError(f"cannot write to {folder} ({error.strerror}): choose another --output") from None
            screen.say(f"{path.name}: {_summary(result)} -> {folder}")
    return failures


def _check_shared(task: TaskOptions, options: RestoreOptions, low: float, high: float) -> None:
    """What would be wrong with every photo is said once, before any work; ``low`` to ``high`` is the noise the model
    knows."""
    if task.kernel is not None:
        read_kernel(task.kernel)
    if task.sigma_y != "auto" and task.sigma_y > 0 and not low * 0.999 <= task.sigma_y <= high * 1.001:
        raise InputError(
            f"sigma_y is {task.sigma_y:g}, model {options.model!r} knows {low:g} to {high:g} (images in [-1, 1]; "
            f"{low * 127.5:.3g} to {high * 127.5:.3g} in 0-255): give the nearest value it knows, or another --model"
        )


def _make(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {output} ({error.strerror}): choose another --output") from None


def _header(task: TaskOptions, options: RestoreOptions, operator: str) -> str:
    how = options.method
    if get_method(how).nfe:
        how = ("" if how == "eps" else f"{how}, ") + f"{options.samples} samples of {options.nfe} evaluations"
    kept = (
        "the noisy measurement is kept as float measurement.npy (an 8-bit file would clip and round it)"
        if task.degrade
        else "8-bit photos are clipped to [0, 255] and rounded, which no sigma_y describes"
    )
    s = task.sigma_y
    noise = "estimated from every photo" if s == "auto" else f"{s:g} in [-1, 1] = {s * 127.5:.3g} in 0-255"
    return f"{operator}; sigma_y {noise}; model {options.model}, {how}; {kept}"


def _mean(values: list[float] | None) -> float:
    return statistics.fmean(values) if values else math.nan


def _summary(result: Restoration) -> str:
    report = result.report
    parts = []
    if (db := report["psnr"]) is not None:
        best = "mmse" if db["mmse"] is not None else "mean"
        parts.append(f"input {db['input']:.2f}, " if db["input"] is not None else "")
        parts[-1] += f"linear {db['linear']:.2f}, {best} {db[best]:.2f}"
        parts[-1] += f", samples {_mean(db['samples']):.2f} dB" if db["samples"] else " dB"
    drawn = report["residual"]["samples"]
    if drawn and drawn[0] is not None:
        parts.append(f"whitened residual of samples {_mean(drawn):.2f} (1 is right)")
    parts.append(f"{report['seconds']:.1f} s")
    return "; ".join(parts)


def show_demo(output: Path, options: RestoreOptions, device: str) -> None:
    """Run the demonstration, write its sheet and figures, print its table."""
    denoiser = load_model(options.model, device, options.precision)
    _make(output)
    began = time.monotonic()
    rows: list[DemoRow] = []
    with _Screen(len(SHOWN) * (1 + options.samples * options.nfe)) as screen:
        screen.working_on(SHOWN[0].photo)
        for row in run_demo(denoiser, options, screen.advance):
            rows.append(row)
            screen.working_on(SHOWN[min(len(rows), len(SHOWN) - 1)].photo)
    try:
        write_atomically(output / "demo.png", encode_png(demo_sheet(rows)))
        figures = {row.task.photo: row.result.report for row in rows}
        write_atomically(output / "demo.json", (json.dumps(figures, indent=1, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise InputError(f"cannot write to {output} ({error.strerror}): choose another --output") from None
    screen.out.print(_demo_table(rows))
    screen.say(f"{time.monotonic() - began:.1f} s in all; contact sheet: {output / 'demo.png'}")


def _demo_table(rows: list[DemoRow]) -> Table:
    s = rows[0].result.report["sigma_y"]
    table = Table(title=f"PSNR in dB; sigma_y {s:g} in [-1, 1] = {s * 127.5:.1f} in 0-255", title_justify="left")
    table.add_column("task")
    for column in ("input", "linear", "mean", "sample", "residual", "of sample", "seconds"):
        table.add_column(column, justify="right")
    for row in rows:
        report = row.result.report
        db, residual = report["psnr"], report["residual"]
        figures = (
            db["input"], db["linear"], db["mmse"], _mean(db["samples"]), residual["mmse"], _mean(residual["samples"])
        )  # fmt: skip
        cells = [f"{v:.2f}" for v in figures]
        table.add_row(report["task"], *cells, f"{report['seconds']:.1f}")
    return table


def _measured(card: dict[str, Any]) -> str:
    """The figures of a card, one line per task: PSNR of the mean, beside total variation."""
    figures = card.get("figures", {})
    tasks = figures.get("tasks") if isinstance(figures, dict) else None
    if not tasks:
        return "none"
    lines = [f"{task} {row['mmse']:.1f} dB" + (f" (TV {row['tv']:.1f})" if "tv" in row else "")
             for task, row in tasks.items() if "mmse" in row]  # fmt: skip
    return "\n".join([*lines, str(figures.get("what", ""))])


def models_table() -> Table:
    """The bundled models, one per row."""
    table = Table(show_lines=True)
    for column in ("model", "size", "tasks", "sigma_y", "training data and licence", "measured"):
        table.add_column(column)
    for name in bundled_models():
        card = read_card(name)
        size = (locate(name) / "model.safetensors").stat().st_size
        low, high = card["sigma_y_range"]
        tasks = [t for t in card["tasks"] if t != "none"]
        data: Any = card["training_data"]
        told = "\n".join(str(v) for v in data.values()) if isinstance(data, dict) else str(data)
        cells = (name, f"{size / 2**20:.1f} MiB", ", ".join(tasks), f"{low:g} to {high:g}", told, _measured(card))
        table.add_row(*map(escape, cells))
    if not bundled_models():
        table.add_row("none", "", "", "", "", "")
    return table
