"""The photo model over the settings of a task: problems as said, figures that are those of the model and the photo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from posteriori.bench import photo_settings
from posteriori.bench.common import read_photo, seed_of
from posteriori.bench.photo_settings import SETTINGS, Setting, means, table
from posteriori.bench.runner import read_rows
from posteriori.checkpoint import load
from posteriori.operators import Downsampling
from posteriori.pivot import measure
from posteriori.posterior import ExactPosterior
from posteriori.recipe import load_recipe
from posteriori.tasks import TaskMixture
from tiny_model import save_tiny_model

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SIZE = 64


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        rough = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(rough).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / name)
    return folder


def test_settings_measure_what_they_are_named_after() -> None:
    """A curve over the missing share, the factor or the width would be one over something else."""
    x = torch.rand(1, 3, SIZE, SIZE) * 2 - 1
    for share in SETTINGS["random"]:
        observed = Setting("random", share).operator(SIZE, 3).observed(torch.zeros_like(x)).double().mean()
        assert float(observed) == pytest.approx(1 - share, abs=2 / SIZE)  # four deviations
    for side in SETTINGS["box"]:
        observed = Setting("box", side).operator(SIZE, 3).observed(torch.zeros_like(x)).double().mean()
        assert float(observed) == pytest.approx(1 - side**2, abs=1 / SIZE)
    for family in ("sr", "sr-bicubic"):
        for factor in SETTINGS[family]:
            setting = Setting(family, factor)
            side = setting.side(SIZE)
            assert SIZE - factor < side <= SIZE
            assert setting.operator(side, 3).forward(x[..., :side, :side]).shape[-1] == side // factor
    point = torch.zeros(1, 1, SIZE, SIZE)
    point[..., SIZE // 2, SIZE // 2] = 1
    place = torch.arange(SIZE, dtype=torch.float32) - SIZE // 2
    for width in (1.0, 2.0, 3.0, 4.0):  # wider ones meet the borders of so small a picture
        spread = Setting("gaussian", width).operator(SIZE, 3).forward(point)[0, 0].sum(0)
        assert float((spread * place.square()).sum() ** 0.5) == pytest.approx(width, rel=0.02)
    assert {Setting(f, v).sigma_y for f, values in SETTINGS.items() for v in values if "noise" not in f} == {0.05}
    assert [Setting("noise-sr", v).sigma_y for v in SETTINGS["noise-sr"]] == list(SETTINGS["noise-sr"])


def test_rows_are_the_model_s_own_and_a_run_continues(photos: Path, tmp_path: Path) -> None:
    """PSNR of another model, photo or measurement; or everything measured twice."""
    model = save_tiny_model(tmp_path / "model")
    out = tmp_path / "out"
    options = [str(photos), "--out", str(out), "--model", str(model), "--size", str(SIZE), "--families", "sr"]
    photo_settings.main(options)
    rows = [r for r in read_rows(out / "rows.jsonl") if r["value"] == 3 and r["photo"] == "b.png"]
    own = next(r for r in rows if r["model"] != "smooth")
    x_0 = read_photo(photos / "b.png", 63)
    A, seed = Downsampling(3), seed_of("b.png")
    mean = ExactPosterior(load(str(model)), A, measure(A, x_0, 0.05, seed=seed), 0.05).mean()
    assert own["psnr"] == pytest.approx(
        float(10 * torch.log10(4 / (mean.clamp(-1, 1) - x_0).square().mean())), abs=1e-3
    )
    before = (out / "rows.jsonl").read_text()
    photo_settings.main(options)
    assert (out / "rows.jsonl").read_text() == before
    report = (out / "report.md").read_text()
    assert report.count("super-resolution, box average, factor") == len(SETTINGS["sr"])
    assert (out / "figures" / "photo-settings.png").stat().st_size > 1000


def test_means_and_gain() -> None:
    rows = [
        {"family": "sr", "value": 2, "model": m, "psnr": p}
        for m, p in (("smooth", 20.0), ("smooth", 22.0), ("A", 23.0), ("A", 24.0))
    ]
    found = means([*rows, {"family": "sr", "value": 2, "model": "A", "error": "none"}])
    assert found == {"sr": {2: {"smooth": 21.0, "A": 23.5}}}
    assert table(found, ["A"]).endswith("| 2 | 21.00 | 23.50 | +2.50 |")


def test_every_factor_occurs_in_training() -> None:
    """A factor that divides no crop is never drawn: the bundled model was never shown threefold super-resolution."""
    drawn: set[int] = set()
    for crop in load_recipe(RECIPES / "photo.yaml").crops:
        for seed in range(60):
            _, A, _ = TaskMixture(shares={"sr": 1.0}).draw(1, crop.size, np.random.default_rng(seed))
            drawn.add(crop.size // A.forward(torch.zeros(1, 3, crop.size, crop.size)).shape[-1])
    assert drawn == {2, 3, 4, 8}
