"""The benchmarks' shards of faces and of Tiny ImageNet: check a copy, or rebuild them from the data sets themselves.

    python scripts/shards.py check lfw-64 FOLDER
    python scripts/shards.py rebuild lfw-64 lfw.tgz FOLDER
    python scripts/shards.py rebuild tiny-imagenet-64 tiny-imagenet-200.zip FOLDER

The pictures may not be passed on, nor anything made from their pixels. ``scripts/shards/*.npz`` hold, for every member
of every shard, in order, the first 12 bytes of the SHA-256 of its JPEG file, and its class if it has one. Who has the
shards can make a list with a fingerprint of 128 bits for each (``list --fingerprints --lists FOLDER``), by which copies
that were cropped, shrunk or saved again are found too (``rebuild --lists FOLDER``).

``check`` compares hashes. ``rebuild`` reads a folder, zip or tar archive of the originals (LFW of
vis-www.cs.umass.edu/lfw, 250x250; Tiny ImageNet of cs231n.stanford.edu, 64x64) and puts every picture in its place: by
its hash where a shard holds the original file, else by the fingerprint of its central square shrunk to 64x64, pairs
with the fewest differing bits first. Pictures found by fingerprint are the same photos in the same order, not the same
bytes: ``check`` then says so, and figures differ in the digits that resampling and JPEG change.

The central square is tried with several sides (``--crop`` gives it), for the copies name no recipe.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

LISTS = Path(__file__).with_name("shards")
SETS = ("lfw-64", "tiny-imagenet-64")
SIDE, HASH_BYTES = 64, 12
SUFFIXES = {".jpg", ".jpeg", ".png"}
# Different faces rarely differ in fewer than 20 of 128 bits; a photo cropped or resampled otherwise differs in a few.
MOST_BITS = 16
CROPS = (250, 225, 200, 190, 180, 170, 160, 150, 140, 128, 112)


def digest(data: bytes) -> bytes:
    """The first bytes of the SHA-256 of a file."""
    return hashlib.sha256(data).digest()[:HASH_BYTES]


def fingerprint(data: bytes, crop: int = 0) -> np.ndarray:
    """128 bits of a file's central square, as two uint64: whether pixels of a grey miniature are brighter than their
    right neighbours (9x8), and than those below them (8x9)."""
    grey = shrink(Image.open(io.BytesIO(data)), crop).convert("L")
    across = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    down = np.asarray(grey.resize((8, 9), Image.Resampling.BOX), dtype=np.int16)
    bits = np.concatenate([across[:, :-1] > across[:, 1:], down[:-1] > down[1:]])
    return np.packbits(bits).view(">u8").astype(np.uint64)


def differing(prints: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How many bits of fingerprints ``(..., 2)`` differ."""
    return np.bitwise_count(prints ^ other).astype(int).sum(-1)


def shrink(picture: Image.Image, crop: int) -> Image.Image:
    """The central square of side ``crop`` (the largest one when 0 or too large), shrunk to 64x64."""
    w, h = picture.size
    side = min(w, h, crop or max(w, h))
    left, top = (w - side) // 2, (h - side) // 2
    square = picture.convert("RGB").crop((left, top, left + side, top + side))
    return square if side == SIDE else square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


@dataclass
class Members:
    """What a list says of one shard.

    Attributes:
        hashes: ``(n, 12)`` uint8.
        fingerprints: ``(n, 2)`` uint64, or ``(0, 2)``.
        labels: class of every member, or empty.
    """

    hashes: np.ndarray
    fingerprints: np.ndarray
    labels: list[str] = field(default_factory=list)


def read_list(name: str, lists: Path = LISTS) -> dict[str, Members]:
    """Shards of a set by their file names."""
    with np.load(lists / f"{name}.npz", allow_pickle=False) as held:
        shards = {}
        for shard in held["shards"].tolist():
            labels = []
            if f"{shard}.labels" in held:
                labels = held["classes"][held[f"{shard}.labels"]].tolist()
            prints = held.get(f"{shard}.fingerprints", np.zeros((0, 2), np.uint64))
            shards[shard] = Members(held[f"{shard}.hashes"], prints, labels)
    return shards


