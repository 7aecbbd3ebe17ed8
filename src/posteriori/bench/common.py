"""What the measuring commands share: photos as tensors, results that survive an interruption, tables."""

from __future__ import annotations

import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from posteriori.checkpoint import write_atomically
from posteriori.denoise import Conditioning

__all__ = [
    "HalfPrecision",
    "Results",
    "markdown_table",
    "new_document",
    "photo_files",
    "read_photo",
    "replace_between",
    "say",
    "seed_of",
]

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


def say(text: str) -> None:
    """A line on standard output, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def seed_of(name: str) -> int:
    """A seed that depends on a photo's name alone, so that no selection of photos changes a problem."""
    return zlib.crc32(name.encode())


def photo_files(folder: str | Path, match: str = ".*", limit: int | None = None) -> list[Path]:
    """Photos of a folder whose name matches in full; ``limit`` of them, evenly spread over the sorted names.

    Raises:
        ValueError: when there is none.
    """
    files = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in SUFFIXES and re.fullmatch(match, p.name))
    if not files:
        raise ValueError(f"{folder} holds no photo matching {match!r}")
    if limit is None or limit >= len(files):
        return files
    return [files[i * len(files) // limit] for i in range(limit)]


def read_photo(path: Path, size: int) -> Tensor:
    """Centre crop ``(1, 3, size, size)`` in [-1, 1].

    Raises:
        ValueError: when the photo is smaller.
    """
    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    h, w = pixels.shape[:2]
    if min(h, w) < size:
        raise ValueError(f"{path.name} has {w}x{h} pixels, fewer than the crop of {size}")
    top, left = (h - size) // 2, (w - size) // 2
    crop = pixels[top : top + size, left : left + size].copy()  # the decoder's own memory is read-only
    return torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 127.5 - 1


class Results:
    """Rows of a JSON-lines file, each found again by its key: what was measured before an interruption stays measured.

    Args:
        path: the file; created with the first row.
        key: names of the fields that identify a row.
    """

    def __init__(self, path: str | Path, key: Sequence[str]) -> None:
        self.path, self.key = Path(path), tuple(key)
        self._rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # half a line of an interrupted run: it is measured again
                self._rows[self._key_of(row)] = row

    def _key_of(self, row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(k) for k in self.key)

    def rows(self) -> list[dict[str, Any]]:
        """All rows, in the order of the file."""
        return list(self._rows.values())

    def get(self, compute: Callable[[], dict[str, Any]], **key: Any) -> dict[str, Any]:
        """The row with this key, computed and appended when the file has none."""
        wanted = self._key_of(key)
        if wanted not in self._rows:
            row = {**key, **compute()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
            self._rows[wanted] = row
        return self._rows[wanted]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]], names: int = 1) -> str:
    """A Markdown table: ``names`` columns aligned to the left, then numbers, to the right."""
    cells = [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    lines = [" | ".join(header), " | ".join(["---"] * names + ["---:"] * (len(header) - names))]
    return "\n".join(f"| {line} |" for line in [*lines, *map(" | ".join, cells)])


def new_document(path: Path, *markers: str) -> None:
    """Write a document of nothing but empty places for :func:`replace_between`, unless it is there."""
    if not path.exists():
        write_atomically(path, "\n".join(f"<!-- {m} -->\n<!-- /{m} -->\n" for m in markers).encode())


def replace_between(path: str | Path, marker: str, content: str) -> None:
    """Replace what stands in a document between ``<!-- marker -->`` and ``<!-- /marker -->``; the rest stays.

    Raises:
        ValueError: when the document does not have both, in this order.
    """
    path = Path(path)
    head, opening, rest = path.read_text(encoding="utf-8").partition(f"<!-- {marker} -->")
    _, closing, tail = rest.partition(f"<!-- /{marker} -->")
    if not closing:
        raise ValueError(f"{path} needs the lines <!-- {marker} --> and <!-- /{marker} -->: put them where it goes")
    write_atomically(path, f"{head}{opening}\n{content.strip()}\n{closing}{tail}".encode())


class HalfPrecision(nn.Module):
    """A backbone in bfloat16 autocast; solves around it stay in full precision."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, inputs: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16):
            output: Tensor = self.backbone(inputs, c_noise, conditioning)
        return output.float()
