"""The storage that a beton is made on: its unfinished work and the final files. `FileOutput` is a file system.

`object_output.py` is an object store. Both are pickled to workers.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

from data_prep.beton import ranges
from data_prep.beton.files import (
    BETON,
    create,
    free_bytes,
    lacking_bytes,
    make_folder,
    open_regular,
    read_small,
    remove_folder,
    rename_durably,
    require_space,
    write_at,
    write_bytes_atomically,
    write_text_atomically,
)
from data_prep.beton.manifest import MAX_MANIFEST_BYTES
from data_prep.beton.ranges import FileRange, Payload, Written, read_digests
from data_prep.errors import UserError
from data_prep.sources.files.paths import IS_URL

BAD_SAMPLES, QUARANTINE, SALVAGED = ".bad-samples.tsv", ".quarantine.tsv", ".salvaged.tsv"
"""Suffixes beside BETON and MANIFEST. The tables list the samples that prevented the beton, that are not in it, or of
which it has what could be decoded."""


class WorkReader(Protocol):
    def read_at(self, start: int, num_bytes: int) -> bytes: ...

    def close(self) -> None: ...


class Output(Protocol):
    """All methods raise OSError, with a reason in its `strerror`, unless stated otherwise."""

    @property
    def shown(self) -> str:
        """The beton's path or URL, for messages."""
        ...

    @property
    def work_shown(self) -> str: ...

    # --- final names, all beside the beton

    def name_of(self, end: str) -> str:
        """`BAD_SAMPLES` -> `/data/train.bad-samples.tsv`, for messages."""
        ...

    def num_bytes(self) -> int | None:
        """The beton's size; None if it does not exist."""
        ...

    def read_text(self, end: str) -> str | None: ...

    def write_text(self, end: str, text: str | None) -> None:
        """Replaces the file atomically; None removes it."""
        ...

    def write_bytes(self, end: str, data: bytes) -> None:
        """Replaces the file atomically."""
        ...

    # --- the work: small files and parts, each under its own name

    def owned(self) -> AbstractContextManager[None]:
        """Within the block the work belongs to this process. UserError when another one has it, or it cannot be
        written."""
        ...

    def require_owned(self) -> None:
        """UserError when another process has taken over the work since."""
        ...

    def names(self) -> set[str]:
        """Empty if there is no work."""
        ...

    def reader(self, name: str) -> WorkReader:
        """FileNotFoundError."""
        ...

    def size_of(self, name: str) -> int:
        """FileNotFoundError."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Appears complete under its name, or not at all."""
        ...

    def writing(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A large file, which gets its name when the block ends without an error."""
        ...

    def remove(self, name: str) -> None:
        """Does nothing if it does not exist."""
        ...

    def remove_work(self) -> None: ...

    # --- the beton, in ranges

    def range_bytes(self, total_bytes: int | None) -> int | None:
        """Length of the ranges that a beton is written in. None: it depends on `total_bytes`, which is not known."""
        ...

    def begin(self, plan_digest: str, *, is_new: bool = False) -> str:
        """Returns the target of the ranges: the unfinished beton of that plan, if there is one.

        With `is_new` that one is deleted, so that no orphaned worker of an earlier run writes to the new one. Those of
        other plans are always deleted."""
        ...

    def has_space(self, target: str, num_bytes: int) -> bool:
        """Whether the unfinished beton may grow to so many bytes, as far as the storage knows."""
        ...

    def reserve(self, target: str, total_bytes: int) -> None:
        """Called with the beton's size before the last ranges are written. Fault when there is too little space."""
        ...

    def write_range(self, target: str, file_range: FileRange, payload: Payload) -> Written: ...

    def holds(self, target: str, file_range: FileRange, written: Written) -> bool:
        """Whether a range that was written before is still there."""
        ...

    def complete(self, target: str, receipts: Sequence[str]) -> None:
        """Gives the beton its final name, durably. `receipts`: those of all ranges, in order."""
        ...


def read_work_file(output: Output, name: str) -> bytes | None:
    """A small file of the work; None if there is none."""
    try:
        reader = output.reader(name)
        try:
            return reader.read_at(0, output.size_of(name))
        finally:
            reader.close()
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class FileOutput:
    """On a file system that all workers see. The unfinished work is in `<output>.work/`, owned by one driver."""

    path: Path
    driver_machine: str
    """`machine()` of the driver, whose fsync at the end covers what was written on that machine."""

    @property
    def shown(self) -> str:
        return str(self.path)

    @property
    def work_shown(self) -> str:
        return str(self._work)

    @property
    def _work(self) -> Path:
        return work_path(self.path)

    def name_of(self, end: str) -> str:
        return str(self.path.with_suffix(end))

    def num_bytes(self) -> int | None:
        return self.path.stat().st_size if self.path.exists() else None

    def read_text(self, end: str) -> str | None:
        path = self.path.with_suffix(end)
        return read_small(path, MAX_MANIFEST_BYTES, follow=True).decode("utf-8", "replace") if path.exists() else None

    def write_text(self, end: str, text: str | None) -> None:
        path = self.path.with_suffix(end)
        if text is None:
            path.unlink(missing_ok=True)
        else:
            write_text_atomically(path, text)

    def write_bytes(self, end: str, data: bytes) -> None:
        write_bytes_atomically(self.path.with_suffix(end), data)

    @contextmanager
    def owned(self) -> Iterator[None]:
        """The lock is released when the process ends, however it ends."""
        try:
            make_folder(self._work)
            descriptor = open_regular(self._work / "lock", os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise UserError(f"{self._work}: cannot be written: {error.strerror}; choose another --output") from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise UserError(
                        f"{self.path}: another data-prep is writing it; wait for that one or stop it"
                    ) from None
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # a file system without locks
                    raise
            # Temporary files of a killed run: in the work, and beside the final names.
            beside = self.path.parent.glob(f".{glob.escape(self.path.stem)}.*.tmp")
            for temporary in (*self._work.glob("*.tmp"), *beside):
                temporary.unlink(missing_ok=True)
            yield
        finally:
            os.close(descriptor)

    def require_owned(self) -> None:
        pass  # nobody can take over while the lock is held

    def names(self) -> set[str]:
        return {entry.name for entry in self._work.iterdir()} if self._work.exists() else set()

    def reader(self, name: str) -> _FileReader:
        return _FileReader(open_regular(self._work / name, os.O_RDONLY))

    def size_of(self, name: str) -> int:
        return (self._work / name).stat().st_size

    def write(self, name: str, data: bytes) -> None:
        with self.writing(name) as file:
            file.write(data)

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """Not fsynced: after a power cut, digests show what is damaged."""
        # The name is unique: an orphan of a killed run may still be writing the same.
        temporary = self._work / f"{name}.{socket.gethostname()}-{os.getpid()}.tmp"
        try:
            with create(temporary) as file:
                yield file
            temporary.replace(self._work / name)
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        (self._work / name).unlink(missing_ok=True)

    def remove_work(self) -> None:
        remove_folder(self._work)

    def range_bytes(self, total_bytes: int | None) -> int:
        return ranges.RANGE_BYTES

    def begin(self, plan_digest: str, *, is_new: bool = False) -> str:
        target = self._work / f"beton-{plan_digest[:16]}.unfinished"
        for stale in self._work.glob("*.unfinished"):
            if stale != target or is_new:
                stale.unlink(missing_ok=True)
        os.close(open_regular(target, os.O_RDWR | os.O_CREAT))
        return str(target)

    def has_space(self, target: str, num_bytes: int) -> bool:
        return lacking_bytes(Path(target), num_bytes) <= free_bytes(self._work)

    def reserve(self, target: str, total_bytes: int) -> None:
        require_space(Path(target), total_bytes)
        os.truncate(target, total_bytes)  # it must exist: ranges may have been written to it

    def write_range(self, target: str, file_range: FileRange, payload: Payload) -> Written:
        descriptor = open_regular(Path(target), os.O_RDWR)
        try:
            written = Written(ranges.write_range(partial(write_at, descriptor), file_range, payload))
            if machine() != self.driver_machine:  # the driver's final fsync does not cover this machine's page cache
                os.fsync(descriptor)
            with suppress(OSError):  # a hint: the disk starts writing now, not at the final fsync
                length = file_range.stop - file_range.start
                os.posix_fadvise(descriptor, file_range.start, length, os.POSIX_FADV_DONTNEED)
            return written
        finally:
            os.close(descriptor)

    def holds(self, target: str, file_range: FileRange, written: Written) -> bool:
        descriptor = open_regular(Path(target), os.O_RDWR)
        try:
            if read_digests(descriptor, file_range) != written.chunks:
                return False
            if machine() != self.driver_machine:
                os.fsync(descriptor)
            return True
        finally:
            os.close(descriptor)

    def complete(self, target: str, receipts: Sequence[str]) -> None:
        descriptor = open_regular(Path(target), os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        rename_durably(Path(target), self.path)


class _FileReader:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read_at(self, start: int, num_bytes: int) -> bytes:
        return os.pread(self._descriptor, num_bytes, start)

    def close(self) -> None:
        os.close(self._descriptor)


def work_path(output: Path) -> Path:
    return output.with_name(output.name + ".work")


def machine() -> str:
    """Identifies the running kernel: an fsync writes out its page cache only."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return socket.gethostname()


def open_output(location: Path | str) -> Output:
    """UserError when the name does not end in .beton, or it is a URL of a store that cannot be written to."""
    if not str(location).endswith(BETON):
        raise UserError(f"--output {location}: expected a name that ends in {BETON}")
    if IS_URL.match(str(location)):
        from data_prep.converter.object_output import ObjectOutput  # brings fsspec

        return ObjectOutput(str(location))
    return FileOutput(Path(location).expanduser().absolute(), machine())
