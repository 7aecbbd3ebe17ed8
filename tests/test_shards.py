"""scripts/shards.py on made-up archives: what is rebuilt is in the right place, what differs is told."""

from __future__ import annotations

import importlib.util
import io
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def shards() -> ModuleType:
    spec = importlib.util.spec_from_file_location("shards", ROOT / "scripts" / "shards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["shards"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def picture(seed: int, side: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def encode(image: Image.Image, quality: int = 90) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def write_tar(path: Path, contents: list[bytes], names: list[str] | None = None) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
        for i, data in enumerate(contents):
            entry = tarfile.TarInfo(names[i] if names else f"{i:06d}.jpg")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def read_tar(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]


def test_faces_are_found_by_fingerprint_whatever_their_crop(shards: ModuleType, tmp_path: Path) -> None:
    """Members in another order, a stranger in the place of one that is missing, or another crop than the copies'."""
    originals = [picture(seed, 250) for seed in range(24)]
    order = np.random.default_rng(0).permutation(20).tolist()  # four originals are in no shard
    copies = [encode(originals[k].crop((45, 45, 205, 205)).resize((64, 64), Image.Resampling.BILINEAR)) for k in order]
    given = tmp_path / "given"
    given.mkdir()
    write_tar(given / "test.tar", copies[:6])
    write_tar(given / "train.tar", copies[6:])
    shards.write_list("lfw-64", given, tmp_path / "lists", fingerprints=True)
    kept = [k for k in range(24) if k != order[3]]
    names = [f"lfw/Name_{k}/Name_{k}_0001.jpg" for k in kept]
    write_tar(tmp_path / "lfw.tgz", [encode(originals[k]) for k in kept], names)
    found = shards.rebuild("lfw-64", tmp_path / "lfw.tgz", tmp_path / "out", lists=tmp_path / "lists")
    assert found == {"same": 0, "alike": 19, "missing": 1}
    test = read_tar(tmp_path / "out" / "test.tar")
    assert list(test) == [f"{i:06d}.jpg" for i in (0, 1, 2, 4, 5)]
    for name, data in test.items():
        ours, theirs = (np.asarray(Image.open(io.BytesIO(d)), float) for d in (data, copies[int(name[:6])]))
        assert np.abs(ours - theirs).mean() < 6
    wanted = shards.read_list("lfw-64", tmp_path / "lists")["train.tar"].fingerprints
    assert shards.best_crop(tmp_path / "lfw.tgz", wanted, (250, 160, 112)) == 160


def test_original_files_are_found_by_hash(shards: ModuleType, tmp_path: Path) -> None:
    """No fingerprints. Bytes written anew, or labels of the wrong member: ``check`` would fail on a faithful one."""
    files = [encode(picture(seed, 64), 75) for seed in range(12)]
    files[7] = files[2]  # a picture that is there twice
    order = np.random.default_rng(1).permutation(12).tolist()
    given = tmp_path / "given"
    given.mkdir()
    write_tar(given / "train-000.tar", [files[k] for k in order])
    (given / "train-000.labels.txt").write_text("\n".join(f"n{k % 3:08d}" for k in order) + "\n")
    shards.write_list("tiny-imagenet-64", given, tmp_path / "lists")
    with zipfile.ZipFile(tmp_path / "tiny.zip", "w") as archive:
        for k, data in enumerate(files):
            archive.writestr(f"tiny-imagenet-200/train/n{k % 3:08d}/images/n{k % 3:08d}_{k}.JPEG", data)
    found = shards.rebuild("tiny-imagenet-64", tmp_path / "tiny.zip", tmp_path / "out", lists=tmp_path / "lists")
    assert found == {"same": 12, "alike": 0, "missing": 0}
    assert shards.check("tiny-imagenet-64", tmp_path / "out", tmp_path / "lists") == []
    assert read_tar(tmp_path / "out" / "train-000.tar") == read_tar(given / "train-000.tar")


def test_differences_are_told(shards: ModuleType, tmp_path: Path) -> None:
    """A member saved again, another photo, classes that moved, a shard cut short."""
    files = [encode(picture(seed, 64)) for seed in range(5)]
    write_tar(tmp_path / "a.tar", files)
    write_tar(tmp_path / "b.tar", files[:2])
    (tmp_path / "a.labels.txt").write_text("x\ny\nx\ny\nx\n")
    shards.write_list("lfw-64", tmp_path, tmp_path / "lists", fingerprints=True)
    assert shards.check("lfw-64", tmp_path, tmp_path / "lists") == []
    again = [encode(Image.open(io.BytesIO(files[0])), 50), encode(picture(99, 64)), *files[2:]]
    write_tar(tmp_path / "a.tar", again)
    (tmp_path / "a.labels.txt").write_text("y\ny\nx\ny\nx\n")
    write_tar(tmp_path / "b.tar", files[:1])
    assert shards.check("lfw-64", tmp_path, tmp_path / "lists") == [
        "a.tar: 2 of 5 files differ, 1 of them show the same photo",
        "a.labels.txt: missing, or other classes",
        "b.tar: 1 pictures, 2 are expected",
    ]
    (tmp_path / "b.tar").unlink()
    assert shards.check("lfw-64", tmp_path, tmp_path / "lists")[-1] == "b.tar: missing"


def test_committed_lists_are_whole_and_small(shards: ModuleType) -> None:
    """A list cut short, or one that carries more than hashes."""
    sizes = {"lfw-64": {"test.tar": 500, "train.tar": 8152}}
    sizes["tiny-imagenet-64"] = {"test.tar": 2020, "train-000.tar": 9090, "train-001.tar": 9090}
    for name, expected in sizes.items():
        held = shards.read_list(name)
        assert {shard: len(m.hashes) for shard, m in held.items()} == expected
        assert not any(len(m.fingerprints) for m in held.values())  # they are made from pixels
        assert all(len(m.labels) == (len(m.hashes) if "tiny" in name else 0) for m in held.values())
        together = {h.tobytes() for m in held.values() for h in m.hashes}
        assert len(together) == sum(expected.values()) - 2 * ("tiny" in name)  # two pictures are in that set twice
    assert sum(p.stat().st_size for p in (ROOT / "scripts" / "shards").iterdir()) < 1_000_000


def test_command_line(shards: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback for a mistyped folder, or success where files differ."""
    assert shards.main(["check", "lfw-64", str(tmp_path / "nowhere")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert shards.main(["check", "lfw-64", str(tmp_path)]) == 3
    assert "train.tar: missing" in capsys.readouterr().out
