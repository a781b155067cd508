"""One encoded work unit on disk: images' bytes | one `STORED_ROW` per sample | trailer with the digest of both.

A part appears under its final name only when it is whole. It is not fsynced: after a power cut its digest tells.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.beton.pages import STORED_ROW
from data_prep.convert.plan import WorkUnit
from data_prep.errors import Fault

TRAILER = np.dtype(
    [
        ("magic", "S8"),
        ("plan", "S32"),
        ("unit", "<u8"),
        ("num_rows", "<u8"),
        ("payload_bytes", "<u8"),
        ("digest", "S32"),
    ]
)
MAGIC = b"dp-part1"
READ_BYTES = 4 << 20


def part_path(folder: Path, unit: WorkUnit) -> Path:
    return folder / f"unit-{unit.number:06d}.part"


class PartWriter:
    """Appends encoded samples; `finish` writes rows and trailer and renames. Holds one sample in memory."""

    def __init__(self, path: Path, plan_digest: str, unit: WorkUnit) -> None:
        self._path = path
        # The name is unique: an orphan of a killed run may still be writing the same unit.
        self._temporary = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
        self._plan_digest = plan_digest
        self._unit = unit
        self._rows = np.zeros(len(unit), dtype=STORED_ROW)
        self._count = 0
        self._digest = xxhash.xxh3_128()
        self._file = self._temporary.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def append(self, data: bytes, *, mode: int, untouched: bool, height: int, width: int, label: int) -> None:
        self._rows[self._count] = (mode, untouched, width, height, label, len(data))
        self._count += 1
        self._digest.update(data)
        self._file.write(data)

    def finish(self) -> None:
        payload_bytes = self._file.tell()
        rows = self._rows[: self._count].tobytes()
        self._digest.update(rows)
        trailer = np.zeros(1, dtype=TRAILER)
        trailer[0] = (
            MAGIC,
            self._plan_digest.encode(),
            self._unit.number,
            self._count,
            payload_bytes,
            self._digest.hexdigest().encode(),
        )
        self._file.write(rows)
        self._file.write(trailer.tobytes())
        self._file.close()
        self._temporary.replace(self._path)


class PartReader:
    """Rows at once, images' bytes as a stream; Fault when a part is not what its trailer says."""

    def __init__(self, path: Path, plan_digest: str, unit: WorkUnit) -> None:
        self._path = path
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise Fault(f"{path}: cannot be read: {error.strerror}") from None
        try:
            self.payload_bytes, self._digest = self._read_trailer(plan_digest, unit)
            self._file.seek(self.payload_bytes)
            self.rows: NDArray[np.void] = np.frombuffer(
                self._file.read(len(unit) * STORED_ROW.itemsize), dtype=STORED_ROW
            )
            self._file.seek(0)
        except BaseException:
            self._file.close()
            raise

    def _read_trailer(self, plan_digest: str, unit: WorkUnit) -> tuple[int, str]:
        size = self._path.stat().st_size
        self._file.seek(max(0, size - TRAILER.itemsize))
        data = self._file.read(TRAILER.itemsize)
        trailer = np.frombuffer(data.ljust(TRAILER.itemsize, b"\0"), dtype=TRAILER)[0]
        expected = (MAGIC, plan_digest.encode(), unit.number, len(unit))
        payload_bytes = size - TRAILER.itemsize - len(unit) * STORED_ROW.itemsize
        found = (trailer["magic"], trailer["plan"], trailer["unit"], trailer["num_rows"])
        if found != expected or trailer["payload_bytes"] != payload_bytes:
            raise Fault(f"{self._path}: is damaged or of another conversion")
        return payload_bytes, trailer["digest"].decode()

    def close(self) -> None:
        self._file.close()

    def payload(self) -> Iterator[bytes]:
        """The images' bytes in pieces. Fault at the end, and the part is removed, when the digest does not match."""
        digest = xxhash.xxh3_128()
        left = self.payload_bytes
        self._file.seek(0)
        while left:
            piece = self._file.read(min(READ_BYTES, left))
            if not piece:
                break
            left -= len(piece)
            digest.update(piece)
            yield piece
        digest.update(self.rows.tobytes())
        if digest.hexdigest() != self._digest:
            self._path.unlink(missing_ok=True)
            raise Fault(
                f"{self._path}: its bytes changed after they were written; run the same command again to redo it"
            )


@contextmanager
def open_part(path: Path, plan_digest: str, unit: WorkUnit) -> Iterator[PartReader]:
    reader = PartReader(path, plan_digest, unit)
    try:
        yield reader
    finally:
        reader.close()


def is_finished(path: Path, plan_digest: str, unit: WorkUnit) -> bool:
    """Whether an earlier run finished this unit, by size and trailer; its bytes are checked when they are used."""
    if not path.exists():
        return False
    try:
        with open_part(path, plan_digest, unit):
            return True
    except Fault:
        return False
