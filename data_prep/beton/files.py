"""Files in folders that others may write to: written durably and atomically, and never through a planted link.

Anyone who may write to a folder can put a symbolic link, a pipe or a device where a file is expected. So only regular
files are opened, and writing goes to a new file that then takes the name, whatever had it before.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data_prep.errors import Fault, UserError

_PRIVATE = 0o700
_PIECE_BYTES = 1 << 20

BETON = ".beton"
"""The suffix of a beton's name."""


class Unfit(OSError):
    """The name belongs to something that is not read or written: a link, a pipe, a device, too large a file."""


def write_at(descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Writes all of `data` at `offset`: one `pwrite` may write less than it was given."""
    view = memoryview(data)
    while len(view):
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def open_regular(path: Path, flags: int, mode: int = 0o666, *, follow: bool = False) -> int:
    """`os.open` for regular files. Unfit for a link (unless `follow`), and for a pipe or anything else on which a call
    might wait forever."""
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW), mode)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise Unfit(errno.ELOOP, "is a symbolic link", str(path)) from None
        if error.errno in (errno.EISDIR, errno.ENXIO):
            raise Unfit(errno.EINVAL, "is not a regular file", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Unfit(errno.EINVAL, "is not a regular file", str(path))
    return descriptor


def read_up_to(file: BinaryIO, num_bytes: int) -> bytes:
    """At most `num_bytes`. A single read would allocate memory for all of them, even if the file is short."""
    data = bytearray()
    while piece := file.read(min(_PIECE_BYTES, num_bytes - len(data))):
        data += piece
    return bytes(data)


def read_small(path: Path, max_bytes: int, *, follow: bool = False) -> bytes:
    """All of a regular file. Unfit when it has more than `max_bytes`."""
    with open(open_regular(path, os.O_RDONLY, follow=follow), "rb") as file:
        data = read_up_to(file, max_bytes + 1)
    if len(data) > max_bytes:
        raise Unfit(errno.EFBIG, f"has more than {max_bytes:,} bytes", str(path))
    return data


@contextmanager
def open_location(location: str | Path) -> Iterator[BinaryIO]:
    """A path, or a URL that fsspec reads. UserError for a URL of an unknown kind."""
    if "://" not in str(location):
        with Path(location).expanduser().open("rb") as file:
            yield file
        return
    import fsspec

    try:
        opened = fsspec.open(str(location), "rb")
    except (ImportError, ValueError) as error:
        raise UserError(f"{location}: cannot be opened: {error}") from None
    with opened as file:
        yield file


def read_location(location: str | Path, max_bytes: int) -> bytes:
    """All of a small file, at a path or URL. Unfit when it has more than `max_bytes`."""
    if "://" not in str(location):
        return read_small(Path(location).expanduser(), max_bytes, follow=True)
    with open_location(location) as file:
        data = read_up_to(file, max_bytes + 1)
    if len(data) > max_bytes:
        raise Unfit(errno.EFBIG, f"has more than {max_bytes:,} bytes", str(location))
    return data


def beside(beton: str | Path, end: str) -> str:
    """`data/train.beton`, `.manifest.json` -> `data/train.manifest.json`; URLs likewise."""
    return str(beton).removesuffix(BETON) + end


def create(path: Path) -> BinaryIO:
    """A new file of that name; whatever had the name, even a link, is removed first."""
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb")


def rename_durably(temporary: Path, final: Path) -> None:
    """Renames a file that is already fsynced, and makes the rename itself durable."""
    temporary.replace(final)
    fsync_folder(final.parent)


def temporary_beside(path: Path) -> Path:
    """A path in the same folder that only this process uses."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


@contextmanager
def written_atomically(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """The file gets its name when the block ends without an exception. A reader sees the old file or the new one; if
    `durable`, even after a power cut."""
    temporary = temporary_beside(path)
    try:
        with create(temporary) as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if durable:
            rename_durably(temporary, path)
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    write_bytes_atomically(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    with written_atomically(path, durable=durable) as file:
        file.write(data)


def append(path: Path, text: str) -> None:
    """Appends in one call, so that what two processes append does not mix."""
    descriptor = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        data = text.encode("utf-8", errors="backslashreplace")
        while data:
            data = data[os.write(descriptor, data) :]
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Makes a folder inside one that others may write to. Unfit when a link has its name."""
    path.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise Unfit(errno.ELOOP, "is a symbolic link", str(path))


def make_private_folder(path: Path) -> None:
    """A folder that only this user may read and write. UserError if it is another user's, or open to others."""
    path.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise UserError(f"{path}: is a link or a file; choose a folder of your own")
    if status.st_uid != os.geteuid():
        raise UserError(f"{path}: belongs to another user (uid {status.st_uid}); choose a folder of your own")
    if status.st_mode & 0o077:
        raise UserError(f"{path}: is open to other users; close it with `chmod 700 {path}`, or choose another folder")


def require_safe_folder(path: Path) -> None:
    """UserError if another user could replace what is in the folder."""
    status = path.stat()
    others_write = status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
    if status.st_uid not in (os.geteuid(), 0) or others_write:
        whose = f"belongs to another user (uid {status.st_uid})" if not others_write else "may be written to by others"
        raise UserError(f"{path}: {whose}; choose a folder of your own, that no other user may write to")


def remove_folder(path: Path) -> None:
    """Removes a folder with everything in it; if it is a link, only the link."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def fsync_folder(folder: Path) -> None:
    """Makes new and replaced names in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- space on a disk, checked before hours are spent ------------------------------------------------------------------


def free_bytes(folder: Path) -> int:
    """Free bytes of its file system, for this user."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def lacking_bytes(path: Path, total_bytes: int) -> int:
    """The bytes that the file, which may have holes or not exist, still needs to reach that size."""
    allocated = path.stat().st_blocks * 512 if path.exists() else 0
    return total_bytes - allocated


def require_space(path: Path, total_bytes: int) -> None:
    """Fault when the file system of `path` has less free than `path` still lacks of `total_bytes`."""
    lacking = lacking_bytes(path, total_bytes)
    free = free_bytes(path.parent)
    if lacking > free:
        raise Fault(
            f"{path.parent}: has {free / 1e9:,.2f} GB free, {lacking / 1e9:,.2f} GB are needed; make "
            "room there, then run the same command again"
        )


@contextmanager
def cannot_be_written(where: str) -> Iterator[None]:
    """Turns an OSError into a Fault."""
    try:
        yield
    except OSError as error:
        raise Fault(
            f"{where}: cannot be written: {error.strerror or error}; fix that, then run the same command again"
        ) from None
