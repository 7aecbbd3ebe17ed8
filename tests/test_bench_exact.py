"""The exact benchmark on tiny grids: what is exact sits at the floor, what is biased does not, and the report says what
the rows say."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from posteriori import cli
from posteriori.bench.calibration import FUNCTIONS, deviation, deviation_limit, rank_rows
from posteriori.bench.distances import DISTANCES, Reference, energy_score
from posteriori.bench.exact import ExactBenchmark
from posteriori.bench.exact_problems import (
    OPERATORS,
    PriorSpec,
    make_measurement,
    make_operator,
    make_prior,
)
from posteriori.bench.exact_recipe import FLOOR, ExactRecipe
from posteriori.bench.exact_report import evaluations_needed
from posteriori.bench.patches import PatchFit, fit_name, patch_mixture, read_patches
from posteriori.pivot import measure
from posteriori.priors import GaussianMixture, dense_matrix
from posteriori.recipe import RecipeError, build, read_recipe

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def posterior(kind: Any = "mixture") -> GaussianMixture:
    A = make_operator("selection", 16)
    prior = make_prior(PriorSpec(kind, 16), A)
    _, y = make_measurement(prior, A, 0.1, 1)
    return prior.posterior(A, y, 0.1)


def test_exact_samples_sit_at_the_floor() -> None:
    """A floor too high would hide errors, one too low would make errors of chance."""
    exact = posterior()
    reference = Reference(exact, 400)
    floor, limit = reference.floor()
    rows = [
        reference.distances(exact.sample(400, torch.Generator().manual_seed(100 + k)).flatten(1)) for k in range(30)
    ]
    for name in DISTANCES:
        sizes = [abs(r[name]) for r in rows]
        assert 0.6 < statistics.mean(sizes) / floor[name] < 1.6, name
        assert statistics.mean(s <= limit[name] for s in sizes) > 0.7, name  # 0.95 but for 20 sets' own chance


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ("shifted", {"sw2": 2.0, "mean": 5.0, "energy": 3.0}),
        ("narrow", {"covariance": 2.5, "coverage_90": 4.0, "log_score": 4.0}),
        ("wide", {"coverage_90": 2.5, "log_score": 4.0}),
        ("one mode", {"weights": 5.0, "sw2": 2.0}),
    ],
)
def test_biased_samplers_are_detected(change: str, seen: dict[str, float]) -> None:
    """A distance that a wrong sampler passes says nothing for the methods that pass it."""
    exact = posterior("gaussian" if change in ("narrow", "wide") else "mixture")
    points = exact.sample(400, torch.Generator().manual_seed(7)).flatten(1)
    if change == "shifted":
        points = points + 0.3 * exact.covariance.diagonal().sqrt()
    elif change in ("narrow", "wide"):
        points = exact.mean + (0.7 if change == "narrow" else 1.4) * (points - exact.mean)
    else:
        best = int(exact.weights.argmax())
        one = GaussianMixture(torch.ones(1).double(), exact.means[best : best + 1], exact.covs[best : best + 1])
        points = one.sample(400, torch.Generator().manual_seed(8))
    reference = Reference(exact, 400)
    values, (floor, _) = reference.distances(points), reference.floor()
    for name, least in seen.items():
        assert abs(values[name]) > least * floor[name], name
    if change == "narrow":
        assert values["coverage_90"] < 0 > values["log_score"]
    if change == "wide":
        assert values["coverage_90"] > 0 < values["log_score"]
    broken = points.clone()
    broken[3, 2] = float("inf")
    assert all(np.isnan(v) for v in reference.distances(broken).values())


def test_energy_score_is_that_of_scoringrules() -> None:
    """The independent implementation would give other figures."""
    scoringrules = pytest.importorskip("scoringrules")
    rng = np.random.default_rng(0)
    points, truths = rng.normal(size=(30, 4)), rng.normal(size=(20, 4))
    expected = scoringrules.es_ensemble(truths, np.repeat(points[None], 20, 0), estimator="fair").mean()
    assert energy_score(torch.from_numpy(points), torch.from_numpy(truths)) == pytest.approx(expected, rel=1e-10)


def test_ranks_tell_exact_samples_from_others() -> None:
    """Calibration would fail exact samples, or pass samples that are too concentrated or of another mean."""
    A = make_operator("selection", 16)
    prior = make_prior(PriorSpec("mixture", 16), A)
    truth = prior.sample(300, torch.Generator().manual_seed(0))
    y = measure(A, truth, 0.1, seed=1)
    generator = torch.Generator().manual_seed(2)
    exact = [prior.posterior(A, v[None], 0.1) for v in y]
    samples = torch.stack([e.sample(19, generator) for e in exact], 1)
    limit = deviation_limit(300, 19, 0.999)
    means = torch.stack([e.mean for e in exact]).reshape(truth.shape)

    def deviations(x: torch.Tensor) -> dict[str, float]:
        return {k: deviation(v, 19) for k, v in rank_rows(prior, A, y, 0.1, truth, x).items()}

    assert max(deviations(samples).values()) < limit
    narrow = deviations(means + 0.5 * (samples - means))
    assert narrow["density"] > 2 * limit
    moved = samples + 0.5 * A.null_projection(torch.ones_like(samples[0]))
    assert max(deviations(moved)["hidden"], deviations(moved)["density"]) > 2 * limit
    lost = samples.clone()
    lost[:, :, 0, 0, 0] = float("nan")
    assert deviations(lost)["seen"] > 0.9  # all count as smaller


def test_deviation_by_hand() -> None:
    """A uniform distribution would not be at 0, or a constant one not at its largest."""
    assert deviation([0, 1, 2, 3], 3) == pytest.approx(0)
    assert deviation([0] * 8, 3) == pytest.approx(0.75)
    # Kolmogorov's 95 % quantile is 1.36/sqrt(N) for large N and fine ranks
    assert deviation_limit(400, 10_000) == pytest.approx(1.36 / 20, rel=0.1)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("d", [2, 16, 64])
def test_problems_keep_several_modes(operator: Any, d: int) -> None:
    """With one mode left there would be nothing for mode weights to measure; at d = 2 one measured direction is all."""
    A = make_operator(operator, d)
    assert len(dense_matrix(A, (1, 1, 2) if d == 2 else (1, int(d**0.5), int(d**0.5)), 1, torch.zeros(1))[0]) <= d
    prior = make_prior(PriorSpec("mixture", d), A)
    _, y = make_measurement(prior, A, 0.3, 1)
    weights = prior.posterior(A, y, 0.3).weights
    assert float((-weights * weights.clamp_min(1e-300).log()).sum().exp()) > 1.3
    assert 0.1 < float(prior.covariance.diagonal().mean()) ** 0.5 < 1.0


def tiny(**changes: Any) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "kind": "exact",
        "name": "tiny",
        "methods": {"eps": {}, "palette": {}, "mpgd": {"tune": {"scale": [0.3, 3.0]}, "nfe": [30]}},
        "tuning": {"samples": 40},
        "picture": {"nfe": 30, "points": 20},
        "grids": [
            {"priors": [{"kind": "mixture", "d": 2}], "operators": ["projection"], "sigma_y": [0.05],
             "nfe": [1, 30], "samples": 200},
            {"priors": [{"kind": "gaussian", "d": 16}], "operators": ["blur"], "sigma_y": [0.05], "nfe": [30],
             "samples": 200, "methods": ["eps"], "told": [{}, {"sigma_y": 4.0}, {"blur": 0.5}]},
        ],
        "calibration": [{"prior": {"kind": "mixture", "d": 2}, "operator": "projection", "sigma_y": 0.05, "nfe": 20,
                         "draws": 60, "samples": 9, "methods": ["eps"]}],
    }  # fmt: skip
    return {**recipe, **changes}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The tiny recipe, run to its end in two parts by the command."""
    pytest.importorskip("yaml")
    import yaml

    folder = tmp_path_factory.mktemp("exact")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny()))
    arguments = ["benchmark", str(folder / "tiny.yaml"), "--out", str(folder / "run"), "--limit", "4"]
    assert cli.run(arguments) == 0
    assert len((folder / "run" / "rows.jsonl").read_text().splitlines()) == 4
    assert cli.run([*arguments[:-2], "--document", str(folder / "docs" / "page.md")]) == 0
    return folder, [json.loads(line) for line in (folder / "run" / "rows.jsonl").read_text().splitlines()]


