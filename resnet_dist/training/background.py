"""Work that must not hold up training, done by one thread, one piece at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="background")
        self._last: Future[object] | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Waits for the piece before, so that at most one is held in memory. Raises what that one raised."""
        self.wait()
        self._last = self._thread.submit(work)

    def wait(self) -> None:
        """Until everything is done. Raises what the last piece raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()
