"""The image benchmark against a Gaussian prior, whose posteriors are dense algebra, on images the tests make."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from posteriori.bench.images import ImageBenchmark
from posteriori.bench.images_pool import Entry, entries, reference_errors, set_distances
from posteriori.bench.images_problems import make_problem, read_images
from posteriori.bench.images_recipe import ImageRecipe, Task, standard_tasks
from posteriori.bench.images_tables import Column as ReportColumn
from posteriori.bench.images_tables import best_lines, quality, wins
from posteriori.bench.runner import Cell, Rows, measure_cells
from posteriori.data import PhotoSource
from posteriori.priors import Gaussian, dense_matrix
from posteriori.recipe import RecipeError, build, read_recipe
from tiny_data import png, write_shard

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SIDE, COUNT, SIGMA_Y = 8, 32, 0.1
SHAPE = (3, SIDE, SIDE)


def prior() -> Gaussian:
    """Smooth pictures around grey, small enough that [-1, 1] cuts hardly any."""
    points = torch.stack(torch.meshgrid(*[torch.arange(float(s)) for s in SHAPE], indexing="ij"), -1).reshape(-1, 3)
    cov = 0.06 * torch.exp(-torch.cdist(points, points) / 3)
    return Gaussian(torch.zeros(len(points), dtype=torch.float64), cov.double(), shape=SHAPE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    drawn = prior().sample(COUNT, torch.Generator().manual_seed(0)).clamp(-1, 1)
    pixels = ((drawn + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    write_shard(root / "test.tar", {f"{i:03d}.png": png(p) for i, p in enumerate(pixels)})
    return root


def recipe(data: Path, **changes: Any) -> ImageRecipe:
    content = {
        "name": "tiny", "data": str(data), "source": {"shards": "test*.tar"}, "size": SIDE, "sigma_y": SIGMA_Y,
        "features": "none", "batch": 16, "grids": [{"images": COUNT, "samples": 8, "tasks": ["random", "sr4"]}],
        "methods": {"eps": {"nfe": [1, 20]}},
    }  # fmt: skip
    return build(ImageRecipe, {**content, **changes})


def run(out: Path, plan: ImageRecipe, limit: int | None = None) -> tuple[ImageBenchmark, list[dict[str, Any]]]:
    bench = ImageBenchmark(plan, out, denoisers={"eps": prior()})
    rows = Rows(out / "rows.jsonl")
    measure_cells(bench.cells(), rows, limit)
    return bench, rows.of(bench.cells())


@pytest.fixture(scope="module")
def measured(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageBenchmark, list[dict[str, Any]]]:
    return run(tmp_path_factory.mktemp("run"), recipe(data))


def exact_posterior(bench: ImageBenchmark, task: str, i: int) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Mean and covariance by dense float64 algebra from the matrix of the operator."""
    problem = bench.problem(task, bench.images[i : i + 1], i)
    like = torch.zeros(1, dtype=torch.float64)
    matrix = dense_matrix(problem.A, SHAPE, 1, like)[0]
    observed = problem.A.observed(problem.y)
    keep = torch.ones(len(matrix), dtype=torch.bool)
    if observed is not None:
        keep = observed.expand_as(problem.y).flatten().bool()
    matrix, y = matrix[keep], problem.y.double().flatten()[keep]
    cov = prior().covs[0].double()
    gain = cov @ matrix.T @ torch.linalg.inv(matrix @ cov @ matrix.T + SIGMA_Y**2 * torch.eye(len(matrix)))
    return gain @ y, cov - gain @ matrix @ cov, problem


