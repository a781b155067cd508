"""Files of this machine, by plain system calls, and many at a time by this package's own C (`native/read_files.c`)."""

from __future__ import annotations

import ctypes
import errno
import io
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.native import library as native_library
from data_prep.shown import shown
from data_prep.sources.files.listing import PackedStrings
from data_prep.sources.files.paths import (
    MAX_SAMPLE_BYTES,
    NO_FILE,
    TAIL_BYTES,
    Ends,
    FileStatus,
    FolderListing,
    ListedFile,
    RangeReader,
    changed,
    check_sample_size,
    empty_ends,
)

_UNKNOWN = -2
"""In C, beside `NO_FILE`: the status is for Python to find out."""


@dataclass(frozen=True)
class LocalPath:
    os_path: str
    """Absolute."""

    @property
    def name(self) -> str:
        return Path(self.os_path).name

    @property
    def shown(self) -> str:
        return self.os_path

    def child(self, path: str) -> LocalPath:
        return LocalPath(f"{self.os_path.rstrip('/')}/{path}")

    def parent(self) -> LocalPath:
        return LocalPath(str(Path(self.os_path).parent))

    def kind(self) -> Literal["file", "folder"] | None:
        path = Path(self.os_path)
        return "folder" if path.is_dir() else "file" if path.is_file() else None

    def subfolders(self) -> list[str]:
        with os.scandir(self.os_path) as entries:
            return sorted(e.name for e in entries if not e.name.startswith(".") and _is_folder(e))

    def files(self, prefix: str = "", *, deep: bool = True) -> FolderListing:
        return _local_files(self.os_path, prefix, deep)

    def status(self) -> FileStatus:
        status = Path(self.os_path).stat()
        return FileStatus(status.st_size, status.st_mtime_ns)

    def read(self, expected: FileStatus | None = None) -> bytes:
        with _Descriptor(self.os_path, expected) as file:
            check_sample_size(file.num_bytes)
            return file.read_at(0, file.num_bytes)

    def reader(self, expected: FileStatus) -> RangeReader:
        return _Descriptor(self.os_path, expected)

    def open(self) -> BinaryIO:
        return io.open(self.os_path, "rb")  # noqa: UP020  # `open` is this method


class _Descriptor:
    """A file read by `pread`: no seek, no buffer, no lock."""

    def __init__(self, path: str, expected: FileStatus | None) -> None:
        self._path = path
        if expected is not None and expected.stamp == NO_FILE:
            raise OSError("is not a file, nor a link to one")
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not block
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


class _WaitingFolder(NamedTuple):
    path: str
    prefix: str
    real_above: tuple[str, ...]
    """The real folder of each link on the way here."""


def _local_files(top: str, prefix: str, deep: bool) -> FolderListing:
    files: list[ListedFile] = []
    hidden: list[str] = []
    waiting = [_WaitingFolder(top, prefix, ())]
    while waiting:
        folder = waiting.pop()
        names: list[str] = []
        with os.scandir(folder.path) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    hidden.append(f"{folder.prefix}{name}")
                elif not _is_folder(entry):  # known from the listing, except for links
                    names.append(name)
                elif deep:
                    above = folder.real_above
                    if entry.is_symlink():
                        above = (*above, _require_no_loop(entry.path, folder))
                    waiting.append(_WaitingFolder(entry.path, f"{folder.prefix}{name}/", above))
        for name, (num_bytes, stamp) in zip(names, stat_files(folder.path, names), strict=True):
            files.append(ListedFile(f"{folder.prefix}{name}", num_bytes, stamp))
    return FolderListing(files, hidden)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself: listed, and not a file
            return False
        raise


def _require_no_loop(link: str, folder: _WaitingFolder) -> str:
    """The real path of the link's folder. UserError when the link leads to a folder that it is in, whose listing would
    never end."""
    here, target = os.path.realpath(folder.path), os.path.realpath(link)
    for inside in (here, *folder.real_above):
        if f"{inside}/".startswith(f"{target.rstrip('/')}/"):
            raise UserError(f"{shown(link)}: is a link to a folder that it is in, {shown(target)}; remove the link")
    return here


# --- many files at a time, in C ---------------------------------------------------------------------------------------


class _Listing(ctypes.Structure):
    _fields_ = (
        ("root", ctypes.c_char_p),
        *((name, ctypes.c_void_p) for name in ("names", "name_ends", "sizes", "stamps_ns")),
    )


def stat_files(folder: str, names: Sequence[str]) -> list[FileStatus]:
    """Follows links. What is not a file, or does not exist, has 0 bytes and the stamp `NO_FILE`. OSError when the
    status cannot be read."""
    library = native_library()
    if library is None:
        return [_status(folder, name) for name in names]
    sizes, stamps = np.empty(len(names), dtype=np.int64), np.empty(len(names), dtype=np.int64)
    packed, ends = PackedStrings(names).packed
    listing = _Listing(os.fsencode(folder), packed.ctypes.data, ends.ctypes.data, None, None)
    library.data_prep_stat_files(ctypes.byref(listing), len(names), sizes.ctypes.data, stamps.ctypes.data)
    found = list(map(FileStatus, sizes.tolist(), stamps.tolist()))
    for number in np.flatnonzero(stamps == _UNKNOWN).tolist():
        found[number] = _status(folder, names[number])
    return found


def _status(folder: str, name: str) -> FileStatus:
    try:
        status = Path(folder, name).stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):  # a dangling link, a link to itself, or just deleted
            return FileStatus(0, NO_FILE)
        raise
    return FileStatus(status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else FileStatus(0, NO_FILE)


class LocalListing:
    """Reads files below a folder as they were listed.

    What it leaves out (changed, deleted, not a file, larger than a sample may be; everything if the C was not built) is
    for Python to read one by one, and to report what is wrong.
    """

    def __init__(self, root: str, names: PackedStrings, sizes: NDArray[np.int64], stamps: NDArray[np.int64]) -> None:
        self._library = native_library()
        packed, ends = names.packed
        self._arrays = tuple(map(np.ascontiguousarray, (packed, ends, sizes, stamps)))  # kept: C uses their addresses
        self._sizes = sizes
        self._listing = _Listing(os.fsencode(root), *(array.ctypes.data for array in self._arrays))

    def ends(self, indices: Sequence[int], max_head_bytes: int) -> Ends:
        ends = empty_ends(len(indices), max_head_bytes)
        if self._library is not None:
            numbers = np.array(indices, dtype=np.int64)
            self._library.data_prep_read_ends(
                ctypes.byref(self._listing),
                numbers.ctypes.data,
                len(numbers),
                max_head_bytes,
                TAIL_BYTES,
                ends.rows.ctypes.data,
                ends.rows.strides[0],
                ends.num_bytes.ctypes.data,
            )
            ends.num_bytes[self._sizes[numbers] > MAX_SAMPLE_BYTES] = -1
        return ends

    def read_into(self, indices: Sequence[int], into: memoryview) -> bool:
        """Writes whole files back to back, which fill `into` exactly. False if not all could be read."""
        if self._library is None or not len(into):
            return False
        numbers = (ctypes.c_int64 * len(indices))(*indices)
        address = ctypes.byref(ctypes.c_char.from_buffer(into))
        return bool(
            self._library.data_prep_read_files(ctypes.byref(self._listing), numbers, len(indices), address, len(into))
        )
