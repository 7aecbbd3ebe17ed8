"""Verdicts on made-up rows whose answer is known: a claim that holds, one that does not, and one without rows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posteriori.bench import claims_sampling, claims_tables, claims_training
from posteriori.bench.claims import CLAIMS, document, judge, main
from posteriori.bench.claims_common import Evidence, Interval, above, below, combine, frechet, ratio, read_rows
from posteriori.bench.images import ImageBenchmark
from posteriori.bench.images_recipe import ImageRecipe
from posteriori.perceptual import frechet_distance
from posteriori.recipe import build, read_recipe

ROOT = Path(__file__).resolve().parents[1]
N = 32
PAPER = {
    "source": "a paper", "backbone": "some",
    "set": {"Super-res (4x)": [
        {"method": "DPS", "nfe": 250, "psnr": 20.0, "crps_pixel": 6.0, "fid": 90.0},
        {"method": "DAPS", "nfe": 100, "psnr": 19.0, "crps_pixel": 8.0, "fid": 110.0},
        {"method": "DDNM", "nfe": 100, "psnr": 22.0, "crps_pixel": 4.9, "fid": 62.0},
        {"method": "PiGDM", "nfe": 100, "psnr": 21.5, "crps_pixel": 5.5, "fid": 50.0},
        {"method": "MPGD", "nfe": 100, "psnr": 20.5, "crps_pixel": 7.0, "fid": 120.0},
        {"method": "Palette", "nfe": 100, "psnr": 21.9, "crps_pixel": 5.2, "fid": 49.0},
        {"method": "EPS", "nfe": 100, "psnr": 21.8, "crps_pixel": 5.3, "fid": 48.0},
        {"method": "EPS", "nfe": 20, "psnr": 22.5, "crps_pixel": 5.2, "fid": 52.0},
        {"method": "EPS", "nfe": 1, "psnr": 21.0, "crps_pixel": 6.5, "fid": 78.0},
    ]},
    "cost": {"setting": "a GPU", "EDM (unconditional)": 2.0, "EPS": 2.1, "DPS": 4.2},
}  # fmt: skip


def row(method: str, nfe: int, task: str = "sr4", first: int = 0, images: int = N, **columns: Any) -> dict[str, Any]:
    """A row whose images vary alike for every method, by a factor each, around the columns' means."""
    factors = 0.5 + np.random.default_rng(3).random(1000)[first : first + images]
    per_image = {k: v if isinstance(v, list) else (v * factors / 1.0).tolist() for k, v in columns.items()}
    per_image.setdefault("psnr", [20.0] * images)
    per_image.setdefault("mse", [0.1] * images)
    per_image |= {"residual": per_image.get("residual", [300.0] * images), "measurements": [300.0] * images}
    samples = 4 if nfe > 1 else 1
    paper = {"sr4": "Super-res (4x)"}.get(task, "")
    return {
        "id": f"{method}-{nfe}-{task}-{first}", "kind": "images", "method": method, "task": task, "nfe": nfe, "seed": 0,
        "first": first, "images": images, "samples": samples, "sigma_y": 0.05, "size": 32, "data": f"data{first}",
        "model": "m", "degradation": {"paper": paper}, "per_image": per_image, "nominal": {}, "seconds": 1.0,
        "evaluations": 1.0, "backward": 0.0,
    }  # fmt: skip


def verdict(name: str, rows: Sequence[Mapping[str, Any]] = (), **more: Any) -> Any:
    (found,) = judge(Evidence([dict(r) for r in rows], paper=PAPER, paper_set="set", **more), [name])
    return found


def test_nothing_measured_is_said_of_every_claim() -> None:
    """A verdict would be made of nothing, or a missing run would end in an error."""
    for v in judge(Evidence(paper=PAPER, paper_set="set")):
        assert v.state == "not measured", v.id
        assert v.rule.startswith("Rule")
    assert all(v.state == "not measured" for v in judge(Evidence()))
    too_few = [row("eps", 20, images=7, crps=0.05), row("dps", 250, images=7, crps=0.09)]
    assert verdict("over-approximations", too_few).state == "not measured"
    assert len({c.id for c in CLAIMS}) == len(CLAIMS)


def crps_rows(**levels: float) -> list[dict[str, Any]]:
    """Rows named ``method_nfe`` with this CRPS."""
    return [row(k.rpartition("_")[0].replace("__", "-"), int(k.rpartition("_")[2]), crps=v) for k, v in levels.items()]


