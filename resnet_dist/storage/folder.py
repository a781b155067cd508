"""A run in a folder: a local disk, or a file system that all nodes share.

The file system must do four things: rename atomically, create with O_EXCL for exactly one process, keep what was
fsynced (file and folder) through a power cut, and show a file that one node has closed to another that opens it
afterwards. NFS does (version 4, or 3 with `sync` exports on the server).
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.beton.files import create, fsync_folder, make_folder, open_regular, read_small, remove_folder
from resnet_dist.errors import UserError
from resnet_dist.storage.base import MAX_SMALL_BYTES, TEMPORARY, RunStorage


class FolderStorage:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def location(self) -> str:
        return str(self._folder)

    @property
    def folder(self) -> Path:
        return self._folder

    @property
    def sync_every_s(self) -> float:
        return 1.0

    def pull(self, group: str = "") -> None:
        """All machines see the same folder."""
        self._make_storage()
        make_folder(self._folder)

    def _make_storage(self) -> None:
        """A new folder is readable by this user only; to share runs with others, make it beforehand."""
        if not self._folder.parent.exists():
            self._folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)

    def upload(self, path: Path) -> None:
        """The folder is the storage."""

    def create_exclusive(self, path: Path) -> bool:
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:
            return False
        fsync_folder(path.parent)
        return True

    def extended(self, path: Path, num_bytes: int) -> None:
        descriptor = open_regular(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def names(self, group: str = "") -> list[str]:
        folder = self._folder / group
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def commit(self, name: str, write: Callable[[Path], None], last: str) -> None:
        """The folder is filled under a temporary name; `write` syncs its files, the name is given last."""
        final = self._folder / name
        temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}{TEMPORARY}")
        make_folder(final.parent)
        temporary.mkdir()
        try:
            write(temporary)
            remove_folder(final)
            temporary.rename(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_folder(final.parent)

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        yield self._folder / name

    def read(self, name: str) -> bytes | None:
        """Raises Unfit if it is a link, a pipe, or too large to be one of ours."""
        try:
            return read_small(self._folder / name, MAX_SMALL_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def remove(self, name: str) -> None:
        path = self._folder / name
        if path.is_dir() and not path.is_symlink():
            doomed = path if path.name.endswith(TEMPORARY) else path.with_name(f".{path.name}.removed{TEMPORARY}")
            if doomed != path:
                shutil.rmtree(doomed, ignore_errors=True)
                path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def require_writable(self) -> None:
        storage = self._folder.parent
        probe = storage / f".write-test-{uuid.uuid4().hex}"
        try:
            self._make_storage()
            with create(probe) as file:
                file.write(b"resnet-dist")
                os.fsync(file.fileno())
            probe.unlink()
        except OSError as error:
            raise UserError(f"storage {storage} is not writable: {error.strerror}; fix it, or set storage") from None


def as_storage(run: RunStorage | Path) -> RunStorage:
    """`run` itself, or the storage in the folder of that path."""
    return FolderStorage(run) if isinstance(run, Path) else run
