"""Where a beton is made: its unfinished work, and what stands in the end under the final names.

Two kinds: on a file system (`file_output.py`) and in an object store (`object_output.py`). Both are pickled to workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from data_prep.beton.ranges import FileRange, Payload

BETON, MANIFEST = ".beton", ".manifest.json"
BAD_SAMPLES, QUARANTINE = ".bad-samples.tsv", ".quarantine.tsv"
"""Ends of the final names: why there is no beton; what is not in it."""


@dataclass(frozen=True)
class Written:
    """A range that stands in the unfinished beton."""

    chunks: tuple[str, ...]
    """Digests."""
    receipt: str = ""
    """The store's own word for it, where it gives one."""
    contents: bytes = b""
    """`beton.contents.CONTENT` of each sample, known where its file was read for the first time; empty: of none."""


class Reader(Protocol):
    def read_at(self, start: int, num_bytes: int) -> bytes: ...

    def close(self) -> None: ...


class Output(Protocol):
    """All methods raise OSError, with a reason in its `strerror`, where nothing else is said."""

    @property
    def shown(self) -> str:
        """The beton's path or URL, for people."""
        ...

    @property
    def work_shown(self) -> str: ...

    # --- final names, all beside the beton

    def name_of(self, end: str) -> str:
        """`BAD_SAMPLES` -> `/data/train.bad-samples.tsv`, for people."""
        ...

    def num_bytes(self) -> int | None:
        """Of the beton; None: there is none."""
        ...

    def read_text(self, end: str) -> str | None: ...

    def write_text(self, end: str, text: str | None) -> None:
        """A reader sees the old text or the new one; None takes it away."""
        ...

    def write_bytes(self, end: str, data: bytes) -> None:
        """As `write_text`."""
        ...

    # --- the work: small files and parts, under names of their own

    def has_work(self) -> bool: ...

    def taken(self) -> AbstractContextManager[None]:
        """The work belongs to this process inside. UserError when another one has it, or it cannot be written."""
        ...

    def require_taken(self) -> None:
        """UserError when another process took the work over meanwhile."""
        ...

    def names(self) -> set[str]: ...

    def reader(self, name: str) -> Reader:
        """FileNotFoundError."""
        ...

    def size_of(self, name: str) -> int:
        """FileNotFoundError."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Whole under its name, or not at all."""
        ...

    def writing(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A large file, seen under its name when the block ends well."""
        ...

    def remove(self, name: str) -> None:
        """Also when it is not there."""
        ...

    def remove_work(self) -> None: ...

    # --- the beton, in ranges

    def range_bytes(self, total_bytes: int | None) -> int | None:
        """Of the ranges that a beton is written in. None: that depends on its size, and `total_bytes` is None."""
        ...

    def begin(self, plan_digest: str, *, is_new: bool = False) -> str:
        """An unfinished beton: the one of that plan, if there is one, unless it `is_new`: then no orphan of an earlier
        run writes to it; others are dropped. Returns what the ranges are written to."""
        ...

    def has_room(self, target: str, num_bytes: int) -> bool:
        """Whether there is so much, with what the unfinished beton takes, as far as the storage tells."""
        ...

    def make_room(self, target: str, total_bytes: int) -> None:
        """Before the last ranges are written: the beton will have that size. Fault when there is no room for it."""
        ...

    def write_range(self, target: str, part: FileRange, payload: Payload) -> Written: ...

    def holds(self, target: str, part: FileRange, written: Written) -> bool:
        """Whether a range that was written once is still there."""
        ...

    def publish(self, target: str, receipts: Sequence[str]) -> None:
        """The beton appears under its final name, durably. `receipts`: of all ranges, in order."""
        ...


def read_all(reader: Reader, num_bytes: int) -> bytes:
    try:
        return reader.read_at(0, num_bytes)
    finally:
        reader.close()


def read_work_file(output: Output, name: str) -> bytes | None:
    """A small file of the work; None: it is not there."""
    try:
        return read_all(output.reader(name), output.size_of(name))
    except FileNotFoundError:
        return None


def names_like(output: Output, *prefixes: str) -> Iterator[str]:
    return (name for name in sorted(output.names()) if name.startswith(prefixes))
