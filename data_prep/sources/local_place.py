"""Files of this machine, by plain system calls."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from data_prep.sources.local_listing import stat_files
from data_prep.sources.places import NO_FILE, FileStatus, ListedFile, Reader, changed, check_sample_size


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

    def read_into(self, start: int, into: memoryview) -> None:
        while len(into):
            count = os.preadv(self._fd, [into], start)
            if not count:
                raise OSError(f"{self._path}: ends {len(into)} bytes early")
            into, start = into[count:], start + count

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
    names: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            if not entry.is_dir():  # known from the listing itself, but for links
                names.append(name)
            elif deep:
                yield from _local_files(entry.path, f"{prefix}{name}/", deep)
    for name, (num_bytes, stamp) in zip(names, stat_files(folder, names), strict=True):
        yield ListedFile(f"{prefix}{name}", num_bytes, stamp)
