"""The one seam between sources and storage: a `Place` is a file or folder, local or behind a URL that fsspec opens.

Local places use plain system calls (`scandir`, `pread`); `remote.py` has the others. Nothing that a place shows to
people or writes into manifests holds credentials.
"""

from __future__ import annotations

import glob
import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, Protocol

from data_prep.errors import Fault

MAX_SAMPLE_BYTES = 256 << 20
"""Largest file that is read as one sample: a worker's memory stays bounded, whatever a listing or a header says."""
IS_URL = re.compile(r"[a-z][a-z0-9+.:-]*://", re.IGNORECASE)
GLOB = re.compile(r"[*?\[]")
BRACES = re.compile(r"\{([^{}]*)\}")
NUMBER_RANGE = re.compile(r"(\d+)\.\.(\d+)")
MAX_EXPANDED = 1_000_000


NO_FILE = -1
"""Stamp of a pipe, a device, a link to nothing: listed, so that it is reported, and never opened."""


class FileStatus(NamedTuple):
    num_bytes: int
    """-1: the storage does not say."""
    stamp: int
    """Changes when the file is replaced: its time of change in ns, or a hash of the store's tag. 0: unknown."""


class ListedFile(NamedTuple):
    name: str
    """Under the folder that was listed."""
    num_bytes: int
    stamp: int


class Reader(Protocol):
    """A large file, open for reading pieces of it."""

    def read_at(self, start: int, length: int) -> bytes:
        """Exactly `length` bytes. OSError when there are fewer, or they cannot be read."""
        ...

    def close(self) -> None: ...


class Place(Protocol):
    """Picklable, and cheap to pickle."""

    @property
    def name(self) -> str: ...

    @property
    def shown(self) -> str:
        """Absolute, for people and manifests: without credentials."""
        ...

    def child(self, path: str) -> Place: ...

    def parent(self) -> Place: ...

    def kind(self) -> Literal["file", "folder"] | None:
        """None: there is nothing."""
        ...

    def subfolders(self) -> list[str]:
        """Names, sorted as text, without hidden ones."""
        ...

    def files(self, prefix: str = "", *, deep: bool = True) -> list[ListedFile]:
        """Files below this folder, in no order; hidden ones and hidden folders are passed over. `prefix` is put before
        each name."""
        ...

    def status(self) -> FileStatus: ...

    def read(self, expected: FileStatus | None = None) -> bytes:
        """The whole file. Fault when it is not as expected: somebody changed it. ValueError beyond MAX_SAMPLE_BYTES."""
        ...

    def reader(self, expected: FileStatus) -> Reader:
        """Fault when the file is not as expected."""
        ...

    def open(self) -> AbstractContextManager[BinaryIO]:
        """Seekable."""
        ...


def place_of(location: str) -> Place:
    """`location`: a local path or a URL. UserError when nothing here reads such URLs."""
    if not IS_URL.match(location):
        return LocalPlace(str(Path(location).expanduser().resolve()))
    if location.startswith("file://"):
        return LocalPlace(str(Path(location.removeprefix("file://")).resolve()))
    from data_prep.sources.remote import remote_place

    return remote_place(location)


