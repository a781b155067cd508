"""Who does the work of a conversion: this process, or Ray (`driver.py`). Both take a task and its items."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from data_prep.converter.output import Output
from data_prep.converter.plan import Plan
from data_prep.runtime.stop import StopFlag
from data_prep.sources.base import Source

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


class Progress(Protocol):
    def note(self, text: str) -> None:
        """One line of its own."""
        ...

    def encoded(self, samples: int, total: int, source_bytes: int, bad: int, by_node: Mapping[str, int]) -> None:
        """So many samples are read and encoded, of `total`; `by_node`: by which machines, in this run."""
        ...

    def written(self, num_bytes: int, total: int | None, by_node: Mapping[str, int] | None = None) -> None:
        """Of the beton, whose size may not be known yet; `by_node`: bytes by which machines, in this run."""
        ...

    def decoded(self, samples: int, total: int) -> None:
        """Of the images that verify decodes."""
        ...


class NoProgress:
    def note(self, text: str) -> None: ...

    def encoded(self, samples: int, total: int, source_bytes: int, bad: int, by_node: Mapping[str, int]) -> None: ...

    def written(self, num_bytes: int, total: int | None, by_node: Mapping[str, int] | None = None) -> None: ...

    def decoded(self, samples: int, total: int) -> None: ...


# What every step of a conversion needs.


@dataclass(frozen=True)
class Means:
    source: Source
    plan: Plan
    output: Output
    pool: Pool
    progress: Progress
    stop: StopFlag

    @property
    def reads_again(self) -> bool:
        """The source is on a file system: cheap to read and to list again. Anything else is made or fetched anew each
        time."""
        return Path(self.plan.source.location).is_absolute()
