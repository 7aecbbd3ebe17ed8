"""Runs that are killed, or cannot write: nothing is lost, and nothing changes.

A child process, forked from this one so that it starts at once, trains; SIGKILL ends it.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import posteriori as po
import posteriori.train.state as state_module
from posteriori.data import DataError
from posteriori.train import Recipe, RecipeError, TrainingError, load_recipe, train
from tiny_data import png, write_shard

STEPS = 30


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Two microbatches a step, from streamed shards and an array, so that every kind of position matters."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for shard in range(2):
        files = {f"{i}.png": png(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for i in range(30)}
        write_shard(folder / f"{shard}.tar", {**files, "broken.png": b"no picture"})
    np.save(folder / "a.npy", rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8))
    (folder / "recipe.yaml").write_text(f"""
name: tiny
data: {folder}
sources: [{{shards: "*.tar"}}, {{array: a.npy}}]
corrupt: 0.2
network: {{kind: photo, channels: [8], blocks: [1], embedding: 8}}
tasks: {{shares: {{none: 1, inpaint: 2}}}}
crops: [{{size: 8, batch: 4}}]
steps: {STEPS}
microbatches: 2
lanes: 2
mixed_precision: "no"
save_every: 3
log_every: 5
sheet_every: 0
keep: 2
""")
    return load_recipe(folder / "recipe.yaml")


@pytest.fixture(scope="module")
def uninterrupted(plan: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(plan, folder, progress=False)
    return folder


def step_of(folder: Path) -> int:
    with safe_open(folder / "state.safetensors", "pt") as opened:
        return int(opened.metadata()["step"])


def same_end(run: Path, other: Path) -> None:
    """Weights, averages, moments, exported model and log are those of the other run, to the bit."""
    a, b = load_file(run / "state.safetensors"), load_file(other / "state.safetensors")
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    assert (run / "model" / "model.safetensors").read_bytes() == (other / "model" / "model.safetensors").read_bytes()
    kept = ("step", "loss", "lr", "skipped")
    logs = [
        [{k: r.get(k) for k in kept} for r in map(json.loads, (f / "metrics.jsonl").read_text().splitlines())]
        for f in (run, other)
    ]
    assert logs[0] == logs[1]
    po.load(run / "model")


def fork(work: Callable[[Callable[[str], None]], None]) -> tuple[int, int]:
    """Run ``work`` in a child; returns its process id and a pipe of what it says."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            work(lambda word: os.write(writer, word.encode() + b"\n") and None)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    return child, reader


