"""What does a conversion's work, and what shows its progress."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Protocol, Self, TypeVar

from data_prep.runtime.stop import StopFlag

JobT = TypeVar("JobT")
ItemT = TypeVar("ItemT")
ReportT = TypeVar("ReportT")


class Pool(Protocol):
    """Does pieces of work: `ThisProcess` below, or `ray_pool.RayPool`."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def run(
        self, task: Callable[[JobT, ItemT], ReportT], job: JobT, items: Iterator[ItemT | None]
    ) -> Generator[ReportT, None, None]:
        """Yields `task(job, item)` for every item, in any order. Closing it cancels what is running.

        Args:
            task: may run twice for an item, on two machines: one whose worker is lost is submitted again.
            job: what all items share; sent to each worker once.
            items: the next item is taken when a worker is free, so it may depend on the results so far. None: there is
                nothing to do before the next result.
        """
        ...


class ThisProcess:
    """One item after the other, without Ray: for small data and tests."""

    def __init__(self, stop: StopFlag) -> None:
        self._stop = stop

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def run(
        self, task: Callable[[JobT, ItemT], ReportT], job: JobT, items: Iterator[ItemT | None]
    ) -> Generator[ReportT, None, None]:
        for item in items:
            self._stop.check()
            if item is not None:
                yield task(job, item)


class Progress:
    """Shows how far a conversion is. This one shows nothing; those of `cli.progress` use a terminal or a log."""

    def log(self, text: str) -> None:
        """Shows one separate line."""

    def encoded(self, samples: int, total: int, source_bytes: int, bad: int, by_node: Mapping[str, int]) -> None:
        """Shows how many samples of `total` are read and encoded. `by_node`: samples by host name, in this run."""

    def written(self, num_bytes: int, total: int | None, by_node: Mapping[str, int] | None = None) -> None:
        """Shows the bytes written of a beton of `total` bytes; None: not known yet. `by_node`: bytes by host name, in
        this run."""

    def decoded(self, samples: int, total: int) -> None:
        """Shows how many images `verify` has decoded."""