@pytest.mark.parametrize(
    ("claim", "levels", "state"),
    [
        ("over-palette", {"eps_20": 0.050, "palette_20": 0.055, "eps_100": 0.05, "palette_100": 0.06}, "holds"),
        ("over-palette", {"eps_20": 0.050, "palette_20": 0.055, "eps_100": 0.06, "palette_100": 0.05}, "does not hold"),
        ("over-palette", {"eps_20": 0.050, "palette_100": 0.04}, "not measured"),  # unequal evaluations
        ("over-approximations", {"eps_8": 0.050, "dps_250": 0.055, "eps__vp_20": 0.01, "palette_20": 0.01}, "holds"),
        ("over-approximations", {"eps_20": 0.050, "dps_250": 0.055, "ddnm_100": 0.049}, "does not hold"),
        ("training-needed", {"eps_20": 0.05, "zero-shot-pivot_100": 0.08}, "holds"),
        ("training-needed", {"eps_20": 0.05, "zero-shot-pivot_100": 0.04}, "does not hold"),
        ("zero-shot", {"zero-shot-pivot_100": 0.05, "dps_250": 0.04, "ddnm_100": 0.06, "daps_100": 0.07}, "holds"),
        (
            "zero-shot",
            {"zero-shot-pivot_100": 0.05, "dps_250": 0.04, "ddnm_100": 0.045, "daps_100": 0.07},
            "does not hold",
        ),
        ("zero-shot", {"zero-shot-pivot_100": 0.05, "dps_250": 0.04, "ddnm_100": 0.045}, "not measured"),
        ("plateau-crps", {"eps_8": 0.060, "eps_20": 0.0505, "eps_50": 0.049, "eps_100": 0.05}, "holds"),
        ("plateau-crps", {"eps_8": 0.050, "eps_20": 0.0505, "eps_50": 0.052, "eps_100": 0.05}, "does not hold"),
        ("plateau-crps", {"eps_8": 0.05, "eps_100": 0.05}, "not measured"),
        ("warm-start", {"eps_8": 0.05, "eps__cold_20": 0.0499, "eps__cold_8": 0.07}, "holds"),
        ("warm-start", {"eps_8": 0.05, "eps__cold_20": 0.045, "eps__cold_8": 0.07}, "does not hold"),
        ("warm-start", {"eps_8": 0.05, "eps__cold_20": 0.05, "eps__cold_8": 0.049}, "does not hold"),
        ("any-solver", {"eps_100": 0.05, "eps__heun_20": 0.054, "eps__euler_50": 0.052}, "holds"),
        ("any-solver", {"eps_100": 0.05, "eps__heun_20": 0.054, "eps__euler_50": 0.053}, "does not hold"),
        ("any-schedule", {"eps_20": 0.05, "eps__vp_20": 0.0505, "eps__flow__euler_20": 0.054}, "holds"),
        ("any-schedule", {"eps_20": 0.05, "eps__flow_20": 0.048}, "does not hold"),
    ],
)
def test_verdicts_on_the_crps(claim: str, levels: dict[str, float], state: str) -> None:
    """A bound, a direction or a line would be another one than the rule says."""
    assert verdict(claim, crps_rows(**levels)).state == state


def test_the_papers_own_tables_are_judged() -> None:
    """Where its numbers contradict a claim the document would not say so."""
    assert "Super-res (4x) 5.3 against 5.2" in verdict("over-palette").paper
    assert "5.2 against ddnm 4.9" in verdict("over-approximations").paper
    assert "21 dB at 1 against 22.5 dB of eps at 20" in verdict("one-evaluation").paper
    assert verdict("best-cells").paper.startswith("best in 2 of 3 cells; not in Super-res (4x) crps_pixel: ddnm")
    assert "0.981 (Super-res (4x))" in verdict("plateau-crps").paper
    assert "1.050 times" in verdict("cost-unconditional").paper
    assert verdict("cost-cheapest").paper == "times the time of EPS: dps 2.00"


def test_cells_and_ties() -> None:
    """Ties would be lost, single methods would win against nobody, or the wrong direction would be best."""
    lines = [("eps", 20, {"psnr": 20.0, "fid": 9.0}), ("dps", 250, {"psnr": 20.0, "fid": 8.0, "ssim": 0.5})]
    assert claims_tables.cells_won({"t": lines}) == (1, 2, ["t fid: dps"])


