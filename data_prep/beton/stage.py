"""Copies a beton from shared or object storage to a node's own disk, once, and proves every chunk on the way.

Safe when all processes of a node ask at the same time: one copies, the others wait for it. A copy that was interrupted
goes on: what is there is compared with the manifest, chunk by chunk, and only the rest is fetched.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data_prep.beton.digest import CHUNK_BYTES, chunk_digest, combine
from data_prep.beton.files import publish, write_at
from data_prep.beton.manifest import Manifest, manifest_path, read_manifest, write_manifest
from data_prep.beton.ranges import create_sized
from data_prep.beton.space import require_space
from data_prep.errors import Fault, UserError

POLL_S = 0.2
MAX_ATTEMPTS = 3
"""Readings of one chunk until its digest is right: a network may garble what the storage holds whole."""


def stage(
    source: str | Path,
    folder: Path,
    *,
    wait_limit_s: float = 7200.0,
    on_copied: Callable[[int, int], None] = lambda *_: None,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """The path of a whole local copy of `source`, a path or an fsspec URL (`s3://...`), under `folder`.

    The copy lies in `folder/<digest>/`, with its manifest; when it is there already, that is all that is looked at.
    `on_copied(bytes, in all)` is called by the process that copies, `check` by one that waits; both may raise to stop.
    UserError when the source or
    its manifest is missing; Fault when the source is damaged, the disk is full, or another process has not finished
    the copy in `wait_limit_s`.
    """
    manifest = read_source_manifest(source)
    staged = staged_path(source, manifest, folder)
    place = staged.parent
    if _is_staged(staged, manifest):
        _bring_manifest_up_to_date(staged, manifest)
        return staged
    try:
        place.mkdir(parents=True, exist_ok=True)
        with _locked(place / "lock", wait_limit_s, check):
            if not _is_staged(staged, manifest):
                _copy(str(source), staged, manifest, on_copied)
        _bring_manifest_up_to_date(staged, manifest)
    except FileNotFoundError:
        raise UserError(f"{source}: does not exist, though its manifest does") from None
    except OSError as error:
        raise Fault(f"{error.filename or place}: staging {source} failed: {error.strerror or error}") from None
    return staged


def staged_path(source: str | Path, manifest: Manifest, folder: Path) -> Path:
    """Where `stage` puts the copy, known before it is made and the same on every node."""
    return folder.expanduser().absolute() / manifest.digest.partition(":")[2][:16] / str(source).rpartition("/")[2]


def read_source_manifest(source: str | Path) -> Manifest:
    """The manifest beside `source`, a path or a URL. UserError when it is missing or cannot be read."""
    source = str(source)
    if "://" not in source:
        return read_manifest(Path(source).expanduser())
    name = source.rpartition("/")[2]
    url = source.removesuffix(".beton") + ".manifest.json"
    try:
        with _open(url) as file:
            text = file.read().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{url}: does not exist, so {name} is unfinished or was not made by data-prep") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{url}: cannot be read: {error}") from None
    return Manifest.from_json(text, url)


def _is_staged(staged: Path, manifest: Manifest) -> bool:
    """The manifest is written last, so its presence says that the beton was whole; its size is looked at again."""
    if not manifest_path(staged).exists() or not staged.exists():
        return False
    return read_manifest(staged).digest == manifest.digest and staged.stat().st_size == manifest.beton_bytes


def _bring_manifest_up_to_date(staged: Path, manifest: Manifest) -> None:
    """What a manifest says besides the digest, as the names of the classes, may change while the beton stays."""
    if read_manifest(staged) != manifest:
        write_manifest(staged, manifest)


@contextmanager
def _locked(path: Path, wait_limit_s: float, check: Callable[[], None]) -> Iterator[None]:
    """The lock goes with the process, however that ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
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
    if combine(manifest.chunks).whole != manifest.digest or manifest.chunk_bytes != CHUNK_BYTES:
        raise Fault(f"the manifest of {source} contradicts itself: its digest is not that of its chunks")
    unfinished = staged.with_name(staged.name + ".unfinished")
    require_space(unfinished, manifest.beton_bytes)
    is_new = not unfinished.exists()
    create_sized(unfinished, manifest.beton_bytes)
    descriptor = os.open(unfinished, os.O_RDWR)
    try:
        with _open(source) as file:
            for number, expected in enumerate(manifest.chunks):
                start = number * CHUNK_BYTES
                size = min(CHUNK_BYTES, manifest.beton_bytes - start)
                if is_new or chunk_digest(os.pread(descriptor, size, start)) != expected:
                    write_at(descriptor, _read_chunk(file, source, start, size, expected), start)
                on_copied(start + size, manifest.beton_bytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    publish(unfinished, staged)
    write_manifest(staged, manifest)


def _read_chunk(file: BinaryIO, source: str, start: int, size: int, expected: str) -> bytes:
    for _ in range(MAX_ATTEMPTS):
        file.seek(start)
        data = file.read(size)
        if chunk_digest(data) == expected:
            return data
    raise Fault(
        f"{source}: bytes {start}..{start + size - 1} are not what its manifest says, read {MAX_ATTEMPTS} times; "
        "`data-prep verify` tells which samples are touched"
    )


@contextmanager
def _open(source: str) -> Iterator[BinaryIO]:
    if "://" not in source:
        with Path(source).expanduser().open("rb") as file:
            yield file
        return
    import fsspec

    try:
        opened = fsspec.open(source, "rb")
    except (ImportError, ValueError) as error:
        raise UserError(f"{source}: cannot be opened: {error}") from None
    with opened as file:
        yield file
