"""What a run is between two steps, and how it reaches the disk: whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from posteriori.recipe import RecipeError

__all__ = ["Average", "RunState", "TrainingError", "alone_in", "cannot_write", "whole"]


class TrainingError(ValueError):
    """A run that cannot go on: why, what is safe, and what to try."""


def cannot_write(path: Path, error: Exception, last: int) -> TrainingError:
    """The error of a full disk or a folder that cannot be written."""
    reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())[:200]
    kept = f"the run is kept up to step {last}: " if last else ""
    return TrainingError(f"cannot write {path} ({reason}); {kept}make room or choose another output, then add --resume")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a run's folder: two processes that train in one write over each other's states. (Of a run by several
    processes the first holds it; where the system has no such locks, nobody does.)

    Raises:
        TrainingError: when another process holds it, or the folder cannot be written.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY)  # the folder itself is locked: nothing is left behind
    except OSError as error:
        raise cannot_write(folder, error, 0) from None
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(f"another process is training in {folder}: stop it first, or choose another") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(held)


def whole(value: Tensor) -> Tensor:
    """A tensor that may be sharded between processes, as a whole; all of them have to ask."""
    full = getattr(value, "full_tensor", None)
    return full() if full is not None else value


class Average:
    """Exponential moving average of the weights.

    Step ``n`` (from 0) decays by ``min(decay, 1 - (1 + n)^-power)``, so that the average forgets where it started;
    ``power = 0`` is the constant ``decay``.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float, power: float) -> None:
        self.parameters, self.decay, self.power = parameters, decay, power
        self.values = {name: p.detach().clone() for name, p in parameters.items()}

    def decay_at(self, step: int) -> float:
        """Decay of step ``step``."""
        return min(self.decay, 1 - (1 + step) ** -self.power) if self.power else self.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the weights after step ``step``."""
        weights = [p.detach() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.values.values()), weights, 1 - self.decay_at(step))


class RunState:
    """``state.safetensors`` of a run: weights, their average, the optimizers' moments, the step, and what else has to
    be known to go on.

    Args:
        folder: of the run.
        parameters: all that is trained, by name.
        average: of the network's.
        optimizers: that hold their moments.
        keep: how many states are kept; the older ones are ``state-00001000.safetensors`` and so on.
    """

    def __init__(
        self,
        folder: Path,
        parameters: dict[str, nn.Parameter],
        average: Average,
        optimizers: list[torch.optim.Optimizer],
        keep: int = 1,
    ) -> None:
        self.path = folder / "state.safetensors"
        self.parameters, self.average, self.optimizers, self.keep = parameters, average, optimizers, keep
        self.last = 0  # step of the newest state on the disk

    def collect(self) -> dict[str, Tensor]:
        """All tensors, whole and on the CPU."""
        tensors = {f"ema.{name}": average for name, average in self.average.values.items()}
        for name, parameter in self.parameters.items():
            tensors[f"weights.{name}"] = parameter.detach()
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
        # clone: parameters may share or stride their storage (channels_last), which safetensors refuses
        return {k: whole(v).cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}

    def write(self, tensors: dict[str, Tensor], step: int, facts: dict[str, Any]) -> None:
        """Replace the state on the disk.

        Raises:
            TrainingError: when it cannot be written; the last one is then untouched.
        """
        temporary = self.path.with_name(f".{self.path.name}.partial")
        try:
            save_file(tensors, temporary, metadata={"step": str(step), "run": json.dumps(facts)})
            with temporary.open("rb") as written:
                os.fsync(written.fileno())  # a rename must not reach the disk before the content
            temporary.replace(self.path)
            self.last = step
            self._retain(step)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise cannot_write(self.path, error, self.last) from None

    def _retain(self, step: int) -> None:
        if self.keep == 1:
            return
        named = self.path.with_name(f"state-{step:08d}.safetensors")
        named.unlink(missing_ok=True)
        os.link(self.path, named)
        for old in self._older()[self.keep :]:
            old.unlink(missing_ok=True)

    def _older(self) -> list[Path]:
        return sorted(self.path.parent.glob("state-*.safetensors"), reverse=True)

    def read(self) -> tuple[int, dict[str, Any], str]:
        """Continue from the disk: the step, the facts written with it, and what was wrong with newer states.

        Raises:
            RecipeError: when it is the run of another recipe.
            TrainingError: when no state can be read.
        """
        damage = ""
        for path in [self.path, *self._older()]:
            try:
                tensors = load_file(path)
                with safe_open(path, "pt") as opened:
                    metadata = opened.metadata()
                step, facts = int(metadata["step"]), json.loads(metadata.get("run", "{}"))
            except (OSError, SafetensorError, KeyError, ValueError) as error:
                damage = damage or f"{path} cannot be read ({' '.join(str(error).split())[:100]})"
                continue
            try:
                self._load(tensors)
            except (KeyError, RuntimeError):
                raise RecipeError(f"{path} is not a run of this recipe: choose another folder") from None
            self.last = step
            return step, facts, damage
        raise TrainingError(f"{damage}: start again in another folder")

    @torch.no_grad()
    def _load(self, tensors: dict[str, Tensor]) -> None:
        if {k for k in tensors if k.startswith("weights.")} != {f"weights.{name}" for name in self.parameters}:
            raise KeyError("other parameters")
        for name, average in self.average.values.items():
            _fill(average, tensors[f"ema.{name}"])
        for name, parameter in self.parameters.items():
            _fill(parameter, tensors[f"weights.{name}"])
            optimizer = next(
                o for o in self.optimizers if any(parameter is p for g in o.param_groups for p in g["params"])
            )
            state = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors[f"optimizer.{key}.{name}"].to(parameter.device)
                state[key] = value if key == "step" else _fill(torch.empty_like(parameter), value)
            optimizer.state[parameter] = state


def _fill(target: Tensor, value: Tensor) -> Tensor:
    if hasattr(target, "full_tensor"):  # sharded: every process takes its part
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)  # type: ignore[attr-defined]
    return target.copy_(value)
