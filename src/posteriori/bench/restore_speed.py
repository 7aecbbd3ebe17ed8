r"""How long a photo takes and how much memory, with the bundled model on a CPU.

    python -m posteriori.bench.restore_speed time --threads 1 --out restore-speed.jsonl
    python -m posteriori.bench.restore_speed memory --out restore-speed.jsonl
    python -m posteriori.bench.restore_speed report --out restore-speed.jsonl --document docs/speed.md

Measured is what ``posteriori restore`` does with a loaded model: the problem, all evaluations, the figures, the files.
``mean`` is one evaluation and its picture; ``N samples`` is the command with ``--samples N`` and its default
evaluations, one more for the mean, and all its files. float32 and bfloat16 take turns in one process, short runs after
one of each that does not count; a figure is the median over the turns with the lowest and the highest. ``outside`` is
the share of the time that is not the network's, its tiling included. Peak memory is that of a process of its own that
does nothing else, PyTorch and the model included (two evaluations a sample: more change nothing). The picture is noise
on a ramp: no step depends on what it shows.

Rows that the file has are not measured again; the table goes between two marks of the document.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posteriori.bench.common import Results, markdown_table, say
from posteriori.checkpoint import write_atomically
from posteriori.conditioning import Conditioning
from posteriori.denoise import NetworkDenoiser
from posteriori.images import Photo, write_image
from posteriori.memory import keep_freed_memory
from posteriori.posterior import ExactPosterior
from posteriori.problems import TaskOptions, build_problem
from posteriori.restore import RestoreOptions, load_model, restore, write

__all__ = ["Case", "insert", "main", "measure", "table"]

SIGMA_Y = 0.05
PRECISIONS = ("float32", "bfloat16")
MARKS = "<!-- restore-speed -->", "<!-- /restore-speed -->"


@dataclass(frozen=True)
class Case:
    """What is timed: ``samples`` is 0 for the posterior mean alone; ``turns`` of each precision."""

    task: str
    size: int
    samples: int
    turns: int

    @property
    def key(self) -> dict[str, Any]:
        return {"task": self.task, "size": self.size, "samples": self.samples}


CASES = (
    *(Case(task, 256, 0, 9) for task in ("inpaint", "sr", "gaussian", "motion")),
    Case("sr", 256, 8, 3),
    Case("gaussian", 256, 2, 3),
    Case("sr", 2048, 0, 2),
)


class Clocked(nn.Module):
    """A backbone that counts the seconds spent in it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.seconds = backbone, 0.0

    def forward(self, inputs: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        began = time.perf_counter()
        result: Tensor = self.backbone(inputs, c_noise, conditioning)
        self.seconds += time.perf_counter() - began
        return result


def picture(size: int) -> Tensor:
    """``(3, size, size)`` in [-1, 1]."""
    ramp = torch.linspace(-0.7, 0.7, size).expand(3, size, size)
    return ramp + 0.1 * torch.randn(3, size, size, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)


def run(case: Case, denoiser: NetworkDenoiser, folder: Path, nfe: int = RestoreOptions.nfe) -> None:
    """Restore one photo, from its pixels to its files."""
    task = TaskOptions(case.task, SIGMA_Y, degrade=True)
    problem = build_problem(Photo(picture(case.size)), task)
    if case.samples:
        result = restore(problem, denoiser, task, RestoreOptions(samples=case.samples, nfe=nfe))
        write(result, folder / "result", {})
    else:
        mean = ExactPosterior(denoiser, problem.A, problem.y, problem.sigma_model).mean()
        write_image(mean, folder / "mmse.png")


def measure(case: Case, denoisers: dict[str, NetworkDenoiser]) -> dict[str, Any]:
    """Seconds of every turn and the share outside the network, by precision, which take turns."""
    clocks = {}
    for name, denoiser in denoisers.items():
        denoiser.backbone = clocks[name] = Clocked(denoiser.backbone)
    found: dict[str, Any] = {name: {"seconds": [], "outside": []} for name in denoisers}
    short = not case.samples and case.size < 1024  # what takes longer hardly notices a cold start
    for turn in range(-1 if short else 0, case.turns):
        for name, denoiser in denoisers.items():
            with tempfile.TemporaryDirectory() as folder:
                clocks[name].seconds, began = 0.0, time.perf_counter()
                run(case, denoiser, Path(folder))
                seconds = time.perf_counter() - began
            if turn >= 0:
                found[name]["seconds"].append(seconds)
                found[name]["outside"].append(1 - clocks[name].seconds / seconds)
    for name, denoiser in denoisers.items():
        denoiser.backbone = clocks[name].backbone
    return {"turns": case.turns, "torch": torch.__version__, **found}


def peak(case: Case, precision: str) -> dict[str, Any]:
    """MiB that a process of its own takes at most."""
    arguments = ["alone", precision, case.task, str(case.size), str(case.samples)]
    command = [sys.executable, "-m", "posteriori.bench.restore_speed", *arguments]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {"mib": float(out.split()[-1])}


def alone(precision: str, task: str, size: int, samples: int) -> float:
    """MiB, in the process that :func:`peak` starts."""
    import resource

    with tempfile.TemporaryDirectory() as folder:
        run(Case(task, size, samples, 1), load_model("photo", precision=precision), Path(folder), nfe=2)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / 2 ** (20 if sys.platform == "darwin" else 10)


def start() -> float:
    """Seconds of a process that imports everything and loads the model, and does nothing."""
    code = "from posteriori.batch import load_model; load_model('photo', precision='auto')"
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


def _spread(values: Sequence[float], scale: float = 1.0, digits: int = 2) -> str:
    middle, low, high = (scale * v for v in (statistics.median(values), min(values), max(values)))
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown of all rows."""
    memory = {tuple(r[k] for k in ("task", "size", "samples", "precision")): r["mib"] for r in rows if "mib" in r}
    lines = []
    for r in (r for r in rows if r["kind"] == "time"):
        what = f"{r['samples']} samples" if r["samples"] else "mean"
        for name in PRECISIONS:
            found = r[name]
            mib = memory.get((r["task"], r["size"], r["samples"], name))
            lines.append(
                [r["task"], f"{r['size']}x{r['size']}", what, r["threads"], name, r["turns"], _spread(found["seconds"]),
                 _spread(found["outside"], 100, 1), "" if mib is None else f"{mib:.0f}"]
            )  # fmt: skip
    header = ["task", "photo", "what", "threads", "network", "turns", "seconds", "outside, %", "peak, MiB"]
    starts = [f"{_spread(r['seconds'])} s with {r['threads']} thread{'s' * (r['threads'] > 1)}"
              for r in rows if r["kind"] == "start"]  # fmt: skip
    loading = f"\n\nBefore it, imports and the model: {'; '.join(starts)}." if starts else ""
    return markdown_table(header, lines, 5) + loading


def insert(text: str, generated: str) -> str:
    """The document with what stands between its marks replaced.

    Raises:
        ValueError: when a mark is missing.
    """
    first, second = MARKS
    before, found, rest = text.partition(first)
    _, closed, after = rest.partition(second)
    if not found or not closed:
        raise ValueError(f"the document has no {first} and {second} to write between: add both")
    return f"{before}{first}\n{generated}\n{second}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        "python -m posteriori.bench.restore_speed", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("what", choices=("time", "memory", "start", "report", "alone"))
    parser.add_argument("case", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="cases whose name, as in sr-256-8, contains this")
    parser.add_argument("--turns", type=int, help="of each precision, in place of the case's own")
    parser.add_argument("--out", type=Path, help="JSON lines")
    parser.add_argument("--document", type=Path, help="write the table there")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the command does
    if args.what == "alone":
        precision, task, size, samples = args.case
        say(str(alone(precision, task, int(size), int(samples))))
        return 0
    if args.out is None:
        parser.error("where do the rows go? give --out FILE")
    results = Results(args.out, ("kind", "task", "size", "samples", "threads", "precision"))
    cases = [c for c in CASES if args.only in f"{c.task}-{c.size}-{c.samples}"]
    cases = [replace(c, turns=args.turns or c.turns) for c in cases]
    if args.what == "start":
        turns = args.turns or 5
        results.get(lambda: {"seconds": [start() for _ in range(turns)]}, kind="start", threads=args.threads)
    elif args.what == "memory":
        for case in cases:
            for name in PRECISIONS:
                results.get(partial(peak, case, name), kind="memory", precision=name, **case.key)
    elif args.what == "time":
        denoisers = {name: load_model("photo", precision=name) for name in PRECISIONS}
        for case in cases:
            results.get(partial(measure, case, denoisers), kind="time", threads=args.threads, **case.key)
            say(f"measured {case}")
    text = table(results.rows())
    if args.document:
        write_atomically(args.document, insert(args.document.read_text(), text).encode())
    say(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