@pytest.mark.parametrize("task", ["random", "sr4"])
def test_one_evaluation_is_the_mean_of_dense_algebra(measured: Any, task: str) -> None:
    """PSNR and absolute error of the 1-NFE rows would be of another estimate, image or measurement. An evaluation at
    the noise 80 still hears its ``x_t``: the posterior's covariance S moves the mean by S z / 80, z standard normal,
    and its squared error by that in the first order and the second; five deviations of it are allowed."""
    bench, rows = measured
    for row in [r for r in rows if r["task"] == task and r["nfe"] == 1]:
        for j in range(row["images"]):
            mean, cov, problem = exact_posterior(bench, task, row["first"] + j)
            truth = problem.x_0.double().flatten()
            error = mean.clamp(-1, 1) - truth
            expected = 10 * math.log10(4 / float(error.square().mean()))
            moved = 2 * float((cov @ error).norm()) / 80 + float(cov.square().sum()) / 80**2
            within = 5 * 10 / math.log(10) * moved / float(error.square().sum()) + 1e-3
            assert within < 0.1
            assert row["per_image"]["psnr_mmse"][j] == pytest.approx(expected, abs=within)
            assert row["per_image"]["psnr"][j] == pytest.approx(expected, abs=within)
            assert row["per_image"]["crps"][j] == pytest.approx(float((mean - truth).abs().mean()), rel=5e-3)


@pytest.mark.parametrize("task", ["random", "sr4"])
def test_samples_score_as_exact_ones(measured: Any, task: str) -> None:
    """CRPS, spread, residual and intervals of exact posterior samples are known: a pooled column that is off would
    call a right method wrong. CRPS of N(m, s^2): s (z (2 Phi(z) - 1) + 2 phi(z) - 1/sqrt(pi)), z = (x - m)/s."""
    bench, rows = measured
    scores, variances, residuals = [], [], []
    for i in range(COUNT):
        mean, cov, problem = exact_posterior(bench, task, i)
        s = cov.diagonal().sqrt()
        z = (problem.x_0.double().flatten() - mean) / s
        normal = torch.distributions.Normal(0.0, 1.0)
        density = normal.log_prob(z).exp()
        scores.append(float((s * (z * (2 * normal.cdf(z) - 1) + 2 * density - 1 / math.pi**0.5)).mean()))
        variances.append(float(cov.diagonal().mean()))
        x = mean.reshape(1, *SHAPE)
        r = (problem.y.double() - problem.A(x)) / SIGMA_Y
        observed = problem.A.observed(problem.y)
        matrix = dense_matrix(problem.A, SHAPE, 1, torch.zeros(1, dtype=torch.float64))[0]
        spread = float(torch.trace(matrix @ cov @ matrix.T)) / SIGMA_Y**2
        residuals.append(float((r if observed is None else r * observed).square().sum()) + spread)
    (line,) = [e for e in entries(rows, bench.features_path) if (e.task, e.nfe) == (task, 20)]
    assert (line.images, line.samples) == (COUNT, 8)
    values = line.values
    assert values["crps"] == pytest.approx(np.mean(scores), rel=0.02)
    assert values["diversity"] == pytest.approx(math.sqrt(np.mean(variances)), rel=0.02)
    count = sum(v for r in rows if (r["task"], r["nfe"]) == (task, 20) for v in r["per_image"]["measurements"])
    assert values["residual"] == pytest.approx(math.sqrt(sum(residuals) / count), rel=0.02)
    # truths come from the prior: what the design calls calibration, within the chance of 32 images
    assert values["residual"] == pytest.approx(1, abs=0.06)
    assert values["ratio_one"] == pytest.approx(2, rel=0.1)
    assert values["ratio_mean"] == pytest.approx(1 + 1 / 8, rel=0.03)
    assert values["inside_90"] == pytest.approx(values["nominal_90"], abs=0.04)
    assert values["inside_50"] == pytest.approx(values["nominal_50"], abs=0.04)


def per_image(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[float]]:
    found: dict[tuple[Any, ...], list[float]] = {}
    for r in rows:
        for name, values in r["per_image"].items():
            found.setdefault((r["task"], r["method"], r["nfe"], name), []).extend(values)
    return found