def find_places(location: str) -> list[Place]:
    """The files that a name, a glob or a pattern with braces means, in order; a folder stands for itself.

    `{000..127}` counts with leading zeros, `{a,b}` lists; files named by braces need not exist.
    """
    found: list[Place] = []
    for expanded in expand_braces(location):
        if not GLOB.search(expanded) or (IS_URL.match(expanded) and "*" not in expanded):
            found.append(place_of(expanded))
        elif IS_URL.match(expanded) and not expanded.startswith("file://"):
            from data_prep.sources.remote import remote_glob

            found += remote_glob(expanded)
        elif Path(expanded).expanduser().exists():  # a name that only looks like a pattern
            found.append(place_of(expanded))
        else:
            pattern = str(Path(expanded.removeprefix("file://")).expanduser())
            found += [place_of(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207  # absolute
    return found


def expand_braces(pattern: str) -> list[str]:
    """As a shell does, for numbers and lists: `a-{00..02}` -> `a-00`, `a-01`, `a-02`."""
    match = BRACES.search(pattern)
    if match is None:
        return [pattern]
    span = NUMBER_RANGE.fullmatch(match[1])
    if span:
        first, last = int(span[1]), int(span[2])
        if last - first >= MAX_EXPANDED:
            raise ValueError(f"{match[0]} counts to more than {MAX_EXPANDED:,}")
        width = len(span[1]) if span[1].startswith("0") else 0
        choices = [str(number).zfill(width) for number in range(first, last + 1)]
    elif "," in match[1]:
        choices = match[1].split(",")
    else:  # not ours to expand
        return [match.string[: match.end()] + rest for rest in expand_braces(pattern[match.end() :])]
    rests = expand_braces(pattern[match.end() :])
    return [pattern[: match.start()] + choice + rest for choice in choices for rest in rests]


def without_credentials(text: str) -> str:
    """A URL, or a message that holds some, without user, password, and query (signed URLs carry their secret there)."""
    text = re.sub(r"(://)[^\s/@]*:[^\s@]*@", r"\1", text)
    text = re.sub(r"(://)[^\s/?#@]*@", r"\1", text)
    return re.sub(r"(://[^\s?#'\"]*)[?#][^\s'\"]*", r"\1", text)


def changed(shown: str) -> Fault:
    return Fault(
        f"{shown}: changed while it was being read; run the same command again when nothing writes there any more"
    )


def check_sample_size(num_bytes: int) -> None:
    """ValueError beyond MAX_SAMPLE_BYTES."""
    if num_bytes > MAX_SAMPLE_BYTES:
        raise ValueError(f"has {num_bytes:,} bytes; a single file of at most {MAX_SAMPLE_BYTES:,} is read")


@dataclass(frozen=True)
class LocalPlace:
    path: str
    """Absolute."""

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def shown(self) -> str:
        return self.path

    def child(self, path: str) -> LocalPlace:
        return LocalPlace(f"{self.path.rstrip('/')}/{path}")

    def parent(self) -> LocalPlace:
        return LocalPlace(str(Path(self.path).parent))

    def kind(self) -> Literal["file", "folder"] | None:
        path = Path(self.path)
        return "folder" if path.is_dir() else "file" if path.is_file() else None

    def subfolders(self) -> list[str]:
        with os.scandir(self.path) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())

    def files(self, prefix: str = "", *, deep: bool = True) -> list[ListedFile]:
        return list(_local_files(self.path, prefix, deep))

    def status(self) -> FileStatus:
        status = Path(self.path).stat()
        return FileStatus(status.st_size, status.st_mtime_ns)

    def read(self, expected: FileStatus | None = None) -> bytes:
        with _Descriptor(self.path, expected) as file:
            check_sample_size(file.num_bytes)
            return file.read_at(0, file.num_bytes)

    def reader(self, expected: FileStatus) -> Reader:
        return _Descriptor(self.path, expected)

    def open(self) -> BinaryIO:
        return io.open(self.path, "rb")  # noqa: UP020  # `open` is this method


class _Descriptor:
    """A file descriptor and `pread`: no seek, no buffer, no lock."""

    def __init__(self, path: str, expected: FileStatus | None) -> None:
        self._path = path
        if expected is not None and expected.stamp == NO_FILE:
            raise OSError("is no file, nor a link to one")
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not hold us up
        except FileNotFoundError:
            if expected is None:
                raise
            raise changed(path) from None
        status = os.fstat(self._fd)
        self.num_bytes = status.st_size
        if expected is not None and expected != (status.st_size, status.st_mtime_ns):
            self.close()
            raise changed(path)

    def read_at(self, start: int, length: int) -> bytes:
        data = os.pread(self._fd, length, start)
        while len(data) < length:  # one call reads at most 2 GiB, and less on a signal
            piece = os.pread(self._fd, length - len(data), start + len(data))
            if not piece:
                raise OSError(f"{self._path}: ends {length - len(data)} bytes early")
            data += piece
        return data

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> _Descriptor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()


def _local_files(folder: str, prefix: str, deep: bool) -> Iterator[ListedFile]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():  # known from the listing itself, but for links
                if deep:
                    yield from _local_files(entry.path, f"{prefix}{entry.name}/", deep)
                continue
            try:
                status = entry.stat()
            except FileNotFoundError:  # a link to nothing, or just gone
                yield ListedFile(f"{prefix}{entry.name}", 0, NO_FILE)
                continue
            is_file = stat.S_ISREG(status.st_mode)
            yield ListedFile(
                f"{prefix}{entry.name}",
                status.st_size if is_file else 0,
                status.st_mtime_ns if is_file else NO_FILE,
            )
