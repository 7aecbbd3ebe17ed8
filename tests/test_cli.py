"""The commands, run as a user runs them: exit codes, one-line errors, files, resuming."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from posteriori import batch, cli
from tiny_model import save_tiny_model

FILES = {"mmse.png", "mean.png", "std.png", "sample-01.png", "sample-02.png", "report.png", "report.json"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return colour_photo(tmp_path / "photo.png", 24, 32)


def colour_photo(path: Path, height: int, width: int, seed: int = 0) -> Path:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


def restore(*arguments: object, model: object, out: Path, samples: int = 2, nfe: int = 2) -> int:
    fixed = ["-o", str(out), "--model", str(model), "--samples", str(samples), "--nfe", str(nfe), "--device", "cpu"]
    return cli.run(["restore", *map(str, arguments), *fixed])


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


# ---------------------------------------------------------------------------------------------------------------------
# bad input: one line, exit code 2, nothing half written


def bad_mask(folder: Path, value: int, size: tuple[int, int] = (32, 24)) -> Path:
    Image.new("L", size, value).save(folder / "mask.png")
    return folder / "mask.png"


def sparse_mask(folder: Path) -> Path:
    """All missing but for a pixel here and there."""
    hidden = np.full((24, 32), 255, dtype=np.uint8)
    hidden[::5, ::5] = 0
    Image.fromarray(hidden).save(folder / "mask.png")
    return folder / "mask.png"


def kernel(folder: Path, values: object) -> Path:
    np.save(folder / "kernel.npy", np.array(values, dtype=np.float64))
    return folder / "kernel.npy"


def file(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def cut(photo: Path) -> Path:
    return file(photo.parent, "cut.png", photo.read_bytes()[: photo.stat().st_size // 2])


def broken_model(photo: Path, model: Path, change: Callable[[Path], None]) -> Path:
    folder = photo.parent / "broken"
    shutil.copytree(model, folder)
    change(folder)
    return folder


def edit_card(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        card = json.loads((folder / "model.json").read_text())
        card |= changes
        (folder / "model.json").write_text(json.dumps({k: v for k, v in card.items() if v is not None}))

    return change


def flip_byte(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def other_width(folder: Path) -> None:
    card = json.loads((folder / "model.json").read_text())
    edit_card(network={**card["network"], "channels": [4, 16]})(folder)


DENOISE = ["--task", "denoise"]
CLEAN = ["--degrade", "--sigma-y", 0.05]
# name -> (arguments, words of the message); `p` is a good photo, `d` its folder, `m` a good model
BAD: dict[str, tuple[Callable[[Path, Path, Path], list[object]], str]] = {
    "missing file": (lambda p, d, m: [d / "none.png", *DENOISE, *CLEAN], "none.png does not exist"),
    "empty file": (lambda p, d, m: [file(d, "e.png", b""), *DENOISE, *CLEAN], "e.png is empty"),
    "corrupt file": (lambda p, d, m: [cut(p), *DENOISE, *CLEAN], "cut.png cannot be read"),
    "no image": (lambda p, d, m: [file(d, "t.png", b"words"), *DENOISE, *CLEAN], "t.png is not an image"),
    "empty folder": (lambda p, d, m: [d / "folder", *DENOISE, *CLEAN], "holds no photo"),
    "too small": (lambda p, d, m: [colour_photo(d / "s.png", 15, 30), *DENOISE, *CLEAN], "30x15"),
    "same stem": (lambda p, d, m: [p, colour_photo(d / "photo.bmp", 24, 32), *DENOISE, *CLEAN], "both write"),
    "mask missing": (lambda p, d, m: [p, "--task", "inpaint", "--sigma-y", 0.05], "--mask"),
    "mask not a file": (lambda p, d, m: [p, "--task", "inpaint", "--sigma-y", 0.05, "--mask", d / "no.png"], "no.png"),
    "mask of another size": (
        lambda p, d, m: [p, "--task", "box", "--sigma-y", 0.05, "--mask", bad_mask(d, 0, (32, 23))], "32x23"),
    "mask hides everything": (
        lambda p, d, m: [p, "--task", "inpaint", *CLEAN, "--mask", bad_mask(d, 255)], "hides every pixel"),
    "box hides everything": (lambda p, d, m: [p, "--task", "box", *CLEAN, "--box", 99], "hides every pixel"),
    "box is no size": (lambda p, d, m: [p, "--task", "box", *CLEAN, "--box", "big"], "--box"),
    "missing share": (lambda p, d, m: [p, "--task", "inpaint", *CLEAN, "--missing", 1.5], "--missing is 1.5"),
    "missing without degrade": (
        lambda p, d, m: [p, "--task", "inpaint", "--sigma-y", 0.05, "--missing", 0.5], "--degrade"),
    "kernel missing": (lambda p, d, m: [p, "--task", "motion", "--sigma-y", 0.05], "--kernel"),
    "kernel sums to 0": (
        lambda p, d, m: [p, "--task", "motion", *CLEAN, "--kernel", kernel(d, [[1, -1]])], "positive number"),
    "kernel negative": (
        lambda p, d, m: [p, "--task", "motion", *CLEAN, "--kernel", kernel(d, [[-1, -1]])], "positive number"),
    "kernel NaN": (lambda p, d, m: [p, "--task", "motion", *CLEAN, "--kernel", kernel(d, [[np.nan]])], "finite"),
    "kernel too large": (
        lambda p, d, m: [p, "--task", "motion", *CLEAN, "--kernel", kernel(d, np.ones((1, 40)))], "larger than"),
    "kernel is text": (
        lambda p, d, m: [p, "--task", "motion", *CLEAN, "--kernel", file(d, "k.txt", b"1 2\n3")], "k.txt"),
    "sr filter not separable": (
        lambda p, d, m: [p, "--task", "sr", *CLEAN, "--kernel", kernel(d, np.eye(4))], "separable"),
    "negative sigma_y": (lambda p, d, m: [p, *DENOISE, "--sigma-y", -0.1], "sigma_y is -0.1"),
    "NaN sigma_y": (lambda p, d, m: [p, *DENOISE, "--sigma-y", "nan"], "sigma_y is nan"),
    "sigma_y unknown to the model": (lambda p, d, m: [p, *DENOISE, "--sigma-y", 0.5], "0.01 to 0.2"),
    "sigma_y is no number": (lambda p, d, m: [p, *DENOISE, "--sigma-y", "much"], "--sigma-y"),
    "sigma_y missing": (lambda p, d, m: [p, *DENOISE], "sigma-y"),
    "sigma_y 0 without inverse": (lambda p, d, m: [p, "--task", "gaussian", "--sigma-y", 0], "pseudo-inverse"),
    "noise to be estimated and added": (lambda p, d, m: [p, *DENOISE, "--degrade", "--sigma-y", "auto"], "not auto"),
    "noise that cannot be estimated": (
        lambda p, d, m: [p, "--task", "inpaint", "--sigma-y", "auto", "--mask", sparse_mask(d)], "scattered"),
    "unknown task": (lambda p, d, m: [p, "--task", "sharpen", *CLEAN], "unknown task 'sharpen'"),
    "no task": (lambda p, d, m: [p, *CLEAN], "which --task"),
    "unknown option": (lambda p, d, m: [p, *DENOISE, *CLEAN, "--colour"], "--colour"),
    "option of another task": (lambda p, d, m: [p, *DENOISE, *CLEAN, "--scale", 4], "--scale has no effect"),
    "unknown method": (lambda p, d, m: [p, *DENOISE, *CLEAN, "--method", "magic"], "unknown method 'magic'"),
    "unknown boundary": (lambda p, d, m: [p, "--task", "gaussian", *CLEAN, "--boundary", "open"], "boundary 'open'"),
    "bad width": (lambda p, d, m: [p, "--task", "gaussian", *CLEAN, "--blur-sigma", 0], "--blur-sigma"),
    "bad scale": (lambda p, d, m: [p, "--task", "sr", *CLEAN, "--scale", 1], "--scale is 1"),
    "scale too large": (lambda p, d, m: [p, "--task", "sr", "--sigma-y", 0.05, "--scale", 90], "more than 2048"),
    "no samples": (lambda p, d, m: [p, *DENOISE, *CLEAN, "--samples", 0], "--samples is 0"),
    "negative seed": (lambda p, d, m: [p, *DENOISE, *CLEAN, "--seed", -1], "--seed"),
    "unknown device": (lambda p, d, m: [p, *DENOISE, *CLEAN, "--device", "abacus"], "device 'abacus'"),
    "operator not found": (lambda p, d, m: [p, *CLEAN, "--operator", "nowhere_at_all:f"], "nowhere_at_all"),
    "operator file broken": (
        lambda p, d, m: [p, *CLEAN, "--operator", f"{file(d, 'op.py', b'1/0')}:f"], "ZeroDivisionError"),
    "operator is none": (
        lambda p, d, m: [p, *CLEAN, "--operator", f"{file(d, 'op2.py', b'f = lambda: 3')}:f"], "returned a int"),
    "unknown model": (lambda p, d, m: [p, *DENOISE, *CLEAN, "--model", "grandma"], "no model 'grandma'"),
    "model with a wrong hash": (
        lambda p, d, m: [p, *DENOISE, *CLEAN, "--model", broken_model(p, m, flip_byte)], "hash"),
    "model without weights": (
        lambda p, d, m: [p, *DENOISE, *CLEAN, "--model",
                         broken_model(p, m, lambda f: (f / "model.safetensors").unlink())], "missing"),
    "model without card": (
        lambda p, d, m: [p, *DENOISE, *CLEAN, "--model", broken_model(p, m, lambda f: (f / "model.json").unlink())],
        "no model.json"),
    "card lacks a field": (
        lambda p, d, m: [p, *DENOISE, *CLEAN, "--model", broken_model(p, m, edit_card(schedule=None))], "schedule"),
    "card is not JSON": (
        lambda p, d, m: [p, *DENOISE, *CLEAN, "--model",
                         broken_model(p, m, lambda f: (f / "model.json").write_text("{"))], "JSON"),
    "card of another network": (
        lambda p, d, m: [p, *DENOISE, *CLEAN, "--model", broken_model(p, m, other_width)], "does not fit"),
    "output below a file": (lambda p, d, m: [p, *DENOISE, *CLEAN, "-o", p / "out"], "cannot write"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(
    case: str, tmp_path: Path, photo: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback, a page of usage or a half-written result instead of: what, why, what to try."""
    (tmp_path / "folder").mkdir()
    make, words = BAD[case]
    arguments = make(photo, tmp_path, model)
    out = tmp_path / "out"
    for option, value in (("-o", out), ("--model", model)):
        if option not in arguments:
            arguments += [option, value]
    if "--device" not in arguments:
        arguments += ["--device", "cpu"]
    code = cli.run(["restore", "--nfe", "1", *map(str, arguments)])
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert code == 2, printed
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert not out.exists() or not list(out.rglob("*"))


