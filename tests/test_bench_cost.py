"""The cost benchmark against a clock that counts what a network does, and binomial tails for the interval."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor, nn

import posteriori as po
from posteriori.backbones.cards import build_denoiser
from posteriori.bench import cost
from posteriori.bench.cost import ITERATIVE, NETWORKS, Contest, Stopwatch, contests, in_turn, main, unconditional
from posteriori.bench.cost_report import median_interval, paper_ratios, write_report
from posteriori.bench.runner import Rows
from posteriori.denoise import Conditioning, NetworkDenoiser
from posteriori.methods.base import METHODS, Estimate
from posteriori.operators import Nothing
from posteriori.pivot import sample_generator
from posteriori.recipe import load_recipe
from posteriori.schedule import VE

ROOT = Path(__file__).resolve().parents[1]


class Work:
    """A clock: it shows the work done by a :class:`Network`."""

    def __init__(self) -> None:
        self.done = 0.0

    def __call__(self) -> float:
        return self.done


class _Worked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, work: Work) -> Tensor:
        ctx.work = work
        work.done += 1
        return 0.1 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.work.done += 2
        return 0.1 * gradient, None


class Network(nn.Module):
    """One unit of work forward, two backward, whatever the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def forward(self, inputs: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        result: Tensor = _Worked.apply(inputs, self.work)
        return result


@pytest.fixture
def denoiser() -> NetworkDenoiser:
    return NetworkDenoiser(Network(), VE())


LIKE = torch.zeros(2, 3, 16, 16)


def ratio(contest: Contest, denoiser: NetworkDenoiser, nfe: int) -> float:
    run, bare, _ = contest.prepare(denoiser, LIKE, nfe, 0.05)
    watch = Stopwatch(denoiser.backbone, denoiser.backbone.work)  # type: ignore[arg-type]
    (((own, inside), (base, all_of_it)),) = in_turn((run, bare), 1, denoiser.backbone.work, watch)  # type: ignore[arg-type]
    assert base == all_of_it
    assert inside == own or own > base  # the network's backward passes are not within its forward ones
    return own / base


@pytest.mark.parametrize(
    ("method", "solver", "expected"),
    [
        ("eps", "exponential", 1), ("eps", "euler", 1), ("eps", "heun", 1), ("palette", "exponential", 1),
        ("network", "", 1), ("ddnm", "", 1), ("daps", "", 1),
        ("mpgd", "", 1), ("diffpir", "", 1), ("zero-shot-pivot", "", 1),
        ("dps", "", 3), ("pigdm", "", 3), ("mmps", "", 9),
    ],
)  # fmt: skip
def test_work_of_a_method_over_that_of_the_sampler(
    method: str, solver: str, expected: int, denoiser: NetworkDenoiser
) -> None:
    # DPS and PiGDM go backward once an evaluation, MMPS four times; 5 is no multiple of DAPS's two a step
    assert ratio(Contest(method, solver, "random"), denoiser, 5) == expected


def test_evaluations_that_a_method_hides_are_seen(denoiser: NetworkDenoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice:
        def __call__(self, posterior: po.ExactPosterior, nfe: int) -> Estimate:
            for _ in range(2 * nfe):
                posterior.denoise(posterior.y, 1.0)
            return Estimate(samples=posterior.y[None], evaluations=nfe)

        def settings(self, task: str) -> dict[str, Any]:
            return {}

    monkeypatch.setitem(METHODS, "twice", Twice())  # type: ignore[arg-type]
    assert ratio(Contest("twice", "", "random"), denoiser, 4) == 2


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_denominator_is_the_unconditional_sampler(solver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Blurred(nn.Module):
        def forward(self, inputs: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
            return (inputs.roll(1, -1) + c_noise.reshape(-1, 1, 1, 1)).tanh()

    denoiser = NetworkDenoiser(Blurred(), VE(), clip=1.0)
    like = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    posterior = po.ExactPosterior(denoiser, Nothing(), like, 0.05)
    expected = po.sample(posterior, nfe=7, seed=0, solver=solver)[0]
    noise = torch.randn(like.shape[1:], generator=sample_generator(0, 0, 0), dtype=like.dtype)[None]
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    torch.testing.assert_close(unconditional(denoiser, like, 7, solver), expected, rtol=1e-6, atol=1e-6)


def test_turns_alternate() -> None:
    order: list[str] = []
    clock = iter(range(0, 1000, 5))
    runs = [lambda: order.append("a"), lambda: order.append("b")]
    assert list(in_turn(runs, 3, lambda: next(clock))) == [[(5, None), (5, None)]] * 3
    assert "".join(order) == "ab" * 3


def test_stopwatch_sees_the_network_alone() -> None:
    network = Network()
    watch = Stopwatch(network, network.work)

    def run() -> None:
        network.work.done += 3
        network(LIKE, torch.zeros(2), None)  # type: ignore[arg-type]

    assert list(in_turn([run], 2, network.work, watch)) == [[(4, 1)]] * 2
    watch.remove()
    run()
    assert watch.take() == 0


def test_every_method_with_a_network_meets_every_task() -> None:
    found = {(c.method, c.task) for c in contests()}
    tasks = ["random", "box", "sr4", "gaussian", "motion", ITERATIVE]
    assert found >= {(name, t) for name, entry in METHODS.items() if entry.nfe for t in tasks}
    assert {c.solver for c in contests() if c.method == "eps"} == {"exponential", "euler", "heun"}
    assert [Contest("eps", "euler", t).operator(LIKE, 0.05)[0].exact for t in tasks] == [True] * 5 + [False]


def test_network_is_that_of_the_recipe() -> None:
    recipe = load_recipe(ROOT / "recipes/lfw-32-eps.yaml")
    assert recipe.network == {**NETWORKS["photo"], "refine": True}
    large = load_recipe(ROOT / "recipes/lfw-64-eps.yaml")
    differs = {k for k, v in large.network.items() if NETWORKS["unet"].get(k) != v}
    assert differs <= {"smooth_input", "sample_size", "block_out_channels", "attention_head_dim"}


def test_a_second_look_is_counted_and_paid_for() -> None:
    """A network that looks twice would be compared with a sampler that has one evaluation less."""
    small = {"channels": [4, 6], "blocks": [1, 1], "embedding": 8}
    card = {
        "network": {**NETWORKS["photo"], **small, "refine": True}, "schedule": {"kind": "VE"},
        "scaling": {"kind": "edm", "data_std": 0.5}, "preconditioning": "spectral", "sigma_y_range": None,
    }  # fmt: skip
    looks_twice = build_denoiser(card).eval().requires_grad_(False)
    run, bare, facts = Contest("eps", "euler", "random").prepare(looks_twice, LIKE, 4, 0.05)
    passes: list[int] = []
    looks_twice.backbone.register_forward_hook(lambda *_: passes.append(1))
    run()
    of_eps = len(passes)
    bare()
    assert (of_eps, len(passes) - of_eps, facts["evaluations"]) == (5, 5, 5)


@pytest.mark.parametrize("n", [6, 7, 20, 21, 100])
def test_interval_of_the_median_by_binomial_tails(n: int) -> None:
    values = np.random.default_rng(n).permutation(n) + 1.0
    k = int(binom.ppf(0.025, n, 0.5))
    low, high, covered = median_interval(values.tolist())
    assert (low, high) == (k, n + 1 - k)
    assert covered == pytest.approx(1 - 2 * binom.cdf(k - 1, n, 0.5))
    assert covered >= 0.95 > 1 - 2 * binom.cdf(k, n, 0.5)


def test_interval_of_the_median_covers_it() -> None:
    draws = np.random.default_rng(0).lognormal(size=(4000, 20))  # skewed: the median is 1
    inside = [low <= 1 <= high for low, high, _ in map(median_interval, draws.tolist())]
    assert np.mean(inside) == pytest.approx(0.9586, abs=4 * (0.9586 * 0.0414 / 4000) ** 0.5)


def test_too_few_values_give_their_range() -> None:
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0, 0.75)
    assert median_interval([3.0]) == (3.0, 3.0, 0.0)


def run(out: Path, count: int, *more: str) -> list[dict[str, Any]]:
    options = ["--out", str(out), "--alternations", str(count), "--nfe", "3", "--batch", "2", "--size", "16", *more]
    assert main(options) == 0
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def test_a_run_continues_and_repeats_no_turn(
    tmp_path: Path, denoiser: NetworkDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "small_model", lambda network: denoiser)
    monkeypatch.setattr(cost, "clock_of", lambda device: denoiser.backbone.work)
    chosen = ("--methods", "eps", "ddnm", "--tasks", "random", ITERATIVE)
    first = run(tmp_path, 2, *chosen)
    # three solvers and ddnm on the mask, three solvers on the blur, which ddnm refuses once
    assert len(first) == 2 * 7 + 1
    assert [r["task"] for r in first if "error" in r] == [ITERATIVE]
    with (tmp_path / "rows.jsonl").open("a") as stream:
        stream.write('{"method": "eps", "se')  # killed while it wrote
    done = denoiser.backbone.work.done  # type: ignore[union-attr]
    second = run(tmp_path, 3, *chosen)
    assert second[: len(first)] == first
    assert len(second) == 3 * 7 + 1
    assert len({r["id"] for r in second}) == len(second)
    # one turn of both sides, and the method once before
    assert denoiser.backbone.work.done - done == 7 * 3 * 3  # type: ignore[union-attr,operator]
    assert run(tmp_path, 3, *chosen) == second
    assert {r["ratio"] for r in second if "ratio" in r} == {1.0}
    other = run(tmp_path, 1, *chosen, "--sigma-y", "0.1")  # another setting: other rows
    assert len(other) == len(second) + 8


def test_report(tmp_path: Path) -> None:
    setting = {"model": "photo", "device": "cpu", "threads": 1, "nfe": 5, "batch": 4, "size": 32}
    rows = Rows(tmp_path / "rows.jsonl")
    shown = []

    def add(method: str, task: str, operator: str, ratios: list[float]) -> None:
        for turn, value in enumerate(ratios):
            key = {**setting, "method": method, "solver": "", "task": task, "turn": turn}
            times = {"seconds": 0.04 * value, "unconditional_seconds": 0.04, "network_seconds": 0.04}
            facts = {"evaluations": 5, "backward": 0, "operator": operator, "versions": {"torch": "2"}}
            shown.append(rows.append(key, {**times, "ratio": value, **facts}))

    add("ddnm", "random", "exact (diagonal)", [1.1, 1.3, 1.2])
    add("ddnm", "sr4", "exact (kronecker-svd)", [1.5, 1.4, 1.6])
    add("eps", ITERATIVE, "cg", [2.0])
    error = {"error": "needs the singular values", "versions": {"torch": "2"}}
    key = {**setting, "method": "ddnm", "solver": "", "task": ITERATIVE, "turn": 0}
    shown.append(rows.append(key, error))
    paper = tmp_path / "paper.json"
    paper.write_text(json.dumps({"cost": {"setting": "x", "EDM (unconditional)": 2.0, "DDNM": 3.0, "EPS": 2.02}}))
    assert paper_ratios(paper) == {"ddnm": 1.5, "eps": 1.01}
    write_report(shown, tmp_path / "cost.md", paper)
    text = (tmp_path / "cost.md").read_text()
    assert "| ddnm | - | 5 | 0 | 1.350 (1.100 to 1.600) | 1.200 to 1.500 | 35.00 % | - | 1.500 |" in text
    assert "| eps | - | 5 | 0 | - | - | - | 2.000 (2.000 to 2.000) | 1.010 |" in text
    assert "| ddnm | - | sr4 | direct | 5 | 0 | 15.0 | 10.0 | 3 | 1.500 (1.400 to 1.600) | 50.00 % | 1.500 |" in text
    assert f"| ddnm | - | {ITERATIVE} | refused |" in text
    with (tmp_path / "cost.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert [(r["method"], r["task"], r["ratio"]) for r in table] == [
        ("ddnm", "random", "1.2"), ("ddnm", "sr4", "1.5"), ("eps", ITERATIVE, "2"),
    ]  # fmt: skip
    assert float(table[1]["seconds_per_image"]) == pytest.approx(0.015)


def test_a_paper_without_its_sampler_is_refused(tmp_path: Path) -> None:
    paper = tmp_path / "paper.json"
    paper.write_text(json.dumps({"cost": {"EPS": 2.0}}))
    with pytest.raises(ValueError, match="unconditional"):
        paper_ratios(paper)