def tables(eps: float, others: Sequence[float]) -> list[dict[str, Any]]:
    names = [("dps", 250), ("daps", 100), ("ddnm", 100), ("pigdm", 100), ("mpgd", 100)]
    rows = [row(m, n, psnr=[v] * N, crps=1 / v) for (m, n), v in zip(names, others, strict=True)]
    return [*rows, row("eps", 100, psnr=[eps] * N, crps=1 / eps)]


def test_cells_of_rows_and_order() -> None:
    """The share of cells, or the direction of a ranking, would be another than the paper's tables have."""
    as_there = tables(22.5, [20, 19, 22, 21.5, 20.5])
    assert verdict("best-cells", as_there).state == "holds"
    assert verdict("best-cells", tables(21.0, [20, 19, 22, 21.5, 20.5])).state == "does not hold"
    found = verdict("order", as_there)
    assert (found.state, found.parts[0].name) == ("holds", "sr4")
    assert verdict("order", tables(19.0, [21, 22, 19.5, 20, 20.5])).state == "does not hold"


def test_extreme_degradations() -> None:
    """A method that ignores the measurement would pass, or usual tasks would be judged."""

    def rows(residual: float, rival: float) -> list[dict[str, Any]]:
        usual = [row("eps", 20, "random", crps=0.05), row("dps", 250, "random", crps=0.04)]
        own = row("eps", 20, "random95", crps=0.08, residual=[residual**2 * 300] * N)
        return [*usual, own, row("dps", 250, "random95", crps=rival)]

    found = verdict("extreme", rows(1.02, 0.1))
    assert found.state == "holds"
    assert "random95: CRPS over that of the best rival 0.800" in found.note
    assert verdict("extreme", rows(1.2, 0.1)).state == "does not hold"
    assert verdict("extreme", rows(1.02, 0.07)).state == "does not hold"


def mean_rows(samples: float, mean: float, rival: float = 0.06) -> list[dict[str, Any]]:
    own = row("eps", 1, mse=0.05, mse_mmse=0.05, psnr_mmse=[21.0] * N)
    drawn = row("eps", 20, mse=samples, mse_mean=mean, mse_mmse=0.05, psnr_mmse=[21.0] * N)
    return [own, drawn, row("tv", 0, mse=rival)]


@pytest.mark.parametrize(
    ("claim", "rows", "state"),
    [
        ("one-evaluation", mean_rows(0.1, 0.0625), "holds"),
        ("one-evaluation", mean_rows(0.1, 0.0625, 0.049), "holds"),  # within what a trained network is allowed
        ("one-evaluation", mean_rows(0.1, 0.0625, 0.045), "does not hold"),
        ("one-evaluation", mean_rows(0.1, 0.045), "does not hold"),  # the mean of samples is an estimator too
        ("one-evaluation", mean_rows(0.04, 0.0625), "does not hold"),  # what the paper's deblurring tables show
        ("mean-of-many", mean_rows(0.1, 0.0625), "holds"),
        ("mean-of-many", mean_rows(0.1, 0.045), "does not hold"),
        ("mean-of-many", mean_rows(0.1, 0.080), "does not hold"),
        ("calibrated", mean_rows(0.1, 0.0625), "holds"),
        ("calibrated", mean_rows(0.07, 0.0625), "does not hold"),
    ],
)
def test_one_evaluation(claim: str, rows: list[dict[str, Any]], state: str) -> None:
    """The theorem's test would pass for what is no posterior mean, or fail for what is one."""
    assert verdict(claim, rows).state == state


def test_the_mean_of_many_is_of_equally_many_samples() -> None:
    """Images with 19 samples would be averaged with those of 4, whose mean is due another error."""
    few = row("eps", 8, images=N, mse_mean=0.0625, mse_mmse=0.05)
    many = {**row("eps", 8, images=N, mse_mean=0.0526, mse_mmse=0.05), "samples": 19, "id": "many"}
    part = {**row("eps", 8, images=8, mse_mean=0.08, mse_mmse=0.05), "samples": 32, "id": "part"}
    (found,) = verdict("mean-of-many", [few, many, part]).parts
    assert found.state == "holds"
    assert "mean of 19 samples at 8, 32 images: squared error ratio 1.052" in found.text
    assert "due 1.053" in found.text


