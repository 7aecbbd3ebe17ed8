"""Outputs of the image benchmark: what pages, figures and tables show is what rows say, whoever writes them again."""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from posteriori.bench import images_pool
from posteriori.bench.images import ImageBenchmark
from posteriori.bench.images_charts import HEIGHT, chart
from posteriori.bench.images_figures import calibration_errors, curve_columns, curve_points, styles, ticks
from posteriori.bench.images_pictures import STD_TOP
from posteriori.bench.images_pool import Entry
from posteriori.bench.images_recipe import ImageRecipe
from posteriori.bench.images_tables import QUALITY, win_tables
from posteriori.bench.runner import Rows, measure_cells, read_rows, report_again
from posteriori.bench.tables import Table
from posteriori.cli import app
from posteriori.priors import Gaussian
from posteriori.recipe import RecipeError, build
from tiny_data import png, write_shard

SIDE, IMAGES, SAMPLES = 8, 6, 3
SHAPE = (3, SIDE, SIDE)
ASSETS = Path(images_pool.__file__).parent


def prior() -> Gaussian:
    points = torch.stack(torch.meshgrid(*[torch.arange(float(s)) for s in SHAPE], indexing="ij"), -1).reshape(-1, 3)
    cov = 0.06 * torch.exp(-torch.cdist(points, points) / 3)
    return Gaussian(torch.zeros(len(points), dtype=torch.float64), cov.double(), shape=SHAPE)


