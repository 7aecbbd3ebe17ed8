"""The comparison of methods: its figures, its files, and that a run goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from posteriori.bench.methods import main
from tiny_model import save_tiny_model


def photo(path: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(40, 215, (5, 5, 3), dtype=np.uint8))
    small.resize((20, 20), Image.Resampling.BICUBIC).save(path)
    return path


def test_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A figure that is not of the picture above it, a sheet that is not written, or work that is done twice."""
    model = save_tiny_model(tmp_path / "model")
    photos = [str(photo(tmp_path / f"{k}.png", k)) for k in range(2)]
    fixed = ["--work", str(tmp_path / "work"), "--model", str(model), "--size", "16", "--tasks", "random,sr"]
    out = tmp_path / "sheet.jpg"
    main([*photos, *fixed, "--methods", "linear,ddrm", "--out", str(out)])
    rows = [json.loads(line) for line in (tmp_path / "work/methods.jsonl").read_text().splitlines()]
    assert [(r["task"], r["method"], r["photo"]) for r in rows] == [
        ("random", "linear", "0.png"), ("random", "ddrm", "0.png"), ("sr", "linear", "1.png"), ("sr", "ddrm", "1.png"),
    ]  # fmt: skip
    for row in rows:
        with Image.open(tmp_path / f"work/pictures/{row['task']}-{Path(row['photo']).stem}-{row['method']}.png") as p:
            restored = np.asarray(p.convert("RGB"), dtype=float)
        with Image.open(tmp_path / row["photo"]) as p:
            truth = np.asarray(p.convert("RGB"), dtype=float)[2:18, 2:18]
        psnr = 10 * np.log10(255**2 / ((restored - truth) ** 2).mean())
        assert row["psnr"] == pytest.approx(psnr, abs=0.1)  # the picture is rounded to 8 bits
    assert rows[1]["evaluations"] == 20
    assert out.stat().st_size <= 400_000
    with Image.open(out) as sheet:
        assert sheet.width > 3 * 16
    assert "| ddrm |" in capsys.readouterr().out
    main([*photos, *fixed, "--methods", "linear,ddrm"])
    assert len((tmp_path / "work/methods.jsonl").read_text().splitlines()) == 4


def test_tuning_compares_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A value that does not reach the method: every column of the table would be the same."""
    model = save_tiny_model(tmp_path / "model")
    fixed = ["--work", str(tmp_path / "work"), "--model", str(model), "--size", "16", "--tasks", "random"]
    main([str(photo(tmp_path / "0.png", 0)), *fixed, "--tune", "ddrm", "eta", "0.1,0.9"])
    line = capsys.readouterr().out.splitlines()[-1]
    low, high = line.strip("| ").split("|")[1:]
    assert low.strip() != high.strip()
    values = {json.loads(row)["used"]["eta"] for row in (tmp_path / "work/tuning.jsonl").read_text().splitlines()}
    assert values == {0.1, 0.9}
