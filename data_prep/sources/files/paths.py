"""The interface between sources and storage: `StoragePath`, a file or folder, local or behind a URL that fsspec opens.

`local.py` and `remote.py` implement it, `find.py` picks the one for a location. Nothing that a path shows to people or
writes into manifests contains credentials.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep.beton.files import read_up_to
from data_prep.errors import Fault, UserError
from data_prep.redaction import MASK, redacted

HEAD_BYTES, TAIL_BYTES = 4096, 64
"""90 % of 1,000 ImageNet files have all headers within the head. 97 % have them within 16 KiB, but reading that much
from all takes longer than a second read of the rest."""
MAX_SAMPLE_BYTES = 256 << 20
"""Largest file that is read as one sample, so that a worker's memory is bounded whatever a listing or header says."""
IS_URL = re.compile(r"[a-z][a-z0-9+.:-]*://", re.IGNORECASE)
NO_FILE = -1
"""Stamp of a pipe, a device, a dangling link: listed, so that it is reported, and never opened."""


class FileStatus(NamedTuple):
    num_bytes: int
    """-1: the storage does not say."""
    stamp: int
    """Changes when the file is replaced: modification time in ns, or a hash of the store's tag. 0: unknown."""


class ListedFile(NamedTuple):
    name: str
    """Under the folder that was listed."""
    num_bytes: int
    stamp: int


class FolderListing(NamedTuple):
    files: list[ListedFile]
    hidden: list[str]
    """Names of files and folders that begin with a dot; such folders are not entered."""


class RangeReader(Protocol):
    """A large file, open for reading pieces of it."""

    def read_at(self, start: int, length: int) -> bytes:
        """Exactly `length` bytes. OSError when there are fewer, or they cannot be read."""
        ...

    def read_into(self, start: int, into: memoryview) -> None:
        """As `read_at`, as many bytes as fit into `into`."""
        ...

    def close(self) -> None: ...


class StoragePath(Protocol):
    """Picklable, and cheap to pickle."""

    @property
    def name(self) -> str: ...

    @property
    def shown(self) -> str:
        """Absolute, for people and manifests: without credentials."""
        ...

    def child(self, path: str) -> StoragePath: ...

    def parent(self) -> StoragePath: ...

    def kind(self) -> Literal["file", "folder"] | None:
        """None: it does not exist, or is neither."""
        ...

    def subfolders(self) -> list[str]:
        """Names of those that are not hidden, sorted as text."""
        ...

    def files(self, prefix: str = "", *, deep: bool = True) -> FolderListing:
        """Files below this folder, unordered, each name after `prefix`. UserError where links lead back to a folder
        that they are in."""
        ...

    def status(self) -> FileStatus: ...

    def read(self, expected: FileStatus | None = None) -> bytes:
        """The whole file. Fault when it is not as expected, so it was changed. ValueError beyond MAX_SAMPLE_BYTES."""
        ...

    def reader(self, expected: FileStatus) -> RangeReader:
        """Fault when the file is not as expected."""
        ...

    def open(self) -> AbstractContextManager[BinaryIO]:
        """Seekable."""
        ...


def without_credentials(text: str) -> str:
    """A URL, or a message that contains some, without secrets and without queries, which change from day to day in
    signed URLs although they name the same."""
    text = redacted(text).replace(f"://{MASK}@", "://")
    return re.sub(r"(://[^\s?#'\"]*)[?#][^\s'\"]*", r"\1", text)


def changed(shown: str) -> Fault:
    return Fault(f"{shown}: changed while it was being read; run the same command again when nothing writes to it")


def read_small(path: StoragePath, max_bytes: int, what: str) -> bytes:
    """A whole file; `what` says what it should be. UserError when it is not a file (reading a pipe would block), or has
    more than `max_bytes`, also if it never ends."""
    kind = path.kind()
    if kind != "file":
        raise UserError(
            f"{path.shown}: {'is a folder' if kind else 'does not exist, or is not a file'}; expected {what}"
        )
    with path.open() as file:
        data = read_up_to(file, max_bytes + 1)
    if len(data) > max_bytes:
        raise UserError(f"{path.shown}: has more than {max_bytes:,} bytes; expected {what}")
    return data


def check_sample_size(num_bytes: int) -> None:
    """ValueError beyond MAX_SAMPLE_BYTES."""
    if num_bytes > MAX_SAMPLE_BYTES:
        raise ValueError(f"has {num_bytes:,} bytes; a single file of at most {MAX_SAMPLE_BYTES:,} is read")


# --- the first and last bytes of files, which have an image's headers -------------------------------------------------


@dataclass(frozen=True)
class Ends:
    """The ends of several files."""

    rows: NDArray[np.uint8]
    """[files, max_head_bytes + TAIL_BYTES], uint8: the beginning of a file, directly followed by its end. The rest of a
    row is undefined."""
    num_bytes: NDArray[np.int64]
    """[files], sizes of the whole files; -1: the ends could not be read."""

    def __len__(self) -> int:
        return len(self.num_bytes)

    @property
    def max_head_bytes(self) -> int:
        return self.rows.shape[1] - TAIL_BYTES

    def of(self, number: int) -> tuple[memoryview, memoryview]:
        """(head, tail)."""
        head, tail = ends_bytes(int(self.num_bytes[number]), self.max_head_bytes)
        row = self.rows[number].data
        return row[:head], row[head : head + tail]

    def checked(self, number: int) -> bytes:
        """The same bytes as `ends_of` the whole file, if at least HEAD_BYTES were read as its head."""
        return ends_of(self.rows[number, : max(0, int(self.num_bytes[number]))].data)


def empty_ends(count: int, max_head_bytes: int = HEAD_BYTES) -> Ends:
    return Ends(np.empty((count, max_head_bytes + TAIL_BYTES), dtype=np.uint8), np.full(count, -1, dtype=np.int64))


def ends_bytes(num_bytes: int, max_head_bytes: int) -> tuple[int, int]:
    """Lengths of the head and tail of a file of that size; they do not overlap."""
    head = max(0, min(max_head_bytes, num_bytes))
    return head, max(0, min(TAIL_BYTES, num_bytes - head))


def ends_of(data: memoryview) -> bytes:
    """The first HEAD_BYTES and the last TAIL_BYTES of a file, by which it is recognised."""
    if len(data) <= HEAD_BYTES + TAIL_BYTES:
        return bytes(data)
    return bytes(data[:HEAD_BYTES]) + bytes(data[-TAIL_BYTES:])