@contextmanager
def trained_in_a_child(plan: Recipe, run: Path, where: str = "") -> Iterator[tuple[int, int]]:
    """A child that trains; with ``where`` it says so and stops in the middle of a write of that kind."""

    def work(say: Callable[[str], None]) -> None:
        write = state_module.save_file

        def half(tensors: Any, path: Path, metadata: Any = None) -> None:
            write(tensors, path, metadata)
            if where == "state" and int(metadata["step"]) >= 9:
                with Path(path).open("r+b") as file:
                    file.truncate(Path(path).stat().st_size // 2)
                say("writing")
                time.sleep(60)

        state_module.save_file = half
        if where == "model":
            import posteriori.train.loop as loop

            export = loop.save_model

            def stop(*arguments: Any) -> None:
                export(*arguments)
                if step_of(run) >= 9:
                    (run / "model" / "model.json").write_text('{"half')
                    say("writing")
                    time.sleep(60)

            loop.save_model = stop
        train(plan, run, resume=True, progress=False, on_step=lambda step, loss: say(str(step)))

    child, reader = fork(work)
    try:
        yield child, reader
    finally:
        os.close(reader)


@pytest.mark.slow
def test_killed_at_random_moments(plan: Recipe, tmp_path: Path, uninterrupted: Path) -> None:
    """A machine that goes away at a bad moment would leave a run that cannot be continued, or ends with other weights.

    The process is killed again and again, up to a tenth of the whole run's time after its first step, until a child
    reaches the end; at least six kills must have hit it before.
    """
    whole = json.loads((uninterrupted / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    rng, kills = np.random.default_rng(0), 0
    run = tmp_path / "run"
    for _ in range(60):
        with trained_in_a_child(plan, run) as (child, reader):
            os.read(reader, 1)  # it has begun
            end = time.monotonic() + (float(rng.uniform(0, whole / 10)) if kills < 12 else 300)
            done, status = 0, 0
            while not done and time.monotonic() < end:
                done, status = os.waitpid(child, os.WNOHANG)
                time.sleep(0.005)
            if not done:
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        kills += 1
    assert kills >= 6
    same_end(run, uninterrupted)


@pytest.mark.parametrize("where", ["state", "model"])
def test_killed_while_writing(plan: Recipe, tmp_path: Path, uninterrupted: Path, where: str) -> None:
    """Half a checkpoint would replace a whole one, or half a model stay beside a newer state."""
    run = tmp_path / "run"
    with trained_in_a_child(plan, run, where) as (child, reader):
        said = b""
        while b"writing" not in said:
            said += os.read(reader, 1000)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert step_of(run) == (6 if where == "state" else 9)
    train(plan, run, resume=True, progress=False)
    same_end(run, uninterrupted)
    assert not list(run.glob(".*"))


def test_full_disk_leaves_the_last_state(
    plan: Recipe, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk would destroy the checkpoint that it was to replace, or end in a traceback: the system's own limit on
    the size of files, and the error of a full disk, at the second save."""
    run = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(step: int, loss: float) -> None:
        if step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    try:
        with pytest.raises(TrainingError, match=r"cannot write .*state.safetensors \(.*File too large.*up to step 3"):
            train(plan, run, progress=False, on_step=limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert step_of(run) == 3
    assert not list(run.glob(".*"))
    write = state_module.save_file

    def full(tensors: Any, path: Path, metadata: Any = None) -> None:
        if int(metadata["step"]) == 12:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(tensors, path, metadata)

    monkeypatch.setattr(state_module, "save_file", full)
    with pytest.raises(TrainingError, match=r"No space left on device.*up to step 9: make room .* --resume"):
        train(plan, run, resume=True, progress=False)
    assert step_of(run) == 9
    monkeypatch.undo()
    train(plan, run, resume=True, progress=False)
    same_end(run, uninterrupted)


def test_folders_that_cannot_be_written(plan: Recipe, tmp_path: Path) -> None:
    """A traceback after the data have been read, instead of a line before."""
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"cannot write .*file/run .*choose another output"):
        train(plan, tmp_path / "file" / "run", progress=False)


def test_states_are_kept_and_stand_in(plan: Recipe, tmp_path: Path, uninterrupted: Path) -> None:
    """``keep: 2`` keeps one, or all; a damaged state ends a run although an older one is there. The run goes on from
    the older state to the same end, and says so."""
    kept = [f.name for f in sorted(uninterrupted.glob("state*"))]
    assert kept == [f"state-{s:08d}.safetensors" for s in (STEPS - 3, STEPS)] + ["state.safetensors"]
    run = tmp_path / "run"
    run.mkdir()
    for name in (kept[0], "metrics.jsonl"):
        (run / name).write_bytes((uninterrupted / name).read_bytes())
    (run / "state.safetensors").write_bytes(b"damaged")
    steps: list[int] = []
    train(plan, run, resume=True, progress=False, on_step=lambda step, loss: steps.append(step))
    assert steps == list(range(STEPS - 2, STEPS + 1))
    same_end(run, uninterrupted)
    (run / kept[0]).unlink()
    (run / kept[1]).unlink()
    (run / "state.safetensors").write_bytes(b"damaged")
    with pytest.raises(TrainingError, match=r"state.safetensors cannot be read"):
        train(plan, run, resume=True, progress=False)


def test_too_many_broken_samples_end_a_run(plan: Recipe, tmp_path: Path) -> None:
    """A run would go on with a tenth of its data: 2 of 62 pictures in the shards are broken, and 1 % may be."""
    with pytest.raises(DataError, match=r"samples cannot be read, the first: .*broken"):
        train(replace(plan, corrupt=0.01), tmp_path / "run", progress=False)
    with pytest.raises(RecipeError, match=r"microbatches"):
        replace(plan, microbatches=0)


def test_losses_that_are_not_finite_end_a_run(plan: Recipe, tmp_path: Path) -> None:
    """NaN would be saved over the last good state."""
    run = tmp_path / "run"
    broken = replace(plan, learning_rate=float("inf"), warmup=5)

    def stop(step: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(plan, run, progress=False, on_step=stop)
    state = (run / "state.safetensors").read_bytes() if (run / "state.safetensors").exists() else b""
    with pytest.raises(TrainingError, match=r"loss is not finite.*lower learning_rate"):
        train(broken, run, resume=True, progress=False)
    assert (run / "state.safetensors").read_bytes() == state if state else not (run / "state.safetensors").exists()


def test_one_process_trains_in_a_folder(plan: Recipe, tmp_path: Path, uninterrupted: Path) -> None:
    """Two runs of one command would write over each other's states. The second stops in one line, what the first
    writes is what it would have been alone, and when it is gone the folder is free."""
    run = tmp_path / "run"
    with trained_in_a_child(plan, run, "state") as (child, reader):
        said = b""
        while b"writing" not in said:  # and stopped there
            said += os.read(reader, 1000)
        before = {p.name: p.read_bytes() for p in run.glob("*") if p.is_file()}
        with pytest.raises(TrainingError, match=f"another process is training in {run}"):
            train(plan, run, resume=True, progress=False)
        assert {p.name: p.read_bytes() for p in run.glob("*") if p.is_file()} == before
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    train(plan, run, resume=True, progress=False)
    same_end(run, uninterrupted)