CONTENT: dict[str, Any] = {
    "name": "tiny", "source": {"shards": "test*.tar"}, "size": SIDE, "sigma_y": 0.1, "features": "none", "batch": 3,
    "grids": [{"images": IMAGES, "samples": SAMPLES, "tasks": ["random", "sr4"]}],
    "methods": {"eps": {"nfe": [1, 2, 4]}, "ddnm": {"nfe": [3]}, "linear": {}}, "keep_images": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run in ``run/`` and what would be published of it in ``docs/``."""
    root = tmp_path_factory.mktemp("page")
    drawn = prior().sample(IMAGES, torch.Generator().manual_seed(0)).clamp(-1, 1)
    pixels = ((drawn + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    (root / "data").mkdir()
    write_shard(root / "data" / "test.tar", {f"{i:03d}.png": png(p) for i, p in enumerate(pixels)})
    (root / "recipe.yaml").write_text(json.dumps({"kind": "images", **CONTENT}))
    (root / "paper.json").write_text(
        json.dumps({"source": "S", "own": {"Super-res (4x)": [{"method": "EPS & <co>", "psnr": 31.5}]}})
    )
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(images_pool, "FEWEST", IMAGES)  # so that there are distances between sets
    changes = {"data": str(root / "data"), "paper": str(root / "paper.json"), "paper_set": "own"}
    bench = ImageBenchmark(build(ImageRecipe, {**CONTENT, **changes}), root / "run", denoisers={"eps": prior()})
    rows = Rows(root / "run" / "rows.jsonl")
    measure_cells(bench.cells(), rows)
    bench.report(rows.of(bench.cells()), root / "docs" / "report.md")
    monkeypatch.undo()
    return root


class Page(HTMLParser):
    """Tables of a page as their caption, header and cells, bold ones in two stars, and all names of its elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "img", "br"):
            self.open.append(tag)
        if tag == "table":
            self.table: list[list[str]] = []
        elif tag == "tr":
            self.table.append([])
        elif tag in ("td", "th"):
            self.table[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag  # every element is closed, in order
        if tag == "table":
            self.tables[self.text["caption"]] = self.table
        if tag == "caption":
            return

    def handle_data(self, data: str) -> None:
        if not self.open:
            return
        if self.open[-1] in ("caption", "script"):
            self.text[self.open[-1]] = data
        if "tr" in self.open and self.open[-1] != "tr":
            self.table[-1][-1] += f"**{data}**" if self.open[-1] == "b" else data


def markdown_tables(text: str) -> dict[str, list[list[str]]]:
    """The tables of a document by the sentence above them."""
    found, title = {}, ""
    for block in text.split("\n\n"):
        if block.startswith("| "):
            lines = [[c.strip() for c in line.strip("|").split("|")] for line in block.strip().split("\n")]
            found[title.removesuffix(".")] = [lines[0], *lines[2:]]
        title = block
    return found


def test_the_page_shows_the_documents_tables(finished: Path) -> None:
    """A number, or what is bold, would differ between the page, the Markdown and the CSV."""
    tables = markdown_tables((finished / "docs" / "report.md").read_text())
    page = Page((finished / "docs" / "report.html").read_text())
    assert len(tables) == 8  # two of wins, two of each task, one of a paper, one of settings
    assert page.tables == tables
    assert any("**" in c for line in tables["sr4: quality of one sample, the best in bold"] for c in line)
    files = {p.stem: list(csv.reader(p.open())) for p in (finished / "docs" / "tables").glob("*.csv")}
    plain = sorted([[c.strip("*") for c in line] for line in table] for table in tables.values())
    assert plain == sorted(files.values())
    latex = (finished / "docs" / "tables.tex").read_text()
    assert latex.count(r"\toprule") == len(tables)
    for table in tables.values():
        assert all(len(line) == len(table[0]) for line in table)
        for line in table[1:]:
            cells = [re.sub(r"\*\*(.+)\*\*", r"\\textbf{\1}", c.replace("&", r"\&").replace("_", r"\_")) for c in line]
            assert " & ".join(cells) + r" \\" in latex


def test_quality_is_that_of_the_rows(finished: Path) -> None:
    """The tables agree with each other and not with what was measured."""
    rows = read_rows(finished / "run" / "rows.jsonl")
    table = markdown_tables((finished / "docs" / "report.md").read_text())[
        "sr4: quality of one sample, the best in bold"
    ]
    for line in table[1:]:
        cells = dict(zip(table[0], (c.strip("*") for c in line), strict=True))
        mine = [r for r in rows if (r["task"], r["method"], str(r["nfe"])) == ("sr4", cells["method"], cells["NFE"])]
        for column, name, scale in (("PSNR", "psnr", 1), ("CRPS pixels x100", "crps", 100)):
            assert float(cells[column]) == pytest.approx(
                scale * np.mean([v for r in mine for v in r["per_image"][name]]), abs=0.0051
            )
        assert cells["set"] == str(IMAGES)
        assert math.isfinite(float(cells["MMD pixels x1000"]))


def test_the_page_is_alone_and_accessible(finished: Path) -> None:
    """It would need a network, leak pictures into what is published, or leave out who cannot see or use a mouse."""
    text = (finished / "docs" / "report.html").read_text()
    page = Page(text)
    tags = [tag for tag, _ in page.elements]
    assert page.open == []
    for tag, attributes in page.elements:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    assert "http" not in text.replace("application/http", "")
    assert "url(" not in text.split("<body>")[0]
    assert tags.count("img") == 1  # calibration; it has a text
    assert all(a.get("alt") for t, a in page.elements if t == "img")
    assert all(a.get("scope") in ("col", "row") for t, a in page.elements if t == "th")
    assert all(a.get("aria-label") or a.get("aria-hidden") for t, a in page.elements if t == "svg")
    assert tags.count("caption") == tags.count("table") == 8
    assert "prefers-color-scheme: dark" in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.elements
    assert not [a for t, a in page.elements if a.get("id") == "viewer"]
    assert str(finished) not in text + (finished / "docs" / "report.md").read_text()
    names = {a["data-name"] for t, a in page.elements if t == "g"}
    assert names == {"eps", "ddnm", "linear"} == {a["value"] for t, a in page.elements if a.get("type") == "checkbox"}


def test_nothing_published_is_made_of_pixels(finished: Path) -> None:
    """Pictures of people would be committed."""
    files = sorted(str(p.relative_to(finished / "docs")) for p in (finished / "docs").rglob("*") if p.is_file())
    rest = [f for f in files if not f.startswith("tables/")]
    assert rest == [
        "calibration.png", "curves.png", "report.html", "report.md", "rows.jsonl.gz", "sets.json", "tables.tex"
    ]  # fmt: skip
    assert not [f for f in files if f.startswith("tables/") and not f.endswith(".csv")]


def test_a_report_from_committed_rows_is_the_same(finished: Path, tmp_path: Path) -> None:
    """Another reader, without models, data and features, would get other tables than those published."""
    place = tmp_path / "copy"
    place.mkdir()
    for name in ("rows.jsonl.gz", "sets.json"):
        shutil.copy(finished / "docs" / name, place)
    changes = [f"paper={finished / 'paper.json'}", "paper_set=own"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images_pool, "FEWEST", IMAGES)
        assert report_again(finished / "recipe.yaml", place / "rows.jsonl.gz", changes) == place / "report.md"
        first = (place / "rows.jsonl.gz").read_bytes()
        command = ["benchmark", str(finished / "recipe.yaml"), "--rows", str(place / "rows.jsonl.gz"), "--document",
                   str(tmp_path / "else" / "report.md"), "--paper", str(finished / "paper.json"), "--set",
                   "paper_set=own"]  # fmt: skip
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
    for other in (place, tmp_path / "else"):
        for path in (p for p in (finished / "docs").rglob("*") if p.is_file()):
            assert (other / path.relative_to(finished / "docs")).read_bytes() == path.read_bytes(), path.name
    assert first == (place / "rows.jsonl.gz").read_bytes()


def test_rows_of_another_recipe_are_refused(finished: Path, tmp_path: Path) -> None:
    """An empty report instead of the reason."""
    rows = finished / "docs" / "rows.jsonl.gz"
    with pytest.raises(RecipeError, match="no row of the recipe"):
        report_again(finished / "recipe.yaml", rows, ["methods={tv: {}}"], tmp_path / "report.md")
    broken = tmp_path / "rows.jsonl.gz"
    broken.write_bytes(rows.read_bytes()[:-40])
    with pytest.raises(RecipeError, match="cannot be read"):
        report_again(finished / "recipe.yaml", broken)
    broken.write_bytes(gzip.compress(b'{"id": "a"}\n[1]\n'))
    with pytest.raises(RecipeError, match="line 2: not a row"):
        report_again(finished / "recipe.yaml", broken)


def test_pictures_are_those_that_were_kept(finished: Path) -> None:
    """The viewer would show another image, sample or method than it says."""
    run = finished / "run"
    page = Page((run / "report.html").read_text())
    (viewer,) = [a for _, a in page.elements if a.get("id") == "viewer"]
    assert viewer["aria-label"]
    pictures = json.loads((run / "pictures" / "pictures.json").read_text())
    assert json.dumps(pictures) in (run / "report.html").read_text()
    assert set(pictures["tasks"]) == {"random", "sr4"}
    rows = read_rows(run / "rows.jsonl")
    for task, scene in pictures["tasks"].items():
        assert [(m["name"], m["nfe"]) for m in scene["methods"]] == [
            ("eps", 1), ("eps", 2), ("eps", 4), ("ddnm", 3), ("linear", 0)
        ]  # fmt: skip
        sheet = np.asarray(Image.open(run / scene["file"]))
        assert sheet.shape == (IMAGES * SIDE, 2 * SIDE, 3)
        for m in scene["methods"]:
            mine = [r for r in rows if (r["task"], r["method"], r["nfe"]) == (task, m["name"], m["nfe"])]
            kept = [np.load(run / "features" / f"{r['id']}.npz") for r in sorted(mine, key=lambda r: r["first"])]
            samples = np.concatenate([k["images"] for k in kept], 1).transpose(0, 1, 3, 4, 2)
            truth = np.concatenate([k["true_images"] for k in kept], 1)[0].transpose(0, 2, 3, 1)
            picture = np.asarray(Image.open(run / m["file"])).reshape(IMAGES, SIDE, len(m["columns"]), SIDE, 3)
            picture = picture.transpose(2, 0, 1, 3, 4)
            assert np.array_equal(picture[-len(samples) :], samples)
            assert np.array_equal(sheet[:, :SIDE].reshape(IMAGES, SIDE, SIDE, 3), truth)
            assert m["psnr"] == [f"{v:.2f}" for r in mine for v in r["per_image"]["psnr"]]
            if len(samples) > 1:
                assert m["columns"] == ["mean", "std", "sample 1", "sample 2", "sample 3"]
                assert np.abs(picture[0] - samples.mean(0)).max() <= 0.5
                std = np.sqrt((samples / 127.5).var(0, ddof=1).mean(-1)) / STD_TOP
                brightness = picture[1].sum(-1)
                order = std.argsort(axis=None)
                assert (np.diff(brightness.flatten()[order].astype(int)) >= -2).mean() > 0.99  # brighter: less certain
            else:
                assert m["columns"] == ["estimate"]
    measured = np.asarray(Image.open(run / pictures["tasks"]["sr4"]["file"]))[:, SIDE:].reshape(IMAGES, SIDE, SIDE, 3)
    blocks = measured.reshape(IMAGES, 2, 4, 2, 4, 3)
    assert (blocks == blocks[:, :, :1, :, :1]).all()  # averages, as blocks


def test_pictures_of_an_earlier_report_go(finished: Path, tmp_path: Path) -> None:
    """The folder would keep pictures of methods that the report no longer has."""
    shutil.copytree(finished / "run", tmp_path / "run")
    plan = build(ImageRecipe, {**CONTENT, "data": str(finished / "data"), "only": ["eps"]})
    bench = ImageBenchmark(plan, tmp_path / "run", denoisers={"eps": prior()})
    rows = Rows(tmp_path / "run" / "rows.jsonl")
    bench.report(rows.of(bench.cells()), tmp_path / "run" / "report.md")
    assert {p.stem for p in (tmp_path / "run" / "pictures" / "sr4").glob("*")} == {"truth", "eps-1", "eps-2", "eps-4"}
    assert 'id="viewer"' in (tmp_path / "run" / "report.html").read_text()  # the document lies in the run's folder
    assert not (tmp_path / "run" / "rows.jsonl.gz").exists()


def lines() -> list[Entry]:
    return [
        Entry("eps", "t", 1, 64, 1, 500, {"psnr": 22.0, "frechet": 60.0, "crps": 0.09}),
        Entry("eps", "t", 8, 64, 4, 500, {"psnr": 20.0, "frechet": 30.0, "crps": 0.05}),
        Entry("eps", "t", 20, 64, 4, 500, {"psnr": 20.5, "frechet": 28.0, "crps": 0.05}),
        Entry("dps", "t", 250, 8, 2, 0, {"psnr": 19.0, "crps": 0.06}),
        Entry("ddrm", "t", 20, 64, 4, 64, {"psnr": 19.0, "frechet": 10.0, "crps": 0.04}),
        Entry("tv", "t", 0, 64, 1, 500, {"psnr": 22.0, "frechet": 31.0, "crps": 0.09}),
    ]


def test_counts_of_wins() -> None:
    """A tie would count for one method alone, or a method twice for two numbers of evaluations."""
    other = [Entry("eps", "u", 8, 4, 2, 0, {"psnr": 9.0}), Entry("tv", "u", 0, 4, 1, 0, {"psnr": 8.0})]
    tables = win_tables({"t": lines(), "u": other}, {"frechet": "F", "distance": "", "kernel": ""})
    by_column, by_task = tables["wins-by-column"], tables["wins-by-task"]
    assert by_column.header == ["method", "PSNR (of 2)", "F (of 1)", "CRPS pixels x100 (of 1)", "all (of 4)"]
    assert by_column.rows == [["eps", 2, 1, 0, 3], ["dps", 0, 0, 0, 0], ["ddrm", 0, 0, 1, 1], ["tv", 1, 0, 0, 1]]
    assert by_task.header == ["method", "t (of 3)", "u (of 1)", "all (of 4)"]
    assert by_task.rows[0] == ["eps", 2, 1, 3]
    assert "| **2** | **1** | 0 | **3** |" in by_column.markdown()
    assert win_tables({"t": lines()[:2]}, {"frechet": "F", "distance": "", "kernel": ""}) == {}


def test_points_of_curves() -> None:
    """Sets of other sizes would share an axis, and a method's line would jump back and forth."""
    columns = {c.name: c for c in QUALITY}
    assert [c.name for c in curve_columns({"t": lines()})] == ["frechet", "crps", "psnr"]
    assert curve_points(lines()[::-1], columns["frechet"]) == {"tv": [(0, 31)], "eps": [(1, 60), (8, 30), (20, 28)]}
    assert curve_points(lines(), columns["crps"])["ddrm"] == [(20, 4.0)]


def test_charts_put_values_where_they_belong() -> None:
    """Higher values would be lower on a chart, or later evaluations to the left."""
    columns = {c.name: c for c in QUALITY}
    names = {"frechet": "F", "distance": "", "kernel": ""}
    methods = ["eps", "dps", "ddrm", "tv"]
    for name in ("psnr", "crps"):
        svg = chart(lines(), columns[name], names, styles(methods))
        at = re.findall(r"translate\(([\d.]+) ([\d.]+)\)[^>]*><title>(\w+): ([\d.]+) at (\d+) NFE", svg)
        assert len(at) == 5
        places = sorted((int(nfe), float(x)) for x, _, _, _, nfe in at)
        assert [p[1] for p in places] == sorted(p[1] for p in places)
        values = sorted((float(v), -float(y)) for _, y, _, v, _ in at)
        assert [v[1] for v in values] == sorted(v[1] for v in values)
        assert all(0 < float(y) < HEIGHT for _, y, _, _, _ in at)
        assert "<title>tv: " in svg  # without evaluations: a line
    assert chart(lines()[3:4], columns["frechet"], names, styles(methods)) == ""


@pytest.mark.parametrize(("low", "high", "log"), [(3.4, 5.2, True), (0.02, 60.0, True), (17.8, 22.7, False)])
def test_ticks_are_round_and_few(low: float, high: float, log: bool) -> None:
    """An axis without numbers, or with numbers on top of each other."""
    found = ticks(low, high, log)
    assert 2 <= len(found) <= 6
    assert all(low <= t <= high for t in found)
    assert all(len(f"{t:.6g}".strip("0").replace(".", "")) <= 2 for t in found)


def test_methods_can_be_told_apart() -> None:
    """Two methods would look the same."""
    found = styles(["eps", *[f"m{i}" for i in range(36)]])
    looks = {(s.colour, s.marker) for s in found.values()}
    assert len(looks) == 37
    assert [m for m, s in found.items() if s.ours] == ["eps"]


def test_variance_follows_from_two_errors() -> None:
    """The figure would call samples too varied that are right: n samples of N(0, s^2) about a mean that is off by b."""
    rng = np.random.default_rng(0)
    x = rng.normal(0.3, 0.7, (5, 200_000))
    reference = 0.49
    values = {"ratio_one": (x**2).mean() / reference, "ratio_mean": (x.mean(0) ** 2).mean() / reference,
              "residual": 1.1, "inside_50": 0.4, "nominal_50": 0.5}  # fmt: skip
    found = calibration_errors(Entry("m", "t", 8, 1, 5, 0, values))
    assert found["variance"] == pytest.approx(x.var(0, ddof=1).mean() / reference, rel=1e-9)
    assert found["variance"] == pytest.approx(1, rel=0.01)
    assert found["coverage 50"] == pytest.approx(-0.1)
    assert found["residual"] == 1.1
    assert calibration_errors(Entry("m", "t", 1, 1, 1, 0, {"ratio_one": 1.0})) == {}


def test_text_is_escaped() -> None:
    """A name with a sign of HTML would break the page."""
    page = Page(Table("a < b", ["x & y"], [["<script>"], ['"']]).html())
    assert page.tables == {"a < b": [["x & y"], ["<script>"], ['"']]}


@pytest.mark.skipif(shutil.which("node") is None, reason="no node here to parse the script with")
def test_the_script_is_a_program(tmp_path: Path) -> None:
    """A typing error in it leaves a page that neither sorts nor filters."""
    done = subprocess.run(["node", "--check", str(ASSETS / "page.js")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
