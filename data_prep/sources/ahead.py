"""Small files of a remote store, fetched some ahead: each takes a round trip, and in order many can be under way."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

NUM_AHEAD = 16


class FetchAhead:
    """`fetch` must be safe to call from threads. At most NUM_AHEAD files more than asked for are fetched."""

    def __init__(self, fetch: Callable[[int], bytes], count: int) -> None:
        self._fetch = fetch
        self._count = count
        self._pool = ThreadPoolExecutor(NUM_AHEAD)
        self._under_way: dict[int, Future[bytes]] = {}
        self._last = -2

    def __getitem__(self, index: int) -> bytes:
        """Raises what `fetch` of this index raised."""
        if index != self._last + 1:  # not in order: what is under way is of no use
            for useless in self._under_way.values():
                useless.cancel()
            self._under_way = {}
        else:
            for number in range(index, min(index + 1 + NUM_AHEAD, self._count)):
                if number not in self._under_way:
                    self._under_way[number] = self._pool.submit(self._fetch, number)
        self._last = index
        future = self._under_way.pop(index, None)
        return self._fetch(index) if future is None else future.result()
