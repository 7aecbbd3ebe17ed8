"""Damaged photos: the damage is what it says, the command restores it, and the page keeps what was written by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from posteriori.bench import photo_cost, photo_damage, photo_reality
from posteriori.bench.photo_reality import CASES, Case, Run
from posteriori.cli import run
from tiny_model import save_tiny_model

LICENCE = "https://creativecommons.org/licenses/by/2.0/"


def flat(value: int, side: int = 256) -> Image.Image:
    return Image.new("RGB", (side, side), (value, value, value))


def signal(picture: Image.Image) -> np.ndarray:
    """Pixels in [-1, 1]."""
    return np.asarray(picture, dtype=np.float64) / 127.5 - 1


def test_noise_is_as_strong_as_the_page_says() -> None:
    """A factor of two between [0, 1] and [-1, 1], or deviations for variances, would make every figure another
    problem's. Rounding to 8 bits adds (1/127.5)^2/12; the errors are four standard errors of 200,000 values."""
    rng = np.random.default_rng(0)
    error = 4 / np.sqrt(2 * 3 * 256**2)
    grey = signal(flat(128))
    white = signal(photo_damage.white_noise(flat(128), 0.15, rng)) - grey
    assert white.std() == pytest.approx(0.15, rel=error + 1e-3)
    for value in (64, 128):
        v = value / 255
        counts = signal(photo_damage.photon_noise(flat(value), 150, rng)) - signal(flat(value))
        assert counts.std() == pytest.approx(2 * np.sqrt(v / 150), rel=error + 2e-3)
        assert abs(counts.mean()) < 5 * counts.std() / np.sqrt(counts.size)
    coarse = signal(photo_damage.coarse_noise(flat(128), rng)) - grey
    assert coarse.std() == pytest.approx(0.1, rel=4 * error)  # fewer independent values than pixels
    neighbours = (coarse[:, 1:] * coarse[:, :-1]).mean() / coarse.var()
    # white noise smoothed by a Gaussian of width w has the autocorrelation exp(-d^2/(4 w^2)); 2 % of it is white
    assert neighbours == pytest.approx(0.98 * np.exp(-1 / (4 * photo_damage.GRAIN**2)), abs=0.02)
    assert photo_damage.grain_power((64, 48)).mean() == pytest.approx(1.0)


def test_masks_hide_all_damage() -> None:
    """A scratch beside the mask would be measured as a part of the photo; a mask of everything would prove nothing."""
    for make in (photo_damage.scratched, photo_damage.torn):
        damaged = make(flat(60), np.random.default_rng(1))
        assert damaged.mask is not None
        missing = np.asarray(damaged.mask) > 127
        bright = (signal(damaged.picture) > 0.3).any(-1)  # the photo is dark, its noise 0.04
        assert bright.any()
        assert not (bright & ~missing).any()
        assert 0.02 < missing.mean() < 0.4


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(60, 200, (4, 4, 3), dtype=np.uint8))
    coarse.resize((192, 192), Image.Resampling.BICUBIC).save(tmp_path / "nips17_abc.png")
    head = "image_id,split,author,author_profile,landing_url,licence\n"
    (tmp_path / "by.csv").write_text(f"{head}abc,test,A.  Author,https://p,https://link,{LICENCE}\n")
    return tmp_path


def test_page_is_made_by_the_command(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing command that goes unnoticed, PSNR of the wrong file, or a photo without its author."""
    runs = [CASES["photons"].runs[1], Run("auto", "--task denoise --sigma-y auto")]
    case = replace(CASES["photons"], photo="abc", runs=runs, title="photon\nnoise")
    monkeypatch.setattr(photo_reality, "CASES", {"photons": case})
    document = tmp_path / "page.md"
    table, authors = (f"<!-- {m} -->\n<!-- /{m} -->\n" for m in ("photo-reality", "photo-credits"))
    document.write_text(f"mine\n{table}also mine\n{authors}")
    command = [str(photos), "--attribution", str(photos / "by.csv"), "--work", str(tmp_path / "work"), "--document",
               str(document), "--model", str(save_tiny_model(tmp_path / "tiny")), "--samples", "1", "--nfe", "2",
               "--cases", "photons", "--threads", "1"]  # fmt: skip
    photo_reality.main(command)
    text = document.read_text()
    assert text.startswith("mine\n")
    assert "\nalso mine\n" in text
    assert "[A. Author](https://link)" in text
    rows = [line for line in text.splitlines() if line.startswith("| photon noise")]
    assert len(rows) == 2
    folder = tmp_path / "work" / "photons"
    report = json.loads((folder / "run-2" / "photons" / "report.json").read_text())
    assert f"| `--task denoise --sigma-y auto` | {report['sigma_y']:.3f} |" in rows[1]
    before, after = (
        10
        * np.log10(4 / np.mean((signal(Image.open(p).convert("RGB")) - signal(Image.open(folder / "truth.png"))) ** 2))
        for p in (folder / "photons.png", folder / "run-2" / "photons" / "mmse.png")
    )
    assert [f"{before:.1f}", f"{after:.1f}"] == [c.strip(" *") for c in rows[1].split("|")[4:6]]
    assert (tmp_path / "figures" / "old-photos.jpg").stat().st_size <= photo_reality.LARGEST_SHEET


def test_options_on_the_page_are_those_that_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who copies a command from the page would get another result than the page shows."""
    seen = []
    monkeypatch.setattr("posteriori.batch.restore_all", lambda *args: seen.append(args[2]) or 0)
    for case in CASES.values():
        for way in case.runs:
            if way.solve is None:
                words = way.options.replace("MASK", "m.png").split()
                assert run(["restore", "photo.png", *words, "-o", str(tmp_path)]) == 0
                assert photo_reality.task_options(way.options, Path("m.png")) == seen[-1], way.options
    assert len(seen) > 10


def test_what_cannot_be_used_is_an_error(photos: Path) -> None:
    """A photo without a licence on the page, or the table of half the runs."""
    with pytest.raises(ValueError, match="0 photos"):
        photo_reality.find_photo(photos, "nothing")
    (photos / "by.csv").write_text("image_id,author,landing_url,licence\nabc,A,https://l,all rights reserved\n")
    with pytest.raises(ValueError, match="CC BY"):
        photo_reality.credits([photos / "nips17_abc.png"], photos / "by.csv")
    assert len({c.photo for c in CASES.values()}) == len(CASES)
    assert all(isinstance(c, Case) and c.runs for c in CASES.values())


def test_cost_counts_the_pixels_of_the_picture() -> None:
    """Costs per pixel of what the network sees would make a coarse network look four times as dear."""
    made = []
    for block in (1, 2):
        network = photo_cost.PhotoNet(3 * block**2, channels=(8, 8), blocks=(1, 1), embedding=16)
        with torch.random.fork_rng():
            found = photo_cost.cost(network, 64, 32, 2, repetitions=1, block=block)
        assert found["reach"] == block * network.receptive_radius
        assert found["parameters"] == sum(p.numel() for p in network.parameters())
        made.append(("n", network.config, found))
    assert all(found[k] > 0 for _, _, found in made for k in ("evaluation", "evaluation_float32", "step"))
    assert "(1.00)" in photo_cost.table(made)