def test_amortized() -> None:
    """The network of one task would be compared on another task, or in the wrong direction."""

    def rows(alone: float) -> list[dict[str, Any]]:
        return [row("eps", 20, crps=0.05, mse_mmse=0.05), row("eps-sr", 20, crps=alone, mse_mmse=0.05),
                row("eps-inpaint", 20, crps=0.01)]  # fmt: skip

    assert verdict("amortized", rows(0.049)).state == "holds"
    assert verdict("amortized", rows(0.045)).state == "does not hold"


def write_features(folder: Path, rows: Sequence[dict[str, Any]], scale: Mapping[int, float]) -> dict[str, Path]:
    """Standard normal features of the truth, of samples spread by ``scale`` for every number of evaluations."""
    found = {}
    rng = np.random.default_rng(0)
    truth, noise = rng.standard_normal((2, 1, 256, 6))
    for r in rows:
        part = slice(r["first"], r["first"] + r["images"])
        found[r["id"]] = folder / f"{r['id']}.npz"
        np.savez(found[r["id"]], samples=scale[r["nfe"]] * noise[:, part], truth=truth[:, part])
    return found


def test_plateau_of_the_frechet_distance(tmp_path: Path) -> None:
    """Sets of different images would be compared, or a plateau be found where there is none."""
    rows = [row("eps", n, first=f, images=64) for n in (8, 20, 100) for f in (0, 64, 128, 192)]
    shown = verdict("plateau-frechet", rows, features=write_features(tmp_path, rows, {8: 2.2, 20: 2.0, 100: 2.0}))
    assert shown.state == "holds"
    # 6 (1 - s)^2 for N(0, s^2 I): (1.2/1)^2 = 1.44, but for the finite sets
    assert "within 5% from 20 on" in shown.reason
    assert "8: 1.4" in shown.reason

    # another file of the same name: what was read is remembered by path, so the rows get new ones
    for r in rows:
        r["id"] += "-again"
    worse = verdict("plateau-frechet", rows, features=write_features(tmp_path, rows, {8: 2.0, 20: 2.2, 100: 2.0}))
    assert worse.state == "does not hold"
    assert verdict("plateau-frechet", rows[:4] + rows[8:], features={}).state == "not measured"


def test_frechet_distance_is_torchmetrics() -> None:
    """The short way by singular values would be another distance; for fewer images than features as well."""
    generator = torch.Generator().manual_seed(0)
    for n, d in ((40, 8), (20, 30)):
        a, b = torch.randn(2, n, d, generator=generator)
        b = 1.5 * b + 0.3
        assert frechet(a, b) == pytest.approx(frechet_distance(a, b), rel=1e-3)


def test_intervals() -> None:
    """Pairing would be lost, or an interval be too narrow or too wide: images differ tenfold, methods by 2 %."""
    rng = np.random.default_rng(0)
    base = np.exp(rng.standard_normal(200))
    a = dict(enumerate(base * (1.02 + 0.05 * rng.standard_normal(200))))
    b = dict(enumerate(base))
    found = ratio(a, b)
    assert found is not None
    assert found.low < 1.02 < found.high
    assert found.high - found.low < 0.03
    for count in (8, 40):
        covered = 0
        for _ in range(200):
            draw = {i: float(v) for i, v in enumerate(1.02 + 0.3 * rng.standard_normal(count))}
            one = ratio(draw, dict.fromkeys(range(count), 1.0))
            assert one is not None
            covered += one.low <= 1.02 <= one.high
        assert 180 <= covered <= 199  # 190 due, 3 the deviation
    diverged = ratio({i: float("nan") for i in range(20)}, b)
    assert diverged is not None
    assert below(diverged, 1.0) == "does not hold"
    assert ratio(dict(list(b.items())[:7]), b) is None
    near = Interval(1.0, 0.9, 1.1)
    assert (below(near, 1.05), below(near, 1.2), above(near, 1.2)) == ("undecided", "holds", "does not hold")
    assert combine(["holds", "undecided", "not measured"]) == "undecided"
    assert combine(["holds", "undecided", "does not hold"]) == "does not hold"


