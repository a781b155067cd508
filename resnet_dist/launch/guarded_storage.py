"""A run's storage as its workers write to it: patient when it is full, closed to those whose driver was replaced."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.commit import commit_within
from resnet_dist.launch.lease import Lease
from resnet_dist.storage.base import RunStorage


@dataclass(frozen=True)
class GuardedStorage:
    """`inner`, but for `commit`."""

    inner: RunStorage
    lease: Lease
    limit_s: float
    """Longest time to try."""
    warn: Callable[[str], object]
    give_up: Callable[[str], object]
    """Hears why a checkpoint will never be written: a restart of the workers would not mend it."""

    def commit(self, name: str, write: Callable[[Path], None], last: str) -> None:
        """Raises Fault when the time is over, or if another driver has the run."""

        def once() -> None:
            try:
                self.lease.require_held()
            except UserError as error:  # it was there when the worker began: perhaps it is being mounted again
                raise OSError(str(error)) from None
            self.inner.commit(name, write, last)

        try:
            commit_within(once, self.limit_s, what=f"{self.location}/{name}", warn=self.warn)
        except Fault as fault:
            self.give_up(str(fault))
            raise

    @property
    def location(self) -> str:
        return self.inner.location

    @property
    def folder(self) -> Path:
        return self.inner.folder

    @property
    def sync_every_s(self) -> float:
        return self.inner.sync_every_s

    def pull(self) -> None:
        self.inner.pull()

    def publish(self, path: Path) -> None:
        self.inner.publish(path)

    def claim(self, path: Path) -> bool:
        return self.inner.claim(path)

    def extended(self, path: Path, num_bytes: int) -> None:
        self.inner.extended(path, num_bytes)

    def names(self, group: str = "") -> list[str]:
        return self.inner.names(group)

    def fetched(self, name: str) -> AbstractContextManager[Path]:
        return self.inner.fetched(name)

    def read(self, name: str) -> bytes | None:
        return self.inner.read(name)

    def remove(self, name: str) -> None:
        self.inner.remove(name)

    def require_writable(self) -> None:
        self.inner.require_writable()
