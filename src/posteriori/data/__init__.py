"""Training images as random crops in [-1, 1], from any mixture of sources.

A crop is a function of ``(seed, step)`` and, for shards, of how far their stream was read; both are in a checkpoint, so
a resumed run sees exactly what an uninterrupted one would have seen. A sample that cannot be read is skipped and
counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from posteriori.data.crops import Augmentation, crop
from posteriori.data.sources import Arrays, DataError, Folder, HubDataset, Indexed, PhotoSource, UnreadableError
from posteriori.data.streams import Position, Shards

__all__ = ["Augmentation", "Counts", "DataError", "PhotoSource", "Photos"]


@dataclass
class Counts:
    """Samples that were read, how many of them had to be skipped, and the reason of the first."""

    seen: int = 0
    skipped: int = 0
    first: str = ""

    def add(self, other: Counts) -> None:
        self.seen += other.seen
        self.skipped += other.skipped
        self.first = self.first or other.first

    def check(self, allowed: float, enough: int = 100) -> None:
        """Stop when too much is unreadable.

        Args:
            allowed: share of samples that may be skipped.
            enough: samples before which a share says nothing.

        Raises:
            DataError: above it.
        """
        if self.skipped > allowed * max(self.seen, enough):
            raise DataError(
                f"{self.skipped} of {self.seen} samples cannot be read, the first: {self.first}; repair the data, "
                f"or allow more than {allowed:.3g} with --set corrupt=SHARE"
            )


class Photos:
    """A mixture of sources, drawn from by crop.

    Args:
        sources: with their weights.
        augmentation: how crops are varied.
        root: folder or URL that the sources are relative to.
        channels: of the images.
        seed: of the order of shards.
        lanes: independent sequences that shards are divided into.

    Raises:
        DataError: when a source is missing or holds nothing that can be read.
    """

    def __init__(
        self,
        sources: Sequence[PhotoSource],
        augmentation: Augmentation | None = None,
        *,
        root: str = "",
        channels: int = 3,
        seed: int = 0,
        lanes: int = 1,
    ) -> None:
        self.sources = list(sources)
        self.augmentation = augmentation or Augmentation()
        self.readers: list[Indexed | Shards] = []
        for i, source in enumerate(self.sources):
            if source.shards:
                self.readers.append(Shards(source, root, channels, seed + i, lanes))
            else:
                kind = Folder if source.folder else Arrays if source.array else HubDataset
                self.readers.append(kind(source, root, channels))
        weights = np.array([s.weight for s in self.sources], dtype=np.float64)
        self._shares = weights / weights.sum()
        #: What was skipped when the sources were opened.
        self.skipped = [reason for r in self.readers if isinstance(r, Indexed) for reason in r.skipped]
        files = sum(r.files for r in self.readers if isinstance(r, Indexed))
        self._opened = Counts(files, len(self.skipped), self.skipped[0] if self.skipped else "")
        self._counts = Counts()

    @property
    def opened(self) -> Counts:
        """What was read and skipped when the sources were opened."""
        return self._opened

    @property
    def streams(self) -> bool:
        """Whether any source is streamed."""
        return any(isinstance(r, Shards) for r in self.readers)

    def __len__(self) -> int:
        """Images that are known of; shards do not tell before they are read."""
        return sum(len(r) for r in self.readers if isinstance(r, Indexed))

    def crops(self, count: int, size: int, rng: np.random.Generator, lane: int = 0) -> Tensor:
        """``count`` random crops, float32 ``(count, C, size, size)`` in [-1, 1].

        Images smaller than the crop are enlarged to it. ``lane``: the sequence that shards are read from.
        """
        picks = rng.choice(len(self.sources), count, p=self._shares)
        crops = [crop(self._draw(self.readers[p], rng, lane), size, self.augmentation, rng) for p in picks]
        return torch.stack([_to_tensor(c) for c in crops])

    def _draw(self, reader: Indexed | Shards, rng: np.random.Generator, lane: int) -> np.ndarray:
        if isinstance(reader, Shards):
            image = reader.next(lane, self._skip)
            self._counts.seen += 1
            return image
        for _ in range(100):
            self._counts.seen += 1
            try:
                return reader.read(int(rng.integers(len(reader))))
            except UnreadableError as reason:
                self._counts.add(Counts(0, 1, str(reason)))
        raise DataError(f"100 samples in a row cannot be read, the first: {self._counts.first}")

    def _skip(self, reason: str) -> None:
        self._counts.add(Counts(1, 1, reason))

    def take_counts(self) -> Counts:
        """What was read and skipped since the last time."""
        counts, self._counts = self._counts, Counts()
        return counts

    def positions(self, lane: int) -> dict[str, Position]:
        """How far a lane was read, by source."""
        return {
            f"{i}/{lane}": r.positions[lane]
            for i, r in enumerate(self.readers)
            if isinstance(r, Shards) and lane in r.positions
        }

    def seek(self, positions: dict[str, Position]) -> None:
        """Continue where :meth:`positions` says; before anything is read."""
        for key, (epoch, taken) in positions.items():
            source, lane = map(int, key.split("/"))
            reader = self.readers[source] if source < len(self.readers) else None
            if not isinstance(reader, Shards):
                raise DataError(f"source {source} is not the shards that the run had read: keep the order of sources")
            reader.positions[lane] = (int(epoch), int(taken))


def _to_tensor(image: np.ndarray) -> Tensor:
    values = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)
    return values / 127.5 - 1 if image.dtype == np.uint8 else values
