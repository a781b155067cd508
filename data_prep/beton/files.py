"""Durable files: nothing appears under its final name before its bytes are on the disk."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def write_at(descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Writes all of `data` at `offset`: one `pwrite` may write less than it was given."""
    view = memoryview(data)
    while len(view):
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def publish(temporary: Path, final: Path) -> None:
    """Renames a file that is already fsynced, and makes the rename itself durable."""
    temporary.replace(final)
    fsync_folder(final.parent)


def temporary_beside(path: Path) -> Path:
    """A name of this process's own, in the folder of `path`."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def write_text_atomically(path: Path, text: str, *, durable: bool = True) -> None:
    """A reader sees the old file or the new one; if `durable`, even after a power cut."""
    temporary = temporary_beside(path)
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if durable:
            publish(temporary, path)
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Makes names that were just created or replaced in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
