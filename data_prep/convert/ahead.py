"""Which ranges of a beton can be written while later images are still unread, their files being in memory just now.

Images follow one another in the order of the source, so the place of one depends on those before it alone, and on where
the pages start: that follows from the number of samples. Should it turn out otherwise, because samples were left out,
the ranges are not those of the finished layout, and nothing is lost but the time that they took.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from data_prep.beton import layout
from data_prep.beton.pages import pack
from data_prep.beton.ranges import cut_images
from data_prep.convert.part import Part
from data_prep.convert.place import PLACED_ROW, PlaceTask


def placed_rows(rows: NDArray[np.void], first_index: int) -> NDArray[np.void]:
    """`PLACED_ROW`s of those of the `PART_ROW`s that are stored; `first_index`: in the source, of the first."""
    stored = rows["size"] > 0
    placed = np.zeros(int(stored.sum()), dtype=PLACED_ROW)
    placed["index"] = np.flatnonzero(stored) + first_index
    for name in ("check", "spill"):
        placed[name] = rows[name][stored]
    return placed


class WriteAhead:
    """Takes the parts in order, gives the ranges that are complete with them. Holds the samples of one of each."""

    def __init__(self, num_samples: int, page_bytes: int, range_bytes: int) -> None:
        self._page_bytes = page_bytes
        self._range_bytes = range_bytes
        self._pages_start = layout.pages_start(num_samples, page_bytes)
        self._next_range = -(-self._pages_start // range_bytes)  # those before it hold the tables
        self._used_bytes = 0  # of the pages
        self._first_sample = 0  # of those below
        self._pointers: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._sizes: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._samples: NDArray[np.void] = np.zeros(0, dtype=PLACED_ROW)

    def add(self, part: Part) -> Iterator[PlaceTask]:
        sizes = part.rows["size"][part.rows["size"] > 0].astype(np.int64)
        if not len(sizes):
            return
        offsets, _ = pack(sizes, self._page_bytes, self._used_bytes)
        self._used_bytes = int(offsets[-1] + sizes[-1])
        self._pointers = np.concatenate([self._pointers, offsets + self._pages_start])
        self._sizes = np.concatenate([self._sizes, sizes])
        self._samples = np.concatenate([self._samples, placed_rows(part.rows, part.unit.start)])
        while (self._next_range + 1) * self._range_bytes <= self._pages_start + self._used_bytes:
            yield self._cut()

    def _cut(self) -> PlaceTask:
        start = self._next_range * self._range_bytes
        part = cut_images(
            self._next_range, start, start + self._range_bytes, self._pointers, self._sizes, self._first_sample
        )
        inside = slice(part.samples.start - self._first_sample, part.samples.stop - self._first_sample)
        task = PlaceTask(part, self._samples[inside].copy())
        done = max(inside.stop - 1, 0)  # the last one may reach into the next range
        self._first_sample += done
        self._pointers, self._sizes, self._samples = self._pointers[done:], self._sizes[done:], self._samples[done:]
        self._next_range += 1
        return task