def test_batches_change_no_figure(data: Path, tmp_path: Path) -> None:
    """A figure would depend on how the test set was cut, and on where a run was stopped."""
    methods = {"eps": {"nfe": [8]}, "ddnm": {"nfe": [5]}, "linear": {}}
    grids = [{"images": 6, "samples": 2, "tasks": ["random", "box", "motion"]}]
    (_, one), (_, other) = (run(tmp_path / str(b), recipe(data, methods=methods, grids=grids, batch=b)) for b in (2, 6))
    assert len(one) == 3 * len(other) == 27
    first, second = per_image(one), per_image(other)
    assert first.keys() == second.keys()
    for key, values in first.items():
        assert values == pytest.approx(second[key], rel=1e-4, abs=1e-6), key


def test_a_grid_may_have_its_own_evaluations(data: Path, tmp_path: Path) -> None:
    """The slow settings would be measured on the large grid too: hours instead of minutes."""
    grids = [{"images": 2, "tasks": ["sr4"], "nfe": {"eps": [3]}}, {"images": 4, "tasks": ["sr4"]}]
    plan = recipe(data, methods={"eps": {"nfe": [1, 5]}, "linear": {}}, grids=grids, batch=2)
    found = [(c.key["method"], c.key["nfe"], c.key["first"]) for c in ImageBenchmark(
        plan, tmp_path, denoisers={"eps": prior()}).cells()]  # fmt: skip
    assert found == [
        ("eps", 3, 0), ("linear", 0, 0),
        ("eps", 1, 0), ("eps", 1, 2), ("eps", 5, 0), ("eps", 5, 2), ("linear", 0, 2),
    ]  # fmt: skip


def test_problems_belong_to_the_image(data: Path) -> None:
    """Methods measured on fewer images would have other masks, kernels and noise than the rest."""
    x = read_images(PhotoSource(shards="test.tar"), str(data), SIDE, 5)
    for name in ("random", "box", "gaussian", "motion", "sr4"):
        task = standard_tasks()[name]
        whole, part = make_problem(task, name, x, 0, 0.1, 0), make_problem(task, name, x[3:], 3, 0.1, 0)
        assert torch.equal(whole.y[3:], part.y)
        torch.testing.assert_close(whole.A(x)[3:], part.A(x[3:]))
        # the measurement is that of the operator methods are given: the noise is what is left
        r = (whole.y - whole.A(x))[whole.y != 0] / 0.1
        assert 0.7 < float(r.std()) < 1.3


