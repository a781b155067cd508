"""Digests of a file: xxh3_128 of the whole (what `xxhsum -H2` prints) and of every 8 MiB chunk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import xxhash

ALGORITHM = "xxh3_128"
CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class FileDigest:
    whole: str
    """`xxh3_128:<hex>`."""
    chunks: tuple[str, ...]
    """Hex digests of consecutive chunks of `CHUNK_BYTES`; the last may be shorter."""


class Digester:
    """Digests of bytes that arrive in order, in pieces of any size."""

    def __init__(self) -> None:
        self._whole = xxhash.xxh3_128()
        self._chunk = xxhash.xxh3_128()
        self._chunk_filled = 0
        self._chunks: list[str] = []

    def update(self, data: bytes | bytearray | memoryview) -> None:
        self._whole.update(data)
        view = memoryview(data)
        while len(view):
            piece = view[: CHUNK_BYTES - self._chunk_filled]
            self._chunk.update(piece)
            self._chunk_filled += len(piece)
            view = view[len(piece) :]
            if self._chunk_filled == CHUNK_BYTES:
                self._end_chunk()

    def finish(self) -> FileDigest:
        if self._chunk_filled:
            self._end_chunk()
        return FileDigest(f"{ALGORITHM}:{self._whole.hexdigest()}", tuple(self._chunks))

    def _end_chunk(self) -> None:
        self._chunks.append(self._chunk.hexdigest())
        self._chunk.reset()
        self._chunk_filled = 0


def digest_file(path: Path) -> FileDigest:
    digester = Digester()
    with path.open("rb", buffering=0) as file:
        while data := file.read(CHUNK_BYTES):
            digester.update(data)
    return digester.finish()