@pytest.mark.parametrize(("arguments", "words"), [
    (["frobnicate"], "frobnicate"),
    (["restore"], "Missing"),
    (["check", "nowhere_at_all:f"], "nowhere_at_all"),
    (["check", "no_colon"], "module:function"),
    (["check", "posteriori.operators:Identity", "--shape", "a,b"], "--shape"),
    (["train", "none.yaml", "-o", "run"], "none.yaml"),
    (["demo", "--model", "grandma", "-o", "here"], "grandma"),
    (["demo", "--nfe", "0", "-o", "here"], "--nfe is 0"),
])  # fmt: skip
def test_bad_usage_of_other_commands(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As above, for what is not ``restore``."""
    monkeypatch.chdir(tmp_path)
    assert cli.run(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert not list(tmp_path.iterdir())


def test_one_bad_photo_does_not_stop_the_others(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A night's work lost to one truncated file; or its failure not noticed by a script."""
    folder = tmp_path / "photos"
    folder.mkdir()
    colour_photo(folder / "a.png", 17, 19)
    (folder / "b.png").write_bytes(b"broken")
    colour_photo(folder / "c.png", 16, 33)
    assert restore(folder, *DENOISE, *CLEAN, model=model, out=tmp_path / "out") == 2
    assert names(tmp_path / "out") == {"a", "c"}
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# good input


@pytest.mark.parametrize("kind", ["odd", "wide", "grey", "alpha", "16-bit", "exif", "palette"])
def test_every_kind_of_photo(kind: str, tmp_path: Path, model: Path) -> None:
    """A photo of this kind would fail, or come back with another size, orientation or transparency."""
    path = tmp_path / "photo.png"
    height, width = {"odd": (17, 23), "wide": (16, 90)}.get(kind, (24, 32))
    image = Image.open(colour_photo(path, height, width))
    options: dict[str, object] = {}
    mode = "RGB"
    if kind == "grey":
        image, mode = image.convert("L"), "L"
    elif kind == "alpha":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        mode = "RGBA"
    elif kind == "16-bit":
        image, mode = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "L"
    elif kind == "exif":
        exif = Image.Exif()
        exif[274] = 6
        options["exif"] = exif
        height, width = width, height
    elif kind == "palette":
        image = image.quantize(32)
    image.save(path, **options)
    out = tmp_path / "out"
    assert restore(path, "--task", "sr", "--scale", 3, "--sigma-y", 0.05, model=model, out=out) == 0
    assert names(out / "photo") == FILES | {"settings.json"}
    for name in ("mmse.png", "mean.png", "sample-01.png"):
        with Image.open(out / "photo" / name) as result:
            assert result.size == (3 * width, 3 * height)
            assert result.mode == mode
    with Image.open(out / "photo" / "std.png") as std:
        assert std.size == (3 * width, 3 * height)
        assert "brightest" in std.info["scale"]
    report = json.loads((out / "photo" / "report.json").read_text())
    assert report["psnr"] is None
    assert report["residual"]["samples"][0] > 0


def test_sizes_that_do_not_divide_are_cropped_with_a_warning(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cropping without a word, or refusing nearly every photo there is."""
    path = colour_photo(tmp_path / "p.png", 25, 35)
    assert restore(path, "--task", "sr", *CLEAN, model=model, out=tmp_path / "out") == 0
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("warning: ")
    assert "cropped to 32x24" in lines[0]
    with Image.open(tmp_path / "out" / "p" / "mean.png") as result:
        assert result.size == (32, 24)


def test_noise_is_printed_in_both_units(
    photo: Path, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The most common mistake of the field is a sigma in the other unit."""
    assert restore(photo, *DENOISE, "--degrade", "--sigma-y", 0.1, model=model, out=tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "0.1 in [-1, 1] = 12.8 in 0-255" in out
    assert "measurement.npy" in out


@pytest.mark.parametrize("task", [
    ["denoise"], ["sr", "--scale", 2], ["gaussian", "--blur-sigma", 1], ["motion", "--kernel", "K"],
    ["inpaint", "--mask", "M"], ["box", "--mask", "M"], ["custom", "--operator", "posteriori.operators:Identity"],
])  # fmt: skip
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_noise_is_estimated_for_every_task(
    task: list[object], mode: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user who does not know the noise: the level is told in both units, recorded as an estimate, and near the noise
    that is in the photo (0.1 in [-1, 1], within 30 % from the few pixels here)."""
    clean = np.asarray(Image.open(colour_photo(tmp_path / "photo.png", 48, 64)).convert(mode))
    noisy = clean * 0.6 + 50 + np.random.default_rng(1).normal(0, 0.1 * 127.5, clean.shape)
    Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8)).save(tmp_path / "photo.png")
    hidden = np.zeros((48, 64), dtype=np.uint8)
    hidden[::2, ::5] = 255
    Image.fromarray(hidden).save(tmp_path / "m.png")
    files = {"K": kernel(tmp_path, np.ones((1, 3)) / 3), "M": tmp_path / "m.png"}
    arguments = [files.get(str(a), a) for a in task]
    out = tmp_path / "out"
    assert restore(tmp_path / "photo.png", "--task", *arguments, "--sigma-y", "auto", model=model, out=out) == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "photo" / "report.json").read_text())
    assert report["sigma_y_source"] == "estimated"
    assert report["sigma_y"] == report["sigma_y_estimate"] == pytest.approx(0.1, rel=0.3)
    assert f"estimated as {report['sigma_y']:.3g} in [-1, 1] = {report['sigma_y'] * 127.5:.3g} in 0-255" in printed


@pytest.mark.parametrize("grey", [False, True])
def test_estimates_are_moved_into_the_range_of_the_model(
    grey: bool, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An estimate beyond the model's range would stop the restoration, or ask the network for what it never saw. A grey
    photo's network is told sqrt(3) times its noise."""
    noisy = np.random.default_rng(0).normal(128, 40, (40, 40) if grey else (40, 40, 3))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(tmp_path / "photo.png")
    out = tmp_path / "out"
    assert restore(tmp_path / "photo.png", *DENOISE, "--sigma-y", "auto", model=model, out=out) == 0
    report = json.loads((out / "photo" / "report.json").read_text())
    assert report["sigma_y_estimate"] == pytest.approx(40 / 127.5, rel=0.1)
    assert report["sigma_y"] == pytest.approx(0.2 / 3**0.5 if grey else 0.2)
    warning = capsys.readouterr().err.strip().splitlines()
    assert len(warning) == 1
    assert "outside what the model knows" in warning[0]


def test_kept_measurement_is_a_photo(photo: Path, tmp_path: Path, model: Path) -> None:
    """The float measurement that --degrade keeps, with its mask, has to lead to the same result as the clean photo."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert restore(photo, "--task", "inpaint", *CLEAN, model=model, out=first) == 0
    kept = first / "photo"
    again = [kept / "measurement.npy", "--task", "inpaint", "--sigma-y", 0.05, "--mask", kept / "mask.png"]
    assert restore(*again, model=model, out=second) == 0
    for name in ("mmse.png", "sample-02.png"):
        with Image.open(kept / name) as a, Image.open(second / "measurement" / name) as b:
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_finished_photos_are_skipped_until_settings_change(
    photo: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Work done twice; or, worse, a result of other settings taken for that of these."""
    done: list[str] = []
    real = batch.restore
    monkeypatch.setattr(batch, "restore", lambda *a: done.append("x") or real(*a))
    out = tmp_path / "out"

    def again(*more: object, samples: int = 2) -> int:
        done.clear()
        assert restore(photo, *DENOISE, *CLEAN, *more, model=model, out=out, samples=samples) == 0
        return len(done)

    assert again() == 1
    before = (out / "photo" / "report.json").stat().st_mtime_ns
    assert again() == 0
    assert "skipped" in capsys.readouterr().out
    assert (out / "photo" / "report.json").stat().st_mtime_ns == before
    assert again("--force") == 1
    assert again("--seed", 1) == 1
    assert again("--seed", 1) == 0
    assert again("--seed", 1, samples=1) == 1
    assert not (out / "photo" / "sample-02.png").exists()  # of the run before
    (out / "photo" / "mean.png").unlink()
    assert again("--seed", 1, samples=1) == 1
    colour_photo(photo, 24, 32, seed=5)
    assert again("--seed", 1, samples=1) == 1


def test_results_do_not_depend_on_company(tmp_path: Path, model: Path) -> None:
    """A photo restored in a folder of others would differ from the same photo restored alone."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for k, name in enumerate("abc"):
        colour_photo(folder / f"{name}.png", 24, 32, seed=k)
    task = ["--task", "inpaint", *CLEAN]
    assert restore(folder, *task, model=model, out=tmp_path / "together") == 0
    assert restore(folder / "b.png", *task, model=model, out=tmp_path / "alone") == 0
    assert names(tmp_path / "together") == {"a", "b", "c"}
    for name in ("mmse.png", "sample-01.png", "std.png", "measurement.npy"):
        together, alone = ((tmp_path / where / "b" / name).read_bytes() for where in ("together", "alone"))
        assert together == alone


def test_interrupting_leaves_only_finished_results(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C must neither print a traceback nor leave a folder that looks finished."""
    photos = [colour_photo(tmp_path / f"{n}.png", 24, 32) for n in "abc"]
    real, calls = batch.write, []

    def write(*arguments: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(batch, "write", write)
    assert restore(*photos, *DENOISE, *CLEAN, model=model, out=tmp_path / "out") == 130
    assert names(tmp_path / "out") == {"a"}
    assert capsys.readouterr().err.strip() == "interrupted; finished results are kept, start again to continue"
    monkeypatch.setattr(batch, "write", real)
    assert restore(*photos, *DENOISE, *CLEAN, model=model, out=tmp_path / "out") == 0
    assert names(tmp_path / "out") == {"a", "b", "c"}


def test_interrupting_a_write_leaves_nothing(photo: Path, tmp_path: Path, model: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A new result appears whole or not at all."""

    def interrupted(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    assert restore(photo, *DENOISE, *CLEAN, model=model, out=tmp_path / "out") == 130
    assert not names(tmp_path / "out")


def test_a_bug_is_exit_code_1(
    photo: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bug dressed up as bad input would never be reported, and one without a traceback never be found."""

    def broken(*arguments: object) -> None:
        raise ValueError("inner workings")

    monkeypatch.setattr(batch, "write", broken)
    assert restore(photo, *DENOISE, *CLEAN, model=model, out=tmp_path / "out") == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert "report" in printed


def test_demo_writes_one_sheet(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`make demo` shows nothing, or another thing every time."""
    out = tmp_path / "demo"
    assert cli.run(["demo", "-o", str(out), "--model", str(model), "--nfe", "1", "--device", "cpu"]) == 0
    assert names(out) == {"demo.png", "demo.json"}
    figures = json.loads((out / "demo.json").read_text())
    assert [r["task"] for r in figures.values()] == ["inpaint", "box", "sr", "gaussian", "motion"]
    with Image.open(out / "demo.png") as sheet:
        assert sheet.width > 7 * 256
        assert sheet.height > 5 * 256
    printed = capsys.readouterr().out
    assert "s in all" in printed
    assert all(r["task"] in printed for r in figures.values())


def test_check_tells_good_from_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An operator with a wrong adjoint would pass, or the exit code would not tell a script."""
    assert cli.run(["check", "posteriori.operators:Identity", "--shape", "3,8,8"]) == 0
    assert "dot test" in capsys.readouterr().out
    source = tmp_path / "wrong.py"
    source.write_text(
        "import posteriori as po\n"
        "def adjoint(shape): return po.operators.Callable(lambda x: 2 * x, lambda y: 3 * y, shape=shape)\n"
        "def offset(shape): return po.operators.Callable(lambda x: x + 1, lambda y: y, shape=shape)\n"
        "def raises(shape): return po.operators.Callable(lambda x: x @ 3, shape=shape)\n"
    )
    for name in ("adjoint", "offset", "raises"):
        assert cli.run(["check", f"{source}:{name}", "--shape", "1,4,4"]) == 3
        assert "check failed" in capsys.readouterr().err


def test_models_lists_without_failing(capsys: pytest.CaptureFixture[str]) -> None:
    """The list of bundled models is how a user learns what `--model` takes."""
    assert cli.run(["models"]) == 0
    assert "model" in capsys.readouterr().out


@pytest.mark.parametrize("command", [[], ["restore"], ["demo"], ["train"], ["check"]])
def test_help_is_quick_and_does_not_load_torch(command: list[str]) -> None:
    """Waiting for torch to learn an option's name."""
    code = (
        "import sys; from posteriori.cli import run\n"
        f"code = run({[*command, '--help']!r}); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert time.monotonic() - began < 5  # 0.2 s on an idle machine


def test_python_m_and_exit_code(tmp_path: Path) -> None:
    """`python -m posteriori` is missing, or its exit code is lost on the way out."""
    command = [
        sys.executable,
        "-m",
        "posteriori",
        "restore",
        "none.png",
        "--task",
        "denoise",
        "--sigma-y",
        "1",
        "-o",
        "x",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: none.png does not exist: check the name"


def test_attribution_of_every_bundled_photo() -> None:
    """A photo whose author is not named may not be shipped."""
    from posteriori.demo import SHOWN, attribution, photos_folder

    listed = {row["file"] for row in attribution()}
    assert listed == {p.name for p in photos_folder().glob("*.png")}
    assert {f"{shown.photo}.png" for shown in SHOWN} <= listed
    assert all(row["author"] and "creativecommons.org/licenses/by/" in row["licence"] for row in attribution())
    assert sum(p.stat().st_size for p in photos_folder().iterdir()) < 700_000


def test_trains_from_a_recipe(tmp_path: Path) -> None:
    """The command would not hand its recipe, overrides and folder to the trainer."""
    pytest.importorskip("accelerate")
    photos = tmp_path / "data" / "photos"
    photos.mkdir(parents=True)
    colour_photo(photos / "a.png", 40, 40)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: mini\nsources: [{folder: photos}]\ncrops: [{size: 32, batch: 1}]\n"
        "network: {kind: photo, channels: [4], blocks: [1], embedding: 8}\nsteps: 9\nmixed_precision: 'no'\n"
    )
    run = tmp_path / "run"
    arguments = ["train", str(recipe), "-o", str(run), "--set", f"data={tmp_path / 'data'}", "--set", "steps=1"]
    assert cli.run(arguments) == 0
    assert (run / "model" / "model.json").is_file()
    assert cli.run(arguments) == 2  # the folder holds a run
