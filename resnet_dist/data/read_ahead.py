"""For `data.shuffle: page`: asks the kernel for a beton's pages before their samples are due, each as one long read."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray


def first_uses(page_of_sample: NDArray[np.int64], sample_ids: NDArray[np.int64]) -> list[tuple[int, int]]:
    """(place in `sample_ids` where a page is first needed, page), ascending."""
    pages, places = np.unique(page_of_sample[sample_ids], return_index=True)
    return sorted(zip(places.tolist(), pages.tolist(), strict=True))


class ReadAhead:
    """Hints for one epoch. Opens the file; `with` closes it."""

    def __init__(self, beton: Path, page_bytes: int, uses: list[tuple[int, int]], ahead: int) -> None:
        """`ahead`: how many samples before its first use a page is asked for."""
        self._uses = uses
        self._next = 0
        self._page_bytes = page_bytes
        self._ahead = ahead
        self._file = os.open(beton, os.O_RDONLY)

    def reached(self, place: int) -> None:
        """Sample number `place` of the order is due. Does not wait for the disk."""
        while self._next < len(self._uses) and self._uses[self._next][0] < place + self._ahead:
            page = self._uses[self._next][1]
            os.posix_fadvise(self._file, page * self._page_bytes, self._page_bytes, os.POSIX_FADV_WILLNEED)
            self._next += 1

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        os.close(self._file)