def test_processes_leave_the_report_to_the_last(
    finished: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first to finish would write a report without the others' rows, or the last one without those of the first."""
    folder, rows = finished
    monkeypatch.setenv("WORLD_SIZE", "2")
    shared = folder / "shared"
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        assert cli.run(["benchmark", str(folder / "tiny.yaml"), "--out", str(shared)]) == 0
        assert (shared / "report.md").exists() == (rank == 0)
    there = [json.loads(line) for line in (shared / "rows.jsonl").read_text().splitlines()]
    assert {r["id"]: r.get("distances") for r in there} == {r["id"]: r.get("distances") for r in rows}


def find(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    (row,) = [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]
    return row


def test_exact_denoiser_reaches_the_floor(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    """The benchmark's own claim: EPS within what exact samples reach, its mean alone not, MPGD neither, and Palette the
    same numbers as EPS."""
    _, rows = finished
    eps = find(rows, kind="distances", method="eps", nfe=30, d=2)
    assert eps["distances"]["sw2"] < 1.5 * eps["limit"]["sw2"]
    assert find(rows, kind="distances", method="eps", nfe=1, d=2)["distances"]["covariance"] > 0.9
    assert find(rows, method="palette", nfe=30, d=2)["distances"] == eps["distances"]
    assert find(rows, method="mpgd", d=2)["distances"]["sw2"] > 1.5 * eps["limit"]["sw2"]
    assert (eps["evaluations"], eps["backward"]) == (30.005, 0)
    assert eps["seconds"] > 0
    assert eps["peak_memory_mib"] > 50
    assert eps["versions"]["torch"] == torch.__version__.split("+")[0] or eps["versions"]["torch"] == torch.__version__


def test_tuning_takes_the_best_candidate(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    """The recorded setting would not be the one that did best on the other measurement."""
    row = find(finished[1], method="mpgd", d=2)
    assert set(row["tuned"]) == {"0.3", "3.0"}
    assert row["settings"]["scale"] == float(min(row["tuned"], key=row["tuned"].__getitem__))


def test_wrong_models_are_measured_against_the_truth(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    """Compared with the told model's own posterior, every wrong model would look harmless. For a Gaussian the error of
    the mean is known in closed form."""
    _, rows = finished
    A = make_operator("blur", 16)
    prior = make_prior(PriorSpec("gaussian", 16), A)
    _, y = make_measurement(prior, A, 0.05, 1)
    true = prior.posterior(A, y, 0.05)
    for told, B, level in (
        ({"sigma_y": 4.0, "blur": 1.0}, A, 0.2),
        ({"sigma_y": 1.0, "blur": 0.5}, make_operator("blur", 16, width=0.5), 0.05),
    ):
        wrong = prior.posterior(B, y, level)
        expected = float((wrong.mean - true.mean).norm() / true.covariance.trace().sqrt())
        for method in (FLOOR, "eps"):
            row = find(rows, kind="wrong model", method=method, told=told)
            assert row["distances"]["mean"] == pytest.approx(expected, rel=0.2)
            assert row["distances"]["sw2"] > row["limit"]["sw2"]


def test_report_from_rows_alone(finished: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    """Readers who have the rows would get another report, or have to measure again."""
    folder, _ = finished
    rows = folder / "run" / "rows.jsonl"
    again = ["benchmark", str(folder / "tiny.yaml"), "--rows", str(rows), "--document", str(tmp_path / "page.md")]
    before = rows.read_bytes()
    assert cli.run(again) == 0
    assert (tmp_path / "page.md").read_text() == (folder / "docs" / "page.md").read_text()
    assert rows.read_bytes() == before


def test_report_says_what_the_rows_say(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    """A table from other rows, a figure that is missing, or a LaTeX table that differs from the page."""
    folder, rows = finished
    page = (folder / "docs" / "page.md").read_text()
    eps = find(rows, kind="distances", method="eps", nfe=30, d=2)
    gaussian = find(rows, kind="distances", method="eps", nfe=30, d=16)
    ratios = [r["distances"]["sw2"] / r["floor"]["sw2"] for r in (eps, gaussian)]
    assert f"| eps | 30 | {ratios[0]:.2f} | {ratios[1]:.2f} | {max(ratios):.2f} |" in page
    assert f"eps & 30 & {ratios[0]:.2f} & {ratios[1]:.2f}" in (folder / "run" / "tables.tex").read_text()
    wrong = find(rows, kind="wrong model", method="eps", told={"sigma_y": 4.0, "blur": 1.0})
    told = [line for line in page.splitlines() if line.startswith("| eps |") and f"{ratios[1]:.2f}" in line]
    assert any(f"{wrong['distances']['sw2'] / wrong['floor']['sw2']:.2f}" in line for line in told)
    for name in ("curves", "pictures", "ranks"):
        assert f"(figures/tiny-{name}.png)" in page
        with Image.open(folder / "docs" / "figures" / f"tiny-{name}.png") as picture:
            assert picture.mode == "P"
            assert min(picture.size) > 80
    assert len(eps["points"]) == 20
    assert (folder / "run" / "tables" / "summary.csv").read_text().startswith("method,NFE,mixture 2,gaussian 16,worst")
    ranks = find(rows, kind="calibration", method="eps")["ranks"]
    assert set(ranks) == set(FUNCTIONS)
    assert all(len(r) == 60 and max(r) <= 9 for r in ranks.values())


def test_needed_evaluations_are_those_it_stays_at() -> None:
    """A lucky row in the middle would count as convergence, a problem never solved as solved."""

    def row(seed: int, nfe: int, value: float | None) -> dict[str, Any]:
        problem = {"prior": "gaussian", "d": 2, "operator": "blur", "sigma_y": 0.1, "seed": seed}
        return {**problem, "method": "m", "nfe": nfe, "distances": {"sw2": value}, "floor": {"sw2": 1.0},
                "limit": {"sw2": 1.2}}  # fmt: skip

    rows = [row(0, 5, 1.0), row(0, 10, 9.0), row(0, 20, 1.1), row(0, 50, 1.0), row(1, 10, 3.0), row(1, 50, 1.5)]
    assert evaluations_needed(rows, "m", 0.0) == (20, 1, 2)
    assert evaluations_needed(rows, "m", 2.0) == (20, 2, 2)
    assert evaluations_needed([row(0, 5, None)], "m", 4.0) == (None, 0, 1)


def test_patch_mixtures_are_fitted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes of fitting would be repeated, a fit to other photos reused, or something else fitted than windows."""
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "b.png"):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8))
        coarse.resize((48, 40), Image.Resampling.BICUBIC).save(photos / name)
    patches = read_patches([photos / "a.png"], 4, 50, 0)
    with Image.open(photos / "a.png") as opened:
        halved = np.asarray(opened.resize((24, 20), Image.Resampling.BOX), dtype=float) / 127.5 - 1
    assert any(np.allclose(halved[i : i + 4, j : j + 4].ravel(), patches[7]) for i in range(17) for j in range(21))

    fit = PatchFit(patches=600, iterations=5, ridge=1e-3)
    mixture = patch_mixture(photos, 16, 3, fit, tmp_path / "fits")
    held_out = torch.from_numpy(read_patches(sorted(photos.glob("*.png")), 4, 500, 1))
    single = GaussianMixture(
        torch.ones(1), held_out.mean(0)[None], (torch.cov(held_out.T) + 1e-3 * torch.eye(16))[None]
    )
    assert float(mixture.log_prob(held_out).mean()) > float(single.log_prob(held_out).mean())
    monkeypatch.setattr("posteriori.bench.patches.fit_patches", lambda *a: pytest.fail("fitted twice"))
    assert torch.equal(patch_mixture(photos, 16, 3, fit, tmp_path / "fits").means, mixture.means)
    name = fit_name(photos, 16, 3, fit)
    (photos / "b.png").unlink()
    assert fit_name(photos, 16, 3, fit) != name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": {"epss": {}}}, "'epss' is no method"),
        ({"kind": "exakt"}, "kind must be one of exact"),
        ({"calibration": [{"prior": {"kind": "mixture", "d": 17}}]}, "d must be 2 or the square"),
        ({"sample": 5}, "unknown key 'sample'"),
        ({"methods": {"dps": {"tune": {"zeta": []}}}}, "at least one candidate"),
        ({"photos": "/nowhere", "grids": [{"priors": [{"kind": "patches", "d": 64}], "sigma_y": [0.1], "nfe": [5]}]},
         "no photo"),
    ],
)  # fmt: skip
def test_bad_recipes_say_what_is_wrong(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A typing error would be noticed after an hour, or end in a traceback."""
    import yaml

    recipe = tmp_path / "bad.yaml"
    recipe.write_text(yaml.safe_dump(tiny(**change)))
    assert cli.run(["benchmark", str(recipe), "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err


def test_recipes_are_complete() -> None:
    """A shipped recipe that cannot be read, misses a method, or has the same row twice."""
    counts = {}
    for name in ("exact", "exact-full"):
        content = read_recipe(RECIPES / f"{name}.yaml")
        assert content.pop("kind") == "exact"
        run = ExactBenchmark(build(ExactRecipe, content), Path("nowhere"))
        keys = [json.dumps(c.key, sort_keys=True) for c in run.cells()]
        assert len(set(keys)) == len(keys)
        methods = {json.loads(k)["method"] for k in keys}
        assert methods == {FLOOR, *run.plan.methods}
        counts[name] = len(keys)
    assert counts["exact-full"] > 8 * counts["exact"]
    with pytest.raises(RecipeError, match="must be one of methods"):
        build(ExactRecipe, {"name": "x", "methods": {"eps": {}}, "grids": [
            {"priors": [{"kind": "gaussian", "d": 2}], "sigma_y": [0.1], "nfe": [1], "methods": ["dps"]}]})  # fmt: skip
