r"""What a method costs: its seconds over those of sampling the bare network, at the same number of evaluations.

    python -m posteriori.bench.cost --out runs/cost --document docs/results/cost.md [--paper FILE] \
        [--network unet | --model PATH]

The denominator is the least that a sampler of this network can cost (:func:`unconditional`): EDM's loop in its scalar
form, ``D(u; q) = c_skip(q) u + c_out(q) F(c_in(q) u, c_noise(q))``, no operator anywhere, Euler steps (Heun's for a
method that takes Heun's), as many evaluations as the method spent, the same batch. It and the method take turns,
A B A B ...; a row is one such pair, and what is reported is the median of the rows' ratios. So a machine that slows
down slows both. What a sampler does once, before its first evaluation, weighs more the fewer the evaluations are.

Seconds on a CPU are those of the process, which other programs do not add to; on a GPU they are seconds of the clock,
read when the device is done. On a CPU the seconds within the network are known too: what a sampler spends beside its
network is then measured without the scatter of the network's own time.

``eps`` and ``palette`` are timed as samplers, without the posterior mean that their entries in
:data:`posteriori.methods.METHODS` add at the price of one more evaluation.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posteriori.backbones.cards import build_denoiser
from posteriori.backbones.unet import UNetBackbone
from posteriori.bench.common import say
from posteriori.bench.cost_report import write_report
from posteriori.bench.images_problems import digest, make_problem
from posteriori.bench.images_recipe import Task, standard_tasks
from posteriori.bench.runner import Row, Rows, versions
from posteriori.checkpoint import load
from posteriori.denoise import Conditioning, NetworkDenoiser
from posteriori.methods.base import METHODS
from posteriori.operators import Blur, LinearOperator, Nothing, motion_kernel
from posteriori.pivot import measure
from posteriori.posterior import ExactPosterior
from posteriori.sample import Solver, State, euler, evaluations_for, heun, sample, steps_for

__all__ = ["NETWORKS", "Contest", "in_turn", "main", "small_model", "unconditional"]

#: ``photo``: that of the 32-pixel recipes, without its second look, for which the bare sampler has no use. ``unet``: a
#: diffusers U-Net, that of the 64-pixel recipes at widths for 32 pixels, which takes twice the time; as in the paper it
#: is given the pivot and the measurement, and no smooth estimate that would have to be solved for.
NETWORKS: dict[str, dict[str, Any]] = {
    "photo": {
        "kind": "photo", "image_channels": 3, "channels": [64, 96, 128, 160], "blocks": [2, 2, 2, 2], "embedding": 256,
        "smooth_input": True,
    },
    "unet": {
        "kind": "unet2d", "image_channels": 3, "conditioned": True, "sample_size": 32,
        "block_out_channels": [32, 64, 128], "layers_per_block": 1, "norm_num_groups": 16, "attention_head_dim": 32,
        "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    },
}  # fmt: skip
SOLVERS: tuple[Solver, ...] = ("exponential", "euler", "heun")
TASKS = ("random", "box", "sr4", "gaussian", "motion")
ITERATIVE = "motion-zero"
Clock = Callable[[], float]


def small_model(network: str = "photo") -> NetworkDenoiser:
    """One of :data:`NETWORKS` with random weights: what it costs does not depend on them."""
    card = {
        "network": NETWORKS[network], "schedule": {"kind": "VE"}, "scaling": {"kind": "edm", "data_std": 0.5},
        "preconditioning": "spectral", "sigma_y_range": None,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_denoiser(card).eval().requires_grad_(False)


def nothing_told(like: Tensor, sigma_y: float, smooth: bool = False) -> Conditioning:
    """Constant inputs where a network has inputs for a measurement; ``smooth``: and one for the smooth estimate."""
    zeros = torch.zeros_like(like)
    told = like.new_full((len(like),), sigma_y)
    return Conditioning(zeros, torch.ones_like(like), told, smooth=zeros if smooth else None)


@torch.no_grad()
def unconditional(
    denoiser: NetworkDenoiser, like: Tensor, evaluations: int, solver: Solver, sigma_y: float = 0.05
) -> Tensor:
    """Samples of a network alone: see the module's head.

    Args:
        denoiser: the network and its scalars.
        like: gives the samples' shape ``(B, *signal)``, precision and device.
        evaluations: of the network; for Heun's method an odd number.
        solver: ``"heun"``, or anything else for Euler's.
        sigma_y: what an input for it is told.
    """
    schedule, c, told = denoiser.schedule, denoiser.scaling, nothing_told(like, sigma_y, denoiser.smooth_input)

    def mean(u: Tensor, q: float) -> Tensor:
        level = torch.tensor(q, dtype=torch.float64)
        label = denoiser.c_noise(level).to(u).expand(len(u))
        d = float(c.skip(level)) * u + float(c.out(level)) * denoiser.backbone(float(c.input(level)) * u, label, told)
        return d if denoiser.clip is None else d.clamp(-denoiser.clip, denoiser.clip)

    ratios = schedule.ratio(schedule.grid(steps_for(solver, evaluations))).tolist()
    state = State(torch.randn_like(like) * ratios[0], ratios[0])
    for q in ratios[1:]:
        state = (heun if solver == "heun" else euler)(state, q, mean, lambda: like)
    return state.u


@dataclass(frozen=True)
class Contest:
    """A method on a task.

    Attributes:
        method: a name of :data:`METHODS`; ``unconditional`` is our own sampler with nothing measured, ``network`` as
            many bare evaluations of the network, ``inputs`` the same against one without inputs for a measurement.
        solver: of methods that have one to choose.
        task: one of :data:`TASKS`, :data:`ITERATIVE`, or empty where nothing is measured.
    """

    method: str
    solver: str
    task: str

    def __str__(self) -> str:
        return " ".join(filter(None, (self.method, self.solver, self.task)))

    def key(self, setting: Row, turn: int) -> Row:
        """Of the row of a turn."""
        return {**setting, "method": self.method, "solver": self.solver, "task": self.task, "turn": turn}

    def chosen(self, methods: Sequence[str], tasks: Sequence[str]) -> bool:
        """Whether it is among these, empty for all; without a task it goes with all of them."""
        return (not methods or self.method in methods) and (not tasks or self.task in (*tasks, ""))

    def operator(self, like: Tensor, sigma_y: float) -> tuple[LinearOperator, Tensor]:
        """The task's operator and the measurements of random images of the shape of ``like``."""
        x_0 = (torch.rand(like.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(like)
        if not self.task:
            return Nothing(), torch.zeros_like(x_0)
        if self.task != ITERATIVE:
            problem = make_problem(standard_tasks()[self.task], self.task, x_0, 0, sigma_y, seed=0)
            return problem.A, problem.y
        size = like.shape[-1]
        A = Blur(motion_kernel(min(61, size - 1 + size % 2), Task("motion").intensity), "zero")
        return A, measure(A, x_0, sigma_y, seed=0)

    def prepare(
        self, denoiser: NetworkDenoiser, like: Tensor, nfe: int, sigma_y: float
    ) -> tuple[Callable[[], object], Callable[[], object], Row]:
        """The method, which has run once, what it is compared with, and what is known of them.

        Raises:
            ValueError: when the method does not fit the operator.
        """
        if self.method in ("network", "inputs"):
            alone = partial(_evaluate, denoiser.backbone, like, nfe, sigma_y)
            other = (
                partial(unconditional, denoiser, like, nfe, "euler", sigma_y)
                if self.method == "network"
                else partial(_evaluate, _without_inputs(denoiser).to(like.device), like, nfe, sigma_y)
            )
            alone()
            return alone, other, {"evaluations": nfe, "backward": 0}
        A, y = self.operator(like, sigma_y)
        network: NetworkDenoiser = denoiser
        if self.method == "palette":
            network = NetworkDenoiser(
                denoiser.backbone, denoiser.schedule, denoiser.scaling, "palette", denoiser.c_noise,
                denoiser.sigma_y_range, denoiser.clip,
            )  # fmt: skip
        # made anew for every turn: what is solved for once a measurement would be paid for in none
        posed = partial(ExactPosterior, network, A, y, sigma_y)
        if self.solver:
            solver: Solver = self.solver  # type: ignore[assignment]

            def run() -> object:
                return sample(posed(), nfe=nfe, solver=solver, batch_size=len(like))

            run()
            spent, backward, settings = evaluations_for(solver, nfe) + network.refines, 0, {}
        else:
            solver, entry = "euler", METHODS[self.method]
            settings = entry.settings(standard_tasks()["motion" if self.task == ITERATIVE else self.task].kind)

            def run() -> object:
                return entry(posed(), nfe=nfe, **settings)

            first = entry(posed(), nfe=nfe, **settings)
            spent, backward = first.evaluations, first.backward
        bare = partial(unconditional, denoiser, like, spent, solver, sigma_y)
        return run, bare, {"evaluations": spent, "backward": backward, "operator": A.solver, "settings": settings}


def _without_inputs(denoiser: NetworkDenoiser) -> UNetBackbone:
    """Its network without inputs for a measurement, with random weights."""
    backbone = denoiser.backbone
    if not (isinstance(backbone, UNetBackbone) and backbone.conditioned):
        raise ValueError("this network cannot be made without its inputs for a measurement")
    plain = UNetBackbone(**{**{k: v for k, v in backbone.config.items() if k != "kind"}, "conditioned": False})
    return plain.eval().requires_grad_(False)


@torch.no_grad()
def _evaluate(network: nn.Module, like: Tensor, count: int, sigma_y: float) -> None:
    told = nothing_told(like, sigma_y, getattr(network, "smooth_input", False))
    label = like.new_zeros(len(like))
    for _ in range(count):
        network(like, label, told)


def contests() -> list[Contest]:
    """All there are."""
    found = [Contest("network", "", ""), Contest("inputs", "", ""), *(Contest("unconditional", s, "") for s in SOLVERS)]
    for name in (n for n, entry in METHODS.items() if entry.nfe):
        solvers = {"eps": SOLVERS, "palette": SOLVERS[:1]}.get(name, ("",))
        found += [Contest(name, s, t) for s in solvers for t in (*TASKS, ITERATIVE)]
    return found


def clock_of(device: str) -> Clock:
    """Seconds: see the module's head."""
    if not device.startswith("cuda"):
        return time.process_time

    def read() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return read


class Stopwatch:
    """Seconds within a network's forward passes."""

    def __init__(self, network: nn.Module, clock: Clock) -> None:
        self._clock, self._began, self._seconds = clock, 0.0, 0.0
        self._hooks = [network.register_forward_pre_hook(self._start), network.register_forward_hook(self._stop)]

    def _start(self, *_: object) -> None:
        self._began = self._clock()

    def _stop(self, *_: object) -> None:
        self._seconds += self._clock() - self._began

    def take(self) -> float:
        """Those since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def remove(self) -> None:
        """Leave the network as it was."""
        for hook in self._hooks:
            hook.remove()


def in_turn(
    runs: Sequence[Callable[[], object]], count: int, clock: Clock, watch: Stopwatch | None = None
) -> Iterator[list[tuple[float, float | None]]]:
    """Seconds of each of ``runs``, one after the other, and those within the network, ``count`` times."""
    for _ in range(count):
        seconds = []
        for run in runs:
            if watch:
                watch.take()
            began = clock()
            run()
            seconds.append((clock() - began, watch.take() if watch else None))
        yield seconds


def turns(contest: Contest, setting: Row, rows: Rows) -> list[Row]:
    """Its rows."""
    found: list[Row] = []
    while (key := contest.key(setting, len(found))) in rows:
        found.append(rows[key])
    return found


def measure_contest(
    contest: Contest, denoiser: NetworkDenoiser, like: Tensor, setting: Row, rows: Rows, count: int, clock: Clock
) -> int:
    """Measure what is missing of ``count`` turns; returns how many. A method that does not fit has one row that says
    why."""
    done = turns(contest, setting, rows)
    missing = range(len(done), count)
    if not missing or (done and "error" in done[0]):
        return 0
    known: Row = {"versions": versions()}
    nfe, sigma_y = setting["nfe"], setting["sigma_y"]
    try:
        run, bare, facts = contest.prepare(denoiser, like, nfe, sigma_y)
    except ValueError as error:
        rows.append(contest.key(setting, 0), {"error": " ".join(str(error).split()), **known})
        return 1
    # on a GPU a look at the clock waits for the device, which costs time of its own
    watch = None if setting["device"].startswith("cuda") else Stopwatch(denoiser.backbone, clock)
    for turn, (own, base) in zip(missing, in_turn((run, bare), len(missing), clock, watch), strict=True):
        times = {"seconds": own[0], "unconditional_seconds": base[0], "ratio": own[0] / base[0]}
        network = {"network_seconds": own[1], "unconditional_network_seconds": base[1]}
        rows.append(contest.key(setting, turn), {**times, **network, **facts, **known})
    if watch:
        watch.remove()
    return len(missing)


def main(arguments: Sequence[str] | None = None, clock: Clock | None = None) -> int:
    """Command line; turns that have a row are not measured again. ``clock`` replaces :func:`clock_of`."""
    parser = argparse.ArgumentParser("python -m posteriori.bench.cost", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="", help="folder or name, in the place of --network")
    parser.add_argument("--network", choices=sorted(NETWORKS), default="photo", help="with random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--alternations", type=int, default=20)
    parser.add_argument("--nfe", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--sigma-y", type=float, default=0.05)
    parser.add_argument("--methods", nargs="+", default=[], help="measure these only")
    parser.add_argument("--tasks", nargs="+", default=[], help="measure these only")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--out", type=Path, required=True, help="folder of the rows")
    parser.add_argument("--document", type=Path, help="Markdown file of the report; report.md in --out when left out")
    parser.add_argument("--paper", type=Path, help="JSON file with a paper's own seconds under the key 'cost'")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    denoiser = load(args.model, args.device) if args.model else small_model(args.network).to(args.device)
    if denoiser.preconditioning != "spectral":
        say("give a model of eps: this one has the preconditioning " + denoiser.preconditioning)
        return 2
    like = torch.randn(args.batch, 3, args.size, args.size, generator=torch.Generator().manual_seed(0)).to(args.device)
    key: Row = {
        "model": args.model or args.network, "weights": digest(denoiser.state_dict().values()), "device": args.device,
        "threads": args.threads, "nfe": args.nfe, "batch": args.batch, "size": args.size, "sigma_y": args.sigma_y,
    }  # fmt: skip
    rows, shown = Rows(args.out / "rows.jsonl"), []
    for contest in contests():
        if contest.chosen(args.methods, args.tasks):
            count = measure_contest(
                contest, denoiser, like, key, rows, args.alternations, clock or clock_of(args.device)
            )
            say(f"{contest}: {count} measured")
        shown += turns(contest, key, rows)
    target = args.document or args.out / "report.md"
    write_report(shown, target, args.paper)
    say(str(target))
    return 0


if __name__ == "__main__":
    sys.exit(main())
