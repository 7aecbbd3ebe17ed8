"""Sources of training images: each gives the images it holds, in the range it promises, and counts what it skips."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from posteriori.data import Augmentation, Counts, DataError, Photos, PhotoSource
from tiny_data import SIDE, flat, png, write_shard

PLAIN = Augmentation(native_share=1.0, flip=0.0, turn=0.0)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Four shards of ten pictures, numbered through, each with a class beside it."""
    for shard in range(4):
        numbers = range(10 * shard, 10 * shard + 10)
        files = {f"{n:04d}.png": png(flat(n)) for n in numbers} | {f"{n:04d}.cls": b"3" for n in numbers}
        write_shard(tmp_path / f"train-{shard}.tar", dict(sorted(files.items())))
    return tmp_path


def numbers(photos: Photos, count: int, lane: int = 0) -> list[int]:
    crops = photos.crops(count, SIDE, np.random.default_rng(0), lane)
    return ((crops[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def stream(root: Path, lanes: int = 1, seed: int = 0, places: str = "train-*.tar") -> Photos:
    return Photos([PhotoSource(shards=places)], PLAIN, root=str(root), seed=seed, lanes=lanes)


# -- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 2, 4, 5, 40])
def test_lanes_share_an_epoch(shards: Path, lanes: int) -> None:
    """Processes or workers would train on the same samples, or some sample never be seen: together the lanes see each
    of the 40 pictures once an epoch, whether there are more lanes than shards or fewer."""
    photos = stream(shards, lanes)
    for _ in range(2):
        seen = [n for lane in range(lanes) for n in numbers(photos, 40 // lanes, lane)]
        assert sorted(seen) == list(range(40))


def test_epochs_are_shuffled(shards: Path) -> None:
    """Training would see shards in the order they were written, the same in every epoch: neighbours in a shard are
    then neighbours in the sequence (39 of 39 pairs; by chance about 1)."""
    photos = stream(shards)
    first, second = numbers(photos, 40), numbers(photos, 40)
    assert first != second
    assert first != numbers(stream(shards, seed=1), 40)
    assert first == numbers(stream(shards), 40)
    for sequence in (first, second):
        assert sum(abs(a - b) == 1 for a, b in pairwise(sequence)) < 8


@pytest.mark.parametrize("taken", [0, 1, 17, 40, 63])
def test_a_stream_continues_where_it_was(shards: Path, taken: int) -> None:
    """A resumed run would see samples twice or never: positions of two lanes, in the first and a later epoch."""
    photos = stream(shards, 2)
    for lane in range(2):
        numbers(photos, taken, lane) if taken else None
    positions = {**photos.positions(0), **photos.positions(1)}
    resumed = stream(shards, 2)
    resumed.seek(positions)
    for lane in range(2):
        assert numbers(resumed, 30, lane) == numbers(photos, 30, lane)


def test_broken_samples_of_a_stream_are_skipped_and_counted(shards: Path) -> None:
    """One broken file would end a run of days, or be trained on as noise; counted twice after a resume, it would end it
    later. Three broken pictures, one sample without a picture, and a shard that was cut off."""
    for n in (3, 7):
        write_shard(shards / f"train-{4 + n}.tar", {f"{n}.png": png(flat(n))[:45], f"ok{n}.png": png(flat(100 + n))})
    write_shard(shards / "train-90.tar", {"text.txt": b"no picture", "also.png": b"not a png"})
    whole = write_shard(shards / "train-91.tar", {f"{n}.png": png(flat(200 + n)) for n in range(4)}).read_bytes()
    (shards / "train-91.tar").write_bytes(whole[:1560])  # the first picture and a half
    photos = stream(shards)
    good = set(range(40)) | {103, 107, 200}
    assert set(numbers(photos, 43)) == good
    numbers(photos, 1)  # enters the next epoch, so the first is counted whole
    counts = photos.take_counts()
    assert counts.skipped >= 5
    assert counts.seen == 44 + counts.skipped
    assert counts.first
    assert photos.take_counts() == Counts()
    resumed = stream(shards)
    resumed.seek({"0/0": (0, 40)})
    numbers(resumed, 1)
    assert resumed.take_counts().seen <= 8
    with pytest.raises(DataError, match=r"samples cannot be read, the first: .*--set corrupt=SHARE"):
        counts.check(0.01)
    counts.check(0.2)


def test_streams_say_what_is_wrong(tmp_path: Path) -> None:
    """An endless loop over shards without pictures, a shell command from a recipe, or nothing to read."""
    write_shard(tmp_path / "text.tar", {"a.txt": b"words"})
    with pytest.raises(DataError, match=r"finds no image in 1 shards such as .*text\.tar"):
        stream(tmp_path, places="text.tar").crops(1, SIDE, np.random.default_rng(0))
    with pytest.raises(DataError, match=r"no shards .*missing-.*--set data=PATH"):
        stream(tmp_path, places="missing-*.tar")
    with pytest.raises(DataError, match="does not run commands"):
        Photos([PhotoSource(shards="pipe:cat x.tar")])
    write_shard(tmp_path / "two.tar", {"a.seg.png": png(flat(1)), "a.rgb.png": png(flat(2))})
    photos = Photos([PhotoSource(shards="two.tar", key="rgb.png")], PLAIN, root=str(tmp_path))
    assert numbers(photos, 2) == [2, 2]


def test_shards_by_url(shards: Path) -> None:
    """Shards named by URL with braces would not be found: read through the library's own opener."""
    photos = Photos([PhotoSource(shards="train-{0..3}.tar")], PLAIN, root=f"file://{shards}")
    assert sorted(numbers(photos, 40)) == list(range(40))


# -- arrays, folders, data sets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
def test_arrays(tmp_path: Path, layout: str) -> None:
    """Channels taken for rows, or values outside of [-1, 1]: every image is found again, exactly, in the range that the
    source states."""
    rng = np.random.default_rng(0)
    images = rng.uniform(-3, 5, (6, SIDE, SIDE, 1 if layout == "NHW" else 3)).astype(np.float32)
    stored = {"NHWC": images, "NCHW": images.transpose(0, 3, 1, 2), "NHW": images[..., 0]}[layout]
    np.save(tmp_path / "a.npy", stored)
    np.savez(tmp_path / "b.npz", one=stored, two=stored)
    channels = images.shape[-1]
    expected = (images.transpose(0, 3, 1, 2) + 3) / 4 - 1
    for source in (
        PhotoSource(array="a.npy", value_range=(-3.0, 5.0)),
        PhotoSource(array="b.npz", key="two", value_range=(-3.0, 5.0)),
    ):
        photos = Photos([source], PLAIN, root=str(tmp_path), channels=channels)
        assert len(photos) == 6
        crops = photos.crops(40, SIDE, np.random.default_rng(0)).numpy()
        errors = np.abs(crops[:, None] - expected[None]).max((2, 3, 4))
        assert errors.min(1).max() < 1e-6
        assert len(set(errors.argmin(1))) == 6
        resized = Photos([source], Augmentation(native_share=0.0), root=str(tmp_path), channels=channels)
        assert np.abs(resized.crops(20, 5, np.random.default_rng(0)).numpy()).max() <= 1


def test_wrong_ranges_and_shapes_are_noticed(tmp_path: Path) -> None:
    """An array in [0, 255] read as [0, 1] would be trained on for days."""
    np.save(tmp_path / "a.npy", np.full((5, SIDE, SIDE, 3), 200, np.float32))
    np.save(tmp_path / "flat.npy", np.zeros(9, np.uint8))
    np.savez(tmp_path / "b.npz", one=np.zeros(3), two=np.zeros(3))
    (tmp_path / "c.npy").write_bytes(b"no array")
    np.save(tmp_path / "d.npy", np.full((5, SIDE, SIDE, 3), np.nan, np.float32))
    root = str(tmp_path)
    for source, message in [
        (PhotoSource(array="a.npy"), r"float32 values: say what is black"),
        (PhotoSource(array="flat.npy"), r"has shape \(9,\)"),
        (PhotoSource(array="b.npz"), "arrays one, two: choose with key"),
        (PhotoSource(array="c.npy"), "not a NumPy array"),
        (PhotoSource(array="nowhere.npy"), "no array .*--set data=PATH"),
        (PhotoSource(array="a.npy", value_range=(0.0, 1.0)), r"values from 200 to 200 leave value_range \[0, 1\]"),
        (PhotoSource(array="d.npy", value_range=(0.0, 1.0)), "not finite"),
    ]:
        with pytest.raises(DataError, match=message):
            Photos([source], PLAIN, root=root).crops(1, SIDE, np.random.default_rng(0))


def test_folders_read_when_needed_equal_those_in_memory(tmp_path: Path) -> None:
    """A folder too large for the memory would give other crops; 16-bit and nested files would be lost."""
    rng = np.random.default_rng(0)
    (tmp_path / "deep").mkdir()
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "deep" / f"{i}.png")
    one, other = (Photos([PhotoSource(folder="deep/..", memory=m)], root=str(tmp_path)) for m in (True, False))
    assert len(one) == len(other) == 4
    crops = [p.crops(30, 12, np.random.default_rng(1)) for p in (one, other)]
    assert bool((crops[0] == crops[1]).all())
    (tmp_path / "deep" / "9.png").write_bytes(b"broken")
    lazy = Photos([PhotoSource(folder="deep", memory=False)], root=str(tmp_path))
    lazy.crops(100, 12, np.random.default_rng(1))
    counts = lazy.take_counts()
    assert 5 < counts.skipped < 60  # a fifth of the draws
    assert counts.seen == 100 + counts.skipped
    assert "9.png" in counts.first
    deep = rng.integers(0, 65536, (SIDE, SIDE), dtype=np.uint16)
    (tmp_path / "grey").mkdir()
    Image.fromarray(deep).save(tmp_path / "grey" / "a.png")
    grey = Photos([PhotoSource(folder="grey", value_range=(0.0, 65535.0))], PLAIN, root=str(tmp_path), channels=1)
    crop = grey.crops(1, SIDE, np.random.default_rng(0))[0, 0].numpy()
    np.testing.assert_allclose(crop, deep / 32767.5 - 1, atol=1e-6)


def test_hugging_face_data_sets(tmp_path: Path) -> None:
    """Images of a saved data set with a column of pictures, by name or alone, and by split."""
    datasets = pytest.importorskip("datasets")
    pictures = [Image.fromarray(flat(n)) for n in range(5)]
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.Value("int32")})
    table = datasets.Dataset.from_dict({"picture": pictures, "label": list(range(5))}, features=features)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "two")
    for source in (PhotoSource(dataset="one"), PhotoSource(dataset="two", split="test", key="picture")):
        photos = Photos([source], PLAIN, root=str(tmp_path))
        assert len(photos) == 5
        assert set(numbers(photos, 50)) == set(range(5))
    with pytest.raises(DataError, match="columns picture, label: choose with key"):
        Photos([PhotoSource(dataset="one", key="image")], root=str(tmp_path))
    with pytest.raises(DataError, match="splits train, test: choose with split"):
        Photos([PhotoSource(dataset="two", split="validation")], root=str(tmp_path))


def test_mixtures_have_their_weights(shards: Path) -> None:
    """A large source would crowd out a small one (4 standard errors of 2,000 draws)."""
    np.save(shards / "a.npy", np.full((1, SIDE, SIDE, 3), 250, np.uint8))
    sources = [PhotoSource(shards="train-*.tar", weight=3.0), PhotoSource(array="a.npy", weight=1.0)]
    drawn = Counter(n == 250 for n in numbers(Photos(sources, PLAIN, root=str(shards)), 2000))
    assert abs(drawn[True] / 2000 - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5
