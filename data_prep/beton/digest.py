"""Digests of a file: xxh3_128 of every 8 MiB chunk, and one digest over these, so that many can work on one file.

The digest of the whole is `xxh3_128_tree:<hex>`: xxh3_128 of the chunks' digests (16 bytes each, as printed), one
after another. It needs no pass over the file once its chunks are known, in whatever order they were written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

ALGORITHM = "xxh3_128_tree"
CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class FileDigest:
    whole: str
    """`xxh3_128_tree:<hex>`."""
    chunks: tuple[str, ...]
    """Hex xxh3_128 of consecutive chunks of `CHUNK_BYTES`; the last may be shorter."""


def chunk_digest(data: bytes | bytearray | memoryview) -> str:
    return xxhash.xxh3_128_hexdigest(data)


class RunningDigests:
    """Of the chunks of bytes that come in pieces."""

    def __init__(self) -> None:
        self._chunks: list[str] = []
        self._state = xxhash.xxh3_128()
        self._room = CHUNK_BYTES

    def update(self, piece: memoryview) -> None:
        while len(piece):
            here = piece[: self._room]
            self._state.update(here)
            self._room -= len(here)
            piece = piece[len(here) :]
            if not self._room:
                self._next()

    def finish(self) -> tuple[str, ...]:
        if self._room < CHUNK_BYTES:
            self._next()
        return tuple(self._chunks)

    def _next(self) -> None:
        self._chunks.append(self._state.hexdigest())
        self._state.reset()
        self._room = CHUNK_BYTES


def sample_digest(data: bytes | bytearray | memoryview) -> int:
    """xxh3_64 of one image's bytes: whether they are the same when they are read a second time."""
    return xxhash.xxh3_64_intdigest(data)


def combine(chunks: Sequence[str]) -> FileDigest:
    """The digest of a file from those of its chunks, in order."""
    tree = xxhash.xxh3_128(b"".join(bytes.fromhex(chunk) for chunk in chunks))
    return FileDigest(f"{ALGORITHM}:{tree.hexdigest()}", tuple(chunks))


def digest_file(path: Path) -> FileDigest:
    chunks = []
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            chunks.append(chunk_digest(data))
    return combine(chunks)