def test_a_stopped_run_continues(data: Path, tmp_path: Path) -> None:
    """Rows would be repeated or lost; the result would differ from an uninterrupted run's."""
    plan = recipe(data, grids=[{"images": 16, "samples": 2, "tasks": ["random", "sr4"]}], batch=8)
    _, whole = run(tmp_path / "whole", plan)
    run(tmp_path / "cut", plan, limit=3)
    path = tmp_path / "cut" / "rows.jsonl"
    path.write_bytes(path.read_bytes()[:-30])  # killed while it wrote the third
    bench, rows = run(tmp_path / "cut", plan)
    assert [r["id"] for r in rows] == [r["id"] for r in whole]
    assert len(path.read_text().splitlines()) == len(whole) == 8
    assert per_image(rows) == per_image(whole)
    bench.report(rows, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    psnr = np.mean([v for r in rows if (r["task"], r["nfe"]) == ("random", 1) for v in r["per_image"]["psnr"]])
    assert f"| eps | 1 | 16 x 1 |  | {psnr:.2f} |" in text


def test_best_and_wins() -> None:
    """The wrong method in bold: a smaller set has a smaller rank, lower PSNR is not better, ties have two winners."""
    lines = [
        Entry("eps", "t", 8, 64, 4, 500, {"psnr": 20.001, "frechet": 30.0, "crps": 0.05}),
        Entry("dps", "t", 250, 64, 4, 64, {"psnr": 19.0, "frechet": 10.0, "crps": 0.04}),
        Entry("tv", "t", 0, 500, 1, 500, {"psnr": 20.002, "frechet": 31.0, "crps": 0.09}),
    ]
    assert best_lines(lines, ReportColumn("psnr", "PSNR", largest=True)) == {0, 2}
    assert best_lines(lines, ReportColumn("frechet", "F", of_sets=True)) == {0}
    assert best_lines(lines[:1], ReportColumn("psnr", "PSNR", largest=True)) == set()
    assert wins({"t": lines}) == (2, 3, ["t, crps: dps"])
    table = quality("t", lines, {"distance": "", "frechet": "Frechet", "kernel": ""})
    assert "| eps | 8 | 64 x 4 | 500 | **20.00** | **30.00** | 5.00 |" in table.markdown()
    assert r"dps & 250 & 64 x 4 & 64 & 19.00 & 10.00 & \textbf{4.00} \\" in table.latex()


def test_distances_of_sets_from_files(tmp_path: Path) -> None:
    """Batches would be lost or mixed, or second samples counted: N(0, I) against N(m, 4 I) is |m|^2 + d apart."""
    rng = np.random.default_rng(0)
    m = np.array([3.0, 0.0, 1.0])
    paths = []
    for k in range(2):
        samples = m + 2 * rng.standard_normal((2, 4000, 3))
        samples[1] = 99.0
        paths.append(tmp_path / f"{k}.npz")
        np.savez(paths[-1], samples=samples.astype(np.float16), truth=rng.standard_normal((1, 4000, 3)))
    found = set_distances(paths)
    assert found["frechet"] == pytest.approx(10 + 3, rel=0.03)
    assert found["mmd"] > 0.05
    assert "mmd_pixel" not in found


def test_errors_are_compared_on_the_same_images() -> None:
    """A method measured on the first images would be compared with EPS's error on all of them."""
    rows = [
        {"id": "a", "method": "eps", "task": "t", "nfe": 1, "seed": 0, "first": 0, "images": 2, "samples": 1,
         "seconds": 1.0, "evaluations": 2.0, "backward": 0.0, "nominal": {},
         "per_image": {"psnr": [1.0, 2.0], "mse": [1.0, 5.0], "mse_mmse": [1.0, 5.0], "residual": [1.0, 1.0],
                       "measurements": [1.0, 1.0]}},
        {"id": "b", "method": "dps", "task": "t", "nfe": 9, "seed": 0, "first": 0, "images": 1, "samples": 1,
         "seconds": 1.0, "evaluations": 9.0, "backward": 9.0, "nominal": {},
         "per_image": {"psnr": [1.0], "mse": [3.0], "residual": [4.0], "measurements": [1.0]}},
    ]  # fmt: skip
    assert reference_errors(rows) == {("t", 0): 1.0, ("t", 1): 5.0}
    _, dps = entries(rows, lambda name: Path(name))
    assert (dps.values["ratio_one"], dps.values["residual"]) == (3.0, 2.0)


def made_up(method: str, first: int, samples: int, **columns: list[float]) -> dict[str, Any]:
    count = len(next(iter(columns.values())))
    nominal = {"50": 0.5, "90": samples / 20} if samples > 1 else {}
    extra = {"residual": [1.0] * count, "measurements": [1.0] * count}
    return {
        "id": f"{method} {first} {samples}", "method": method, "task": "t", "nfe": 9, "seed": 0, "first": first,
        "images": count, "samples": samples, "seconds": 1.0, "evaluations": 9.0, "backward": 0.0, "nominal": nominal,
        "per_image": {**extra, **columns},
    }  # fmt: skip


def test_methods_on_fewer_images_are_compared_on_those() -> None:
    """A method measured on the two easiest images would win over one that is better on each of them."""
    rows = [
        made_up("eps", 0, 2, psnr=[30.0, 29.0, 11.0, 10.0], crps=[1.0, 1.0, 5.0, 5.0]),
        made_up("slow", 0, 2, psnr=[28.0, 27.0], crps=[2.0, 2.0]),
        made_up("point", 0, 1, psnr=[29.0, 28.0, 10.0, 9.0]),
    ]
    lines = {e.method: e.values for e in entries(rows)}
    assert lines["eps"]["psnr"] == 20.0
    assert lines["slow"]["psnr"] == pytest.approx(18.0)  # 2 dB below eps wherever both are known
    assert lines["slow"]["crps"] == pytest.approx(4.0)
    assert lines["point"]["psnr"] == 19.0
    assert "crps" not in lines["point"]


def test_rows_of_several_grids_serve_what_they_are_good_for() -> None:
    """Single images would be judged by the eight that intervals were measured on, or intervals by 2 samples."""
    rows = [
        made_up("eps", 0, 4, psnr=[20.0, 22.0, 24.0], inside_90=[0.5, 0.5, 0.5]),
        made_up("eps", 0, 19, psnr=[30.0], inside_90=[0.9]),
        made_up("eps", 0, 1, psnr=[0.0, 0.0, 0.0, 0.0]),
    ]
    (line,) = entries(rows)
    assert (line.images, line.samples, line.values["psnr"]) == (3, 4, 22.0)
    assert (line.values["inside_90"], line.values["nominal_90"]) == (0.9, 0.95)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch must be"),
        ({"size": 10}, "no multiple of scale"),
        ({"methods": {"magic": {}}}, "no method 'magic'"),
        ({"only": ["dps"]}, "must be among"),
        ({"grids": [{"images": 5}, {"images": 32}]}, "multiples of batch"),
        ({"grids": [{"images": 32, "nfe": {"dps": [8]}}]}, "grids.nfe: dps must be among"),
    ],
)
def test_bad_recipes(data: Path, changes: dict[str, Any], message: str) -> None:
    """A mistake would be found after hours, or not at all."""
    with pytest.raises(RecipeError, match=message):
        recipe(data, **changes)