def cost(method: str, ratio: float, solver: str = "", task: str = "sr4") -> list[dict[str, Any]]:
    values = ratio * (1 + 0.01 * np.random.default_rng(0).standard_normal(20))
    return [{"method": method, "solver": solver, "task": task, "device": "cpu", "turn": i, "ratio": float(v)}
            for i, v in enumerate(values)]  # fmt: skip


def test_cost() -> None:
    """Rows without a time would count, a slower method as faster, or the iterative solve as a task of the paper."""
    own = [*cost("eps", 1.05, "exponential"), {"method": "ddrm", "task": "sr4", "error": "does not fit"}]
    slow = cost("eps", 3.0, "exponential", "motion-zero")
    found = verdict("cost-unconditional", cost=[*own, *slow])
    assert found.state == "holds"
    assert "motion-zero, exponential, cpu: 2.995" in found.note
    assert verdict("cost-unconditional", cost=[*own, *cost("eps", 1.2, "heun")]).state == "does not hold"
    assert verdict("cost-cheapest", cost=[*own, *cost("dps", 2.5)]).state == "holds"
    assert verdict("cost-cheapest", cost=[*own, *cost("dps", 2.5), *cost("ddnm", 0.98)]).state == "does not hold"
    assert verdict("cost-cheapest", cost=[*own, *cost("ddnm", 1.052)]).state == "undecided"


def test_trainings_from_the_documents() -> None:
    """A column or a form would be read as another one; figures are those of the tables as they are printed."""
    read = claims_training.read_training([ROOT / "docs" / "ablation.md", ROOT / "docs" / "finetune.md"])
    text = (ROOT / "docs" / "finetune.md").read_text()
    (line,) = [x for x in text.splitlines() if x.startswith("| sr | from scratch: Palette")]
    (found,) = [t for t in read if (t.study, t.task, t.form) == ("finetune", "sr", "palette-scratch")]
    mean, spread = found.values["psnr_mmse"]
    assert f"| {mean:.2f} ± {spread:.2f} |" in line
    assert f"| {100 * found.values['crps'][0]:.2f} ±" in line
    assert {t.form for t in read if t.study == "ablation"} == {
        "paper-scratch", "palette-scratch", "scalar-scratch", "spectral-scratch"
    }  # fmt: skip


def trained(tmp_path: Path, **crps: float) -> list[claims_training.Trained]:
    rows = [
        {"task": "sr", "form": form.replace("_", "-"), "seed": s, "validation_loss": v, "psnr_mmse": 1 / v,
         "psnr_sample": 20.0, "crps": v + 0.001 * s, "residual": 1.0, "ratio_sample": 2.0, "ratio_mean": 1.1}
        for form, v in crps.items() for s in (0, 1)
    ]  # fmt: skip
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return claims_training.read_training([path])


