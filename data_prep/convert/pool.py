"""Who does the work of a conversion: this process, or Ray (`driver.py`). Both take a task and its items."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Protocol, TypeVar

from data_prep.convert.stop import StopFlag

Job = TypeVar("Job")
Item = TypeVar("Item")
Report = TypeVar("Report")


class Pool(Protocol):
    def run(
        self, task: Callable[[Job, Item], Report], job: Job, items: Iterator[Item | None]
    ) -> Generator[Report, None, None]:
        """Calls `task(job, item)` for every item, in any order; yields each result, and lets go when closed.

        `job` is what all items share. The next item is asked for when somebody is free to do it, and may depend on the
        results so far; None says that there is none before the next result. A task whose worker is lost is done again,
        so it must not mind being done twice.
        """
        ...


class ThisProcess:
    """For small data and for tests: no Ray, one item after the other."""

    def __init__(self, stop: StopFlag) -> None:
        self._stop = stop

    def run(
        self, task: Callable[[Job, Item], Report], job: Job, items: Iterator[Item | None]
    ) -> Generator[Report, None, None]:
        for item in items:
            self._stop.check()
            if item is not None:
                yield task(job, item)