def write_list(name: str, folder: Path, lists: Path = LISTS, fingerprints: bool = False) -> None:
    """The list of the shards in a folder (``*.tar``, with ``*.labels.txt`` beside them or not)."""
    arrays: dict[str, np.ndarray] = {}
    paths = sorted(folder.glob("*.tar"))
    texts = {p.name: p.with_suffix(".labels.txt") for p in paths}
    labels = {shard: text.read_text().split() for shard, text in texts.items() if text.exists()}
    classes = sorted({c for values in labels.values() for c in values})
    for path in paths:
        data = [d for _, d in pictures(path)]
        arrays[f"{path.name}.hashes"] = np.frombuffer(b"".join(map(digest, data)), np.uint8).reshape(-1, HASH_BYTES)
        if fingerprints:
            arrays[f"{path.name}.fingerprints"] = np.stack([fingerprint(d) for d in data])
        if path.name in labels:
            index = [classes.index(c) for c in labels[path.name]]
            arrays[f"{path.name}.labels"] = np.array(index, np.uint16)
    lists.mkdir(exist_ok=True)
    shards = np.array([p.name for p in paths])
    np.savez_compressed(lists / f"{name}.npz", shards=shards, classes=np.array(classes, "U"), **arrays)


def pictures(source: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the pictures in a folder, zip or tar archive, in its order (a folder's: by name)."""
    if source.is_dir():
        for path in sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES):
            yield path.relative_to(source).as_posix(), path.read_bytes()
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            for name in archive.namelist():
                if Path(name).suffix.lower() in SUFFIXES:
                    yield name, archive.read(name)
    else:
        with tarfile.open(source) as archive:
            for member in archive:
                if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES:
                    stream = archive.extractfile(member)
                    assert stream is not None
                    yield member.name, stream.read()


def check(name: str, folder: Path, lists: Path = LISTS) -> list[str]:
    """What differs from the list, a line for every shard that does; empty when all bytes are the same."""
    faults = []
    for shard, members in read_list(name, lists).items():
        if not (folder / shard).exists():
            faults.append(f"{shard}: missing")
            continue
        data = [d for _, d in pictures(folder / shard)]
        if len(data) != len(members.hashes):
            faults.append(f"{shard}: {len(data)} pictures, {len(members.hashes)} are expected")
            continue
        wrong = [i for i, d in enumerate(data) if digest(d) != members.hashes[i].tobytes()]
        if wrong:
            told = ""
            if len(members.fingerprints):
                prints = np.stack([fingerprint(data[i]) for i in wrong])
                near = differing(prints, members.fingerprints[wrong]) <= MOST_BITS
                told = f", {near.sum()} of them show the same photo"
            faults.append(f"{shard}: {len(wrong)} of {len(data)} files differ{told}")
        text = folder / Path(shard).with_suffix(".labels.txt")
        if members.labels and (not text.exists() or text.read_text().split() != members.labels):
            faults.append(f"{text.name}: missing, or other classes")
    return faults


def best_crop(source: Path, wanted: np.ndarray, crops: Sequence[int], trial: int = 400) -> int:
    """The side of the central square under which most of the first originals are found."""
    found = []
    for crop in crops:
        hits = 0
        for i, (_, data) in enumerate(pictures(source)):
            if i == trial:
                break
            hits += int(differing(wanted, fingerprint(data, crop)).min()) <= MOST_BITS // 2
        found.append(hits)
    return crops[int(np.argmax(found))]


def rebuild(name: str, source: Path, folder: Path, crop: int | None = None, lists: Path = LISTS) -> dict[str, int]:
    """Write the shards of a set from its originals; members that are not found are left out.

    Returns:
        How many members were found by hash (``same``), by fingerprint (``alike``), and not at all (``missing``).
    """
    shards = read_list(name, lists)
    places = [(shard, i) for shard, members in shards.items() for i in range(len(members.hashes))]
    hashes: dict[bytes, list[tuple[str, int]]] = {}  # a few pictures are in the set twice
    for shard, i in places:
        hashes.setdefault(shards[shard].hashes[i].tobytes(), []).append((shard, i))
    printed = [(shard, i) for shard, members in shards.items() for i in range(len(members.fingerprints))]
    wanted = np.concatenate([m.fingerprints for m in shards.values()])
    if crop is None:
        crop = best_crop(source, wanted, CROPS) if printed and name.startswith("lfw") else 0
    content: dict[tuple[str, int], bytes] = {}
    near: list[tuple[int, int, int]] = []  # bits that differ, place, original
    for k, (_, data) in enumerate(pictures(source)):
        if (own := hashes.get(digest(data))) is not None:
            content.update((place, data) for place in own)
            continue
        if not printed:
            continue
        bits = differing(wanted, fingerprint(data, crop))
        near += [(int(bits[j]), int(j), k) for j in np.flatnonzero(bits <= MOST_BITS)]
    same = len(content)
    chosen: dict[int, tuple[str, int]] = {}
    taken = set(content)
    for _, j, k in sorted(near):
        if k not in chosen and printed[j] not in taken:
            chosen[k] = printed[j]
            taken.add(printed[j])
    for k, (_, data) in enumerate(pictures(source)):
        if k in chosen:
            stream = io.BytesIO()
            shrink(Image.open(io.BytesIO(data)), crop).save(stream, "JPEG", quality=92, subsampling=0)
            content[chosen[k]] = stream.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    for shard, members in shards.items():
        with tarfile.open(folder / shard, "w") as archive:
            for i in (i for i in range(len(members.hashes)) if (shard, i) in content):
                entry = tarfile.TarInfo(f"{i:06d}.jpg")
                entry.size = len(content[shard, i])
                archive.addfile(entry, io.BytesIO(content[shard, i]))
        if members.labels:
            kept = [c for i, c in enumerate(members.labels) if (shard, i) in content]
            (folder / shard).with_suffix(".labels.txt").write_text("\n".join(kept) + "\n")
    return {"same": same, "alike": len(chosen), "missing": len(places) - len(content)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, what in (
        ("check", "compare shards with the list"),
        ("list", "write the list of shards (maintainers)"),
    ):
        sub = commands.add_parser(command, help=what)
        sub.add_argument("set", choices=SETS)
        sub.add_argument("folder", type=Path)
        sub.add_argument("--lists", type=Path, default=LISTS, help="folder of the list")
        if command == "list":
            sub.add_argument("--fingerprints", action="store_true", help="made from pixels: not to be passed on")
    sub = commands.add_parser("rebuild", help="write the shards from the originals")
    sub.add_argument("set", choices=SETS)
    sub.add_argument("source", type=Path, help="folder, zip or tar archive")
    sub.add_argument("folder", type=Path)
    sub.add_argument("--crop", type=int, help="side of the central square; 0: the whole picture")
    sub.add_argument("--lists", type=Path, default=LISTS, help="folder of a list, with fingerprints or without")
    given = parser.parse_args(arguments)
    for path in (given.folder,) if given.command != "rebuild" else (given.source,):
        if not path.exists():
            print(f"error: no such file or folder: {path}", file=sys.stderr)
            return 2
    if given.command == "list":
        write_list(given.set, given.folder, given.lists, given.fingerprints)
    elif given.command == "check":
        faults = check(given.set, given.folder, given.lists)
        print("\n".join(faults) or f"{given.set}: every file is the one that the benchmarks used")
        return 3 if faults else 0
    else:
        print(rebuild(given.set, given.source, given.folder, given.crop, given.lists))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
