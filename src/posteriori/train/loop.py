"""The loop: draw, evaluate, step, average, and now and then write."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from posteriori.checkpoint import save as save_model
from posteriori.data import Counts
from posteriori.denoise import NetworkDenoiser
from posteriori.objective import LossScale, eps_loss
from posteriori.precision import prefers_bfloat16
from posteriori.recipe import Recipe, RecipeError
from posteriori.train.batches import batches, by_shape, open_photos
from posteriori.train.monitor import Monitor, drop_lines_after
from posteriori.train.network import build, card_of, channels_of, choose_trained, merged
from posteriori.train.sheet import Sheets
from posteriori.train.state import Average, RunState, TrainingError, alone_in, cannot_write, whole

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["train"]


def train(
    recipe: Recipe,
    folder: str | Path,
    *,
    resume: bool = False,
    progress: bool | Console = True,
    on_step: Callable[[int, float], None] | None = None,
) -> NetworkDenoiser:
    """Run a recipe to its end.

    Writes ``state.safetensors`` (to resume), ``metrics.jsonl`` (one line per ``log_every`` steps), the averaged weights
    as a loadable model in ``model/`` with every state, sheets of samples in ``sheets/``, and in ``milestones/`` the
    models that are kept for good.

    Args:
        recipe: what to do.
        folder: where to write.
        resume: continue from ``state.safetensors`` when there is one.
        progress: show the progress; a console to show it on.
        on_step: called with the step and its loss after every step.

    Returns:
        The trained denoiser with averaged weights.

    Raises:
        RecipeError: when the network cannot be built, the folder holds a run and ``resume`` is not set, or it holds
            the run of another recipe.
        DataError: when images are missing, or too many cannot be read.
        TrainingError: when the loss is not finite, the folder cannot be written, or another process trains in it; the
            last state is kept.
    """
    with alone_in(Path(folder)):
        return _Run(recipe, Path(folder), resume, progress, on_step).finish()


class _Run:
    """Everything a run holds while it runs."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        resume: bool,
        progress: bool | Console,
        on_step: Callable[[int, float], None] | None,
    ) -> None:
        self.recipe, self.folder, self.on_step = recipe, folder, on_step
        self.metrics = folder / "metrics.jsonl"
        held = (folder / "state.safetensors").exists()
        if held and not resume:
            raise RecipeError(f"{folder} already holds a run: add --resume to continue it, or choose another folder")
        self.accelerator = accelerator = _accelerator(recipe, folder)
        processes, rank = accelerator.num_processes, accelerator.process_index
        if recipe.microbatches % processes:
            raise RecipeError(
                f"microbatches is {recipe.microbatches}, which {processes} processes cannot share equally: "
                f"make it a multiple, for example --set microbatches={processes}"
            )
        self.parts = range(rank, recipe.microbatches, processes)
        self._build()
        self.photos = open_photos(recipe, self.channels)
        self.counts = copy.copy(self.photos.opened)
        self.positions: dict[str, tuple[int, int]] = {}
        self.pending: list[Tensor | float] = []  # losses since the last line of the log
        self.step, self.seconds = 0, 0.0
        self.notes: list[str] = []
        if held:
            self.step, facts, damage = self.state.read()
            self._continue(facts)
            self.notes = [damage] if damage else []
            self.notes += _changes(facts.get("recipe", {}), recipe)
        self.photos.seek(self.positions)
        self.monitor = Monitor(recipe.steps, self.step, progress if accelerator.is_main_process else False)
        self.sheets = self._open_sheets() if recipe.sheet_every and accelerator.is_main_process else None

    def _build(self) -> None:
        from accelerate.utils import set_seed

        recipe, accelerator = self.recipe, self.accelerator
        set_seed(recipe.seed)
        self.denoiser = build(recipe)
        self.channels = channels_of(recipe, self.denoiser)
        self.plain = copy.deepcopy(self.denoiser)  # what is written: without adapters, compilation or shards
        self.denoiser.to(accelerator.device)
        network = self.denoiser.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        trained = choose_trained(network, recipe)
        self.scale = LossScale().to(accelerator.device) if recipe.learned_scale else None
        rules: dict[str, Any] = {"betas": (0.9, 0.99), "weight_decay": recipe.weight_decay, "fused": True}
        optimizer = torch.optim.AdamW(trained.values(), recipe.learning_rate, **rules)
        self.prepared, self.optimizer = accelerator.prepare(network, optimizer)
        self.network = accelerator.unwrap_model(self.prepared, keep_torch_compile=False)
        self.trained = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        self.average = Average(self.trained, recipe.ema, recipe.ema_power)
        everything = dict(self.trained)
        # The level's network is small and on the heels of the other, so ten times faster; it is averaged by hand.
        self.scale_optimizer = None
        if self.scale is not None:
            everything |= {f"loss_scale.{name}": p for name, p in self.scale.named_parameters()}
            self.scale_optimizer = torch.optim.AdamW(self.scale.parameters(), 10 * recipe.learning_rate, **rules)
        optimizers = [o for o in (self.optimizer, self.scale_optimizer) if o is not None]
        self.state = RunState(self.folder, everything, self.average, optimizers, recipe.keep)
        # one graph a crop size: those of sizes left open are refused by inductor (torch 2.13)
        compiled = torch.compile(self.prepared, dynamic=False) if recipe.compile else self.prepared
        self.denoiser.backbone = cast("nn.Module", compiled)
        self.sharded = any(hasattr(p, "full_tensor") for p in self.trained.values())

    def _open_sheets(self) -> Sheets:
        recipe = self.recipe
        if recipe.validation or self.photos.streams:  # reading on would move the lanes of training
            sources = recipe.validation or recipe.sources
            photos = open_photos(replace(recipe, sources=sources, microbatches=1, lanes=1, workers=0), self.channels)
        else:
            photos = self.photos
        return Sheets(recipe, photos, bool(recipe.validation))

    def finish(self) -> NetworkDenoiser:
        recipe, accelerator = self.recipe, self.accelerator
        if accelerator.is_main_process:
            drop_lines_after(self.metrics, self.step)
        if self.step and (accelerator.is_main_process or self.sharded):
            tensors = self.state.collect()
            if accelerator.is_main_process:
                self._export(tensors, self.folder / "model")  # it may have been killed before it wrote this
        self.monitor.headline(self._facts())
        for note in self.notes:
            self.monitor.say(f"note: {note}")
        if recipe.trackers:
            accelerator.init_trackers(recipe.name, config=_flat(asdict(recipe)))
        with self.monitor:
            source = batches(recipe, self.photos, self.step, self.parts)
            began = time.monotonic() - self.seconds
            while self.step < recipe.steps:
                rate = recipe.learning_rate_at(self.step)
                loss, images = self._do_step(source, rate)
                self.step += 1
                self.pending.append(loss)
                if self.on_step:
                    self.on_step(self.step, float(loss))
                if self.monitor.advance(images * accelerator.num_processes):
                    self.monitor.show(self.step, float(loss))
                self.seconds = time.monotonic() - began
                self._now_and_then(rate)
        if recipe.trackers:
            accelerator.end_training()
        return self._with_averages(self.state.collect()).to(accelerator.device).eval()

    def _do_step(self, source: Any, rate: float) -> tuple[Tensor, int]:
        """One step: its loss over the microbatches of this process, and their images."""
        recipe, accelerator = self.recipe, self.accelerator
        total, images = torch.zeros((), device=accelerator.device), 0
        for k, part in enumerate(self.parts):
            batch = next(source)
            torch.manual_seed(_seed(recipe.seed, self.step, part))  # after the loader, which draws a number itself
            self.counts.add(batch.counts)
            self.positions |= batch.positions
            problems = [replace(p, x_0=p.x_0.to(accelerator.device)) for p in batch.problems]
            count = sum(p.x_0.shape[0] for p in problems)
            groups = by_shape(problems)
            for j, group in enumerate(groups):
                last = k == len(self.parts) - 1 and j == len(groups) - 1  # processes meet once a step
                with nullcontext() if last else accelerator.no_sync(self.prepared):
                    loss, each = eps_loss(self.denoiser, group, recipe.noise, scale=self.scale, weight=recipe.weight)
                    accelerator.backward(loss * (len(each) / count / len(self.parts)))
                total += each.sum() / count / len(self.parts)
            images += count
        self.counts.check(recipe.corrupt)
        if recipe.clip:
            accelerator.clip_grad_norm_(self.trained.values(), recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scale_optimizer is not None:
            self._step_scale(10 * rate)
        self.average.update(self.step)
        return total, images

    def _step_scale(self, rate: float) -> None:
        assert self.scale is not None
        assert self.scale_optimizer is not None
        if self.accelerator.num_processes > 1:
            for p in self.scale.parameters():
                p.grad = cast("Tensor", self.accelerator.reduce(p.grad, "mean"))
        self.scale_optimizer.param_groups[0]["lr"] = rate
        self.scale_optimizer.step()
        self.scale_optimizer.zero_grad()

    def _now_and_then(self, rate: float) -> None:
        """Draw a sheet, log, save, when it is time. A line is logged before the state that knows of it is written."""
        recipe, step, end = self.recipe, self.step, self.step == self.recipe.steps
        logs, saves = step % recipe.log_every == 0 or end, step % recipe.save_every == 0 or end
        draws = bool(recipe.sheet_every) and (step % recipe.sheet_every == 0 or (end and step > recipe.sheet_every))
        milestone = bool(recipe.milestones) and step % recipe.milestones == 0
        if not (logs or saves or draws or milestone):
            return
        self._gather()
        row: dict[str, Any] = {}
        main = self.accelerator.is_main_process
        writes = (saves or draws or milestone) and (main or self.sharded)
        tensors = self.state.collect() if writes else {}
        if main and draws:
            row = self._draw(tensors)
        if logs:
            row = {
                "step": step,
                "loss": sum(float(v) for v in self.pending) / len(self.pending),
                "lr": rate,
                "seconds": round(self.seconds, 2),
                "images_per_second": round(self.monitor.rate, 2),
                **row,
            }
            row |= {"skipped": self.counts.skipped} if self.counts.skipped else {}
            self.pending.clear()
        if main:
            if logs:
                self._log(row)
            if saves:
                self.state.write(tensors, step, self._facts_to_keep())
                self._export(tensors, self.folder / "model")
            if milestone:
                self._export(tensors, self.folder / "milestones" / f"step-{step:08d}")

    def _gather(self) -> None:
        """Make what is about to be written that of all processes."""
        fresh = [loss for loss in self.pending if isinstance(loss, Tensor)]
        accelerator = self.accelerator
        if fresh:
            values = torch.stack(fresh)
            values = cast("Tensor", accelerator.reduce(values, "mean")) if accelerator.num_processes > 1 else values
            self.pending = [*(v for v in self.pending if isinstance(v, float)), *values.tolist()]
        if not all(math.isfinite(v) for v in self.pending):
            raise TrainingError(
                f"the loss is not finite at step {self.step} or shortly before; the run is kept up to step "
                f"{self.state.last}: lower learning_rate, then add --resume"
            )
        if self.photos.streams and accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            for positions in gather_object([self.positions]):
                self.positions |= positions

    def _log(self, row: dict[str, Any]) -> None:
        try:
            self.monitor.log(self.metrics, row)
        except OSError as error:
            raise cannot_write(self.metrics, error, self.state.last) from None
        if self.recipe.trackers:
            self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def _draw(self, tensors: dict[str, Tensor]) -> dict[str, float]:
        assert self.sheets is not None
        model = self._with_averages(tensors).to(self.accelerator.device).eval()
        try:
            self.sheets.write(model, self.step, self.folder)
        except OSError as error:
            raise cannot_write(self.folder / "sheets", error, self.state.last) from None
        loss = self.sheets.loss(model)
        model.cpu()
        return {"validation_loss": loss}

    def _with_averages(self, tensors: dict[str, Tensor]) -> NetworkDenoiser:
        """The plain denoiser with the averaged weights of :meth:`RunState.collect`."""
        averages = {k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")}
        rest = {k: v for k, v in self.network.state_dict().items() if k not in averages}
        state = merged({k: whole(v.detach()).cpu() for k, v in rest.items()} | averages)
        self.plain.backbone.load_state_dict(state)
        return self.plain

    def _export(self, tensors: dict[str, Tensor], folder: Path) -> None:
        try:
            save_model(
                self._with_averages(tensors), folder, card_of(self.recipe, self.step, self.plain), torch.bfloat16
            )
        except (OSError, SafetensorError) as error:
            raise cannot_write(folder, error, self.state.last) from None

    def _facts_to_keep(self) -> dict[str, Any]:
        return {
            "recipe": asdict(self.recipe), "positions": self.positions, "counts": asdict(self.counts),
            "pending": self.pending, "seconds": self.seconds,
        }  # fmt: skip

    def _continue(self, facts: dict[str, Any]) -> None:
        self.positions = {k: (int(v[0]), int(v[1])) for k, v in facts.get("positions", {}).items()}
        self.pending = list(facts.get("pending", []))
        self.seconds = float(facts.get("seconds", 0.0))
        if "counts" in facts:
            self.counts = Counts(**facts["counts"])

    def _facts(self) -> dict[str, str]:
        """The headline."""
        recipe, accelerator = self.recipe, self.accelerator
        size, moving = (
            sum(p.numel() for p in ps) / 1e6 for ps in (self.plain.backbone.parameters(), self.trained.values())
        )
        start = recipe.base.get("source") or recipe.init or "random weights"
        kinds = ", ".join(f"{c.batch} of {c.size}x{c.size}" for c in recipe.crops)
        skipped = f", {self.photos.opened.skipped} skipped as unreadable" if self.photos.opened.skipped else ""
        images = f"{len(self.photos):,} images" if len(self.photos) else ""
        streamed = "streamed shards" if self.photos.streams else ""
        low, high = recipe.tasks.sigma_y
        return {
            "recipe": f"{recipe.name}: {self.step} of {recipe.steps} steps done, from {start}",
            "network": f"{size:.2f} M parameters, {moving:.2f} M trained; {recipe.preconditioning}",
            "tasks": f"{', '.join(recipe.tasks.shares)}; sigma_y {low:g} to {high:g} in [-1, 1] = "
            f"{low * 127.5:.3g} to {high * 127.5:.3g} in 0-255",
            "data": f"{' and '.join(filter(None, (images, streamed)))}{skipped}",
            "a step": f"{recipe.microbatches} x ({kinds})",
            "machine": f"{accelerator.num_processes} x {accelerator.device.type}, "
            f"{'bfloat16' if accelerator.mixed_precision == 'bf16' else 'float32'}"
            f"{', compiled' if recipe.compile else ''}, {torch.get_num_threads()} threads",
            "output": str(self.folder),
        }


def _accelerator(recipe: Recipe, folder: Path) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.tracking import get_available_trackers

    wrong = set(recipe.trackers) - {str(t) for t in get_available_trackers()}
    if wrong:
        raise RecipeError(f"trackers: {', '.join(sorted(wrong))} cannot be used here: pip install it, or leave it out")
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    precision = recipe.mixed_precision
    if precision == "auto":
        precision = "bf16" if prefers_bfloat16(PartialState().device) else "no"
    return Accelerator(mixed_precision=precision, log_with=recipe.trackers or None, project_dir=str(folder))


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as trackers take them."""
    if isinstance(content, dict) and content:
        return {k: v for key, value in content.items() for k, v in _flat(value, f"{prefix}{key}.").items()}
    plain = isinstance(content, int | float | str | bool)
    return {prefix.rstrip("."): content if plain else str(content)}


# Keys that do not change what a run computes.
_FREE = {"data", "save_every", "log_every", "sheet_every", "validation", "keep", "milestones", "trackers", "workers"}


def _changes(before: dict[str, Any], recipe: Recipe) -> list[str]:
    """Notes on a recipe that is not the one the run began with."""
    now = json.loads(json.dumps(asdict(recipe)))
    return [
        f"the run began with {key} = {before[key]!r}, it goes on with {now[key]!r}"
        for key in now
        if key in before and key not in _FREE and before[key] != now[key]
    ]
