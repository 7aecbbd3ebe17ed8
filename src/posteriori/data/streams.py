"""WebDataset shards: tar files of images, streamed from disk or the network, shuffled, and divided into lanes.

A lane is an endless sequence of samples that depends on ``(seed, lane, lanes)`` alone: in every epoch the shards come
in another order, and the samples of a lane pass through a buffer they leave at random. With at least as many shards as
lanes each lane reads shards of its own, with fewer it keeps every ``lanes``-th sample. A lane's position, the epoch and
how many of its samples were taken, is all that has to be remembered: going there again reads the samples of that
epoch without decoding them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from posteriori.data.sources import IMAGE_SUFFIXES, DataError, PhotoSource, UnreadableError, decode, under

__all__ = ["Shards"]

Position = tuple[int, int]  # epoch, samples of it that were taken
BUFFER = 1000


class Shards:
    """Shards of one source.

    Args:
        source: with ``shards`` set.
        root: folder or URL that it is relative to.
        channels: of the images.
        seed: of the order.
        lanes: number of independent sequences.

    Raises:
        DataError: when there is no shard, or webdataset is not installed.
    """

    def __init__(self, source: PhotoSource, root: str, channels: int, seed: int, lanes: int) -> None:
        try:
            import webdataset  # noqa: F401
        except ModuleNotFoundError:
            raise DataError("shards need webdataset: pip install 'posteriori[train]'") from None
        from braceexpand import braceexpand

        self.urls: list[str] = []
        for place in braceexpand(under(root, source.shards)):
            if place.startswith("pipe:"):
                raise DataError(f"{place}: a recipe does not run commands; give a path or a URL")
            self.urls += [place] if "://" in place else sorted(map(str, Path(place).parent.glob(Path(place).name)))
        if not self.urls:
            raise DataError(f"no shards {under(root, source.shards)}: give the data with --set data=PATH")
        self.channels, self.value_range, self.key = channels, source.value_range, source.key
        self.seed, self.lanes = seed, lanes
        self.positions: dict[int, Position] = {}
        self._running: dict[int, Iterator[dict[str, Any]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_running": {}}  # another process opens its lanes itself

    def next(self, lane: int, skip: Callable[[str], None]) -> np.ndarray:
        """The next image of a lane; ``skip`` is told of each one that cannot be read."""
        ends = 0
        while True:
            epoch, taken = self.positions.setdefault(lane, (0, 0))
            if lane not in self._running:
                self._running[lane] = self._epoch(epoch, lane, skip, taken)
            sample = next(self._running[lane], None)
            if sample is None:  # the epoch is over
                ends += 1
                if ends == 2:  # with nothing in between
                    raise DataError(
                        f"lane {lane + 1} of {self.lanes} finds no image in {len(self.urls)} shards such as "
                        f"{self.urls[0]}: give shards of images, or fewer lanes"
                    )
                del self._running[lane]
                self.positions[lane] = (epoch + 1, 0)
                continue
            self.positions[lane] = (epoch, taken + 1)
            try:
                return self._decode(sample)
            except UnreadableError as reason:
                skip(f"{Path(sample['__url__']).name}/{sample['__key__']}: {reason}")

    def _epoch(self, epoch: int, lane: int, skip: Callable[[str], None], taken: int) -> Iterator[dict[str, Any]]:
        """The samples of an epoch, not decoded, without the first ``taken``."""
        import webdataset

        urls = list(self.urls)
        random.Random(f"{self.seed} {epoch}").shuffle(urls)
        by_shard = len(urls) >= self.lanes
        if by_shard:
            urls = urls[lane :: self.lanes]
        going_back = taken > 0

        def broken(error: Exception) -> bool:
            if not going_back:  # else it was counted the first time
                skip(f"shard: {' '.join(str(a) for a in error.args if isinstance(a, str))}")
            return True

        samples = webdataset.tarfile_to_samples(handler=broken)({"url": url} for url in urls)
        if not by_shard:
            samples = islice(samples, lane, None, self.lanes)
        order = random.Random(f"{self.seed} {epoch} {lane}")
        shuffled = webdataset.shuffle(BUFFER, initial=BUFFER, rng=order)(samples)
        for _ in islice(shuffled, taken):
            pass
        going_back = False
        yield from shuffled

    def _decode(self, sample: dict[str, Any]) -> np.ndarray:
        names = [k for k in sample if f".{k.rpartition('.')[2]}" in IMAGE_SUFFIXES]
        name = self.key or (names[0] if len(names) == 1 else "")
        if name not in sample:
            known = ", ".join(k for k in sample if not k.startswith("__"))
            raise UnreadableError(f"not one image among {known}: choose with key: NAME")
        return decode(sample[name], self.channels, self.value_range)
