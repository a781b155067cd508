"""Copies a beton from shared or object storage to a node's own disk, once, and verifies every chunk on the way.

If all processes of a node call it at the same time, one copies and the rest wait. An interrupted copy is resumed:
existing chunks are compared with the manifest, and only the rest is fetched. A finished copy is trusted, because only
this user can write to its folder.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from data_prep.beton.contents import CONTENTS, read_contents
from data_prep.beton.digest import CHUNK_BYTES, Algorithm, chunk_digest, parse_digest
from data_prep.beton.files import (
    beside,
    make_private_folder,
    open_location,
    open_regular,
    read_location,
    rename_durably,
    require_safe_folder,
    require_space,
    write_at,
    write_bytes_atomically,
)
from data_prep.beton.manifest import Manifest, manifest_path, read_manifest, write_manifest
from data_prep.beton.paths import MAX_FILE_BYTES, PATHS
from data_prep.beton.ranges import create_sized
from data_prep.errors import Fault, UserError

POLL_S = 0.2
MAX_ATTEMPTS = 3
"""Reads of one chunk until its digest is right: a network may damage data that is intact in storage."""


def stage(
    source: str | Path,
    folder: Path,
    *,
    wait_limit_s: float = 7200.0,
    on_copied: Callable[[int, int], None] = lambda *_: None,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """The path of a complete local copy of `source`, a path or an fsspec URL (`s3://...`), under `folder`.

    The copy is in `folder/<digest>/`, with its manifest; if it exists already, the source is not read.
    `on_copied(bytes, in all)` is called by the process that copies, `check` by one that waits; both may raise to stop.
    UserError when the source or its manifest is missing, or the folder is open to other users; Fault when the source is
    damaged, the disk is full, or another process has not finished the copy in `wait_limit_s`.
    """
    manifest = read_manifest(source)
    staged = staged_path(source, manifest, folder)
    place = staged.parent
    try:
        _make_place(place)
        if _is_staged(staged, manifest):
            _bring_manifest_up_to_date(staged, manifest)
            return staged
        with _locked(place / "lock", wait_limit_s, check):
            if not _is_staged(staged, manifest):
                _copy(str(source), staged, manifest, on_copied)
            _bring_manifest_up_to_date(staged, manifest)
    except FileNotFoundError:
        raise UserError(f"{source}: does not exist, though its manifest does") from None
    except OSError as error:
        raise Fault(
            f"{error.filename or place}: staging {source} failed: {error.strerror or error}; choose a folder on this "
            "machine's own disk that you may write to"
        ) from None
    return staged


def staged_path(source: str | Path, manifest: Manifest, folder: Path) -> Path:
    """The path of `stage`'s copy: known before it is made, and the same on every node."""
    return folder.expanduser().absolute() / parse_digest(manifest.digest).short / str(source).rpartition("/")[2]


def _make_place(place: Path) -> None:
    """The folder of one beton, and the one with all of them."""
    folder = place.parent
    if not folder.exists():
        make_private_folder(folder)
    require_safe_folder(folder)
    if place.is_dir() and not place.is_symlink() and place.stat().st_uid == os.geteuid():
        place.chmod(0o700)  # earlier versions left them open
    make_private_folder(place)


def _is_staged(staged: Path, manifest: Manifest) -> bool:
    """Whether a complete copy exists: its manifest was written last. UserError when a file there is not this user's."""
    if not manifest_path(staged).exists() or not staged.exists():
        return False
    for path in (staged, manifest_path(staged)):
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise UserError(f"{path}: is not a file of this user's; remove it, or choose another folder")
    return read_manifest(staged).digest == manifest.digest and staged.stat().st_size == manifest.beton_bytes


def _bring_manifest_up_to_date(staged: Path, manifest: Manifest) -> None:
    """Copies a manifest whose other fields, such as class names, have changed while the beton has not."""
    if read_manifest(staged) != manifest:
        write_manifest(staged, manifest)


@contextmanager
def _locked(path: Path, wait_limit_s: float, check: Callable[[], None]) -> Iterator[None]:
    """Holds the lock; it is released when the process ends, however it ends."""
    descriptor = open_regular(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline_s = time.monotonic() + wait_limit_s
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                check()
                if time.monotonic() > deadline_s:
                    raise Fault(f"{path}: another process has copied for more than {wait_limit_s:.0f} s") from None
                time.sleep(POLL_S)
        yield
    finally:
        os.close(descriptor)


def _copy(source: str, staged: Path, manifest: Manifest, on_copied: Callable[[int, int], None]) -> None:
    unfinished = staged.with_name(staged.name + ".unfinished")
    require_space(unfinished, manifest.beton_bytes)
    is_new = not unfinished.exists()
    create_sized(unfinished, manifest.beton_bytes)
    descriptor, algorithm = open_regular(unfinished, os.O_RDWR), manifest.algorithm
    try:
        with open_location(source) as file:
            for number, expected in enumerate(manifest.chunks):
                start = number * CHUNK_BYTES
                size = min(CHUNK_BYTES, manifest.beton_bytes - start)
                if is_new or chunk_digest(os.pread(descriptor, size, start), algorithm) != expected:
                    write_at(descriptor, _read_chunk(file, source, start, size, expected, algorithm), start)
                on_copied(start + size, manifest.beton_bytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    rename_durably(unfinished, staged)
    contents = read_contents(source, manifest)
    if contents is not None:
        write_bytes_atomically(staged.with_suffix(CONTENTS), contents.tobytes())
    _copy_paths(source, staged, manifest)
    write_manifest(staged, manifest)


def _copy_paths(source: str, staged: Path, manifest: Manifest) -> None:
    """The source paths, if they can be read: no training needs them."""
    if manifest.paths_digest:
        with suppress(OSError):
            write_bytes_atomically(staged.with_suffix(PATHS), read_location(beside(source, PATHS), MAX_FILE_BYTES))


def _read_chunk(file: BinaryIO, source: str, start: int, size: int, expected: str, algorithm: Algorithm) -> bytes:
    for _ in range(MAX_ATTEMPTS):
        file.seek(start)
        data = file.read(size)
        if chunk_digest(data, algorithm) == expected:
            return data
    raise Fault(
        f"{source}: bytes {start}..{start + size - 1} are not what its manifest says, read {MAX_ATTEMPTS} times; "
        "copy it there again, or convert it again"
    )