def test_photo_recipe_compares_on_one_network(tmp_path: Path) -> None:
    """The bundled model would be compared with methods on another network, or none be measured with its own."""
    (tmp_path / "test").mkdir()
    for k in range(8):
        Image.fromarray(np.full((128, 128, 3), k, np.uint8)).save(tmp_path / "test" / f"{k}.png")
    content = read_recipe(RECIPES / "photo-benchmark.yaml", [f"data={tmp_path}"])
    assert content.pop("kind") == "images"
    plan = build(ImageRecipe, content)
    listed: list[Cell] = list(ImageBenchmark(plan, tmp_path, denoisers={"photo": prior()}).cells())
    assert {c.key["method"] for c in listed} == set(plan.methods)
    assert {c.key["task"] for c in listed} == {"random", "box", "sr4", "gaussian", "motion"}
    assert {plan.methods[name].model for name in plan.methods if name != "tv"} == {"photo"}


@pytest.mark.parametrize("name", ["lfw-32-benchmark", "tiny-imagenet-32-benchmark"])
def test_recipes_are_complete(name: str, data: Path, tmp_path: Path) -> None:
    """A shipped recipe that cannot be read, repeats a row, or needs a machine's path."""
    text = (RECIPES / f"{name}.yaml").read_text()
    assert "/work" not in text
    content = read_recipe(RECIPES / f"{name}.yaml", [f"data={data}", "features=none"])
    assert content.pop("kind") == "images"
    content["grids"] = [{"images": 16, "samples": 4}, {"images": 32, "samples": 1}]
    plan = build(ImageRecipe, content)
    with pytest.raises(ValueError, match=r"--set models\.eps"):
        ImageBenchmark(plan, tmp_path)
    bench = ImageBenchmark(plan, tmp_path, denoisers={name: prior() for name in ("base", "eps", "palette")})
    listed: list[Cell] = list(bench.cells())
    keys = [json.dumps(c.key, sort_keys=True) for c in listed]
    assert len(set(keys)) == len(keys)
    assert {c.key["method"] for c in listed} == set(plan.methods)
    assert {c.key["task"] for c in listed} == set(standard_tasks())
    zeta = {c.key["task"]: c.key["settings"]["zeta"] for c in listed if c.key["method"] == "dps"}
    assert zeta["random95"] == zeta["random"]  # the extreme task is no task of its own
    assert zeta["gaussian"] != zeta["random"]
    assert isinstance(plan.tasks["sr16"], Task)