@pytest.mark.parametrize(
    ("claim", "crps", "state"),
    [
        ("pivot-input", {"paper": 0.07, "palette": 0.08}, "holds"),
        ("pivot-input", {"paper": 0.08, "palette": 0.07}, "does not hold"),
        ("pivot-input", {"paper": 0.0799, "palette": 0.08}, "undecided"),  # within the spread of the seeds
        ("pivot-alone", {"paper_pivot": 0.07, "palette": 0.08}, "holds"),
        ("pivot-alone", {"paper_pivot": 0.09, "palette": 0.08}, "does not hold"),
        ("matrix", {"spectral": 0.07, "paper": 0.08, "paper_scratch": 0.09, "spectral_scratch": 0.08}, "holds"),
        ("matrix", {"spectral": 0.07, "paper": 0.08, "paper_scratch": 0.07, "spectral_scratch": 0.08}, "does not hold"),
        ("fine-tuning", {"paper": 0.07, "paper_scratch": 0.08}, "holds"),
        ("fine-tuning", {"paper": 0.09, "paper_scratch": 0.08}, "does not hold"),
        ("fine-tuning", {"paper": 0.09, "palette": 0.08}, "not measured"),
    ],
)
def test_verdicts_on_training(tmp_path: Path, claim: str, crps: dict[str, float], state: str) -> None:
    """A form would be compared with another than the rule says, or in the wrong direction."""
    assert verdict(claim, training=trained(tmp_path, **crps)).state == state


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of two runs would not meet, a document would lack its figures, or a wrong file end in a traceback."""
    one = write_rows(tmp_path / "a" / "rows.jsonl", crps_rows(eps_8=0.05, eps_100=0.05, eps_20=0.05))
    one.with_suffix(".jsonl.gz").write_bytes(gzip.compress(one.read_bytes()))  # as reports publish them
    one = one.with_suffix(".jsonl.gz")
    two = write_rows(
        tmp_path / "b" / "rows.jsonl", [*crps_rows(eps__cold_20=0.05, eps__cold_8=0.07), {"kind": "exact", "id": "e"}]
    )
    paper = tmp_path / "paper.json"
    paper.write_text(json.dumps(PAPER))
    out = tmp_path / "verdicts.md"
    given = ["--rows", str(one), "--rows", str(two), "--paper", str(paper), "--paper-set", "set"]
    assert main([*given, "--document", str(out), "--recipes", "faces"]) == 0
    text = out.read_text()
    assert "| **holds** |" in text
    assert "warm-start" in capsys.readouterr().out
    assert "    posteriori benchmark recipes/faces-claims.yaml --set data=DATA" in text
    assert f"--rows {one} --rows {two} --paper FILE --paper-set set --only warm-start" in text
    for c in CLAIMS:
        assert f"\n## {c.id}\n" in text
    assert main([*given, "--only", "warm-start,nothing"]) == 2
    assert main(["--rows", str(tmp_path / "missing.jsonl")]) == 2
    assert "choose among" in capsys.readouterr().err


def test_runs_that_cannot_be_compared(tmp_path: Path) -> None:
    """Image 3 of one test set would be compared with image 3 of another, or two models be averaged."""
    base = row("eps", 20, crps=0.05)
    for change, message in (({"data": "other"}, "images"), ({"model": "n"}, "model"), ({"sigma_y": 0.1}, "sigma_y")):
        other = {**row("eps", 8, crps=0.05), **change}
        path = write_rows(tmp_path / "rows.jsonl", [base, other])
        with pytest.raises(ValueError, match=f"differ in their {message}"):
            read_rows([path])
    again = {**base, "id": "again", "per_image": {"crps": [0.07] * N}}
    rows, _ = read_rows([write_rows(tmp_path / "rows.jsonl", [base, again, {**base, "nfe": 8, "error": "no"}])])
    assert [r["id"] for r in rows] == ["again"]


def test_recipes_measure_what_the_claims_ask_for() -> None:
    """A claim would stay "not measured" because of a name, or a recipe take longer than it says."""
    measured: dict[str, set[int]] = {}
    total = {}
    for kind in ("claims", "claims-curves", "claims-per-task"):
        for name in ("lfw-32", "tiny-imagenet-32"):
            content = read_recipe(ROOT / "recipes" / f"{name}-{kind}.yaml")
            assert content.pop("kind") == "images"
            assert content["name"] == f"{name}-{kind}"
            plan = build(ImageRecipe, content)
            cost = 0
            for grid in plan.grids:
                for method in grid.methods:
                    nfes = grid.nfe.get(method) or plan.methods[method].nfe
                    measured.setdefault(method, set()).update(nfes)
                    per_image = sum(1 if n == 1 else 1 + n * grid.samples for n in nfes)
                    cost += per_image * grid.images * len(grid.tasks)
            total[kind] = cost
    wanted = (*claims_sampling.SOLVERS, *claims_sampling.SCHEDULES, *claims_sampling.STARTS, "eps-cold", "eps-many")
    assert set(wanted) <= set(measured)
    assert measured["eps"] == {5, 10, 50, 100}
    assert {"eps-sr", "eps-inpaint"} <= set(claims_sampling.PER_TASK) & set(measured)
    assert total["claims"] + total["claims-curves"] < 75_000
    assert ImageBenchmark.recipe is ImageRecipe


def test_document_of_verdicts() -> None:
    """A claim's figures would not be shown beside the paper's."""
    evidence = Evidence(crps_rows(eps_20=0.05, dps_250=0.06), paper=PAPER, paper_set="set")
    text = document(judge(evidence, ["over-approximations"]), evidence, "COMMAND", "faces")
    assert "1 holds. 32 test images of 32x32 pixels, noise 0.05, 2 rows. Beside: a paper, its tables of set." in text
    assert "| sr4, 20 against dps at 250 | CRPS ratio 0.833 [0.833, 0.833] | holds |" in text
    assert "    COMMAND --only over-approximations" in text
