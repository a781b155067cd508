"""Digests that prove a file's content: BLAKE3 of every 8 MiB chunk, and one over these.

A file's digest is `blake3_tree:<hex>`: BLAKE3 of the chunks' digests (32 bytes each), in order. So many workers can
write a file in any order, and nobody has to read it again. BLAKE3, because other bytes with the same digest cannot be
made and it does 6 GB/s a core here (SHA-256 1.8, BLAKE2b 0.9: results/).

Files of earlier versions have xxh3_128 digests, which detect accidents only: other bytes with the same digest can be
made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import blake3
import xxhash

Algorithm = Literal["blake3", "xxh3_128"]
ALGORITHM: Algorithm = "blake3"
"""The algorithm for everything that is written."""
CHUNK_BYTES = 8 << 20
TREE = "_tree"
"""Suffix of the algorithm's name in a digest of the chunks' digests."""

_NEW: dict[Algorithm, Callable[[], Any]] = {"blake3": blake3.blake3, "xxh3_128": xxhash.xxh3_128}
_HEX_DIGITS: dict[Algorithm, int] = {"blake3": 64, "xxh3_128": 32}
_DIGEST = re.compile(rf"({'|'.join(get_args(Algorithm))})({TREE})?:([0-9a-f]+)", re.ASCII)
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Digest:
    """A parsed `<algorithm>:<hex>` or `<algorithm>_tree:<hex>`."""

    algorithm: Algorithm
    is_tree: bool
    hex: str

    @property
    def is_proof(self) -> bool:
        """Whether other bytes with this digest cannot be made."""
        return self.algorithm == "blake3"

    @property
    def short(self) -> str:
        """Long enough to identify the data, in names of folders and identities of runs."""
        return self.hex[:32] if self.is_proof else self.hex[:16]


def parse_digest(text: str) -> Digest:
    """ValueError unless all of `text` is a digest of this project: it may become the name of a folder."""
    match = _DIGEST.fullmatch(text)
    if match is None or len(match[3]) != _HEX_DIGITS[match[1]]:  # type: ignore[index]  # one of them
        raise ValueError(f"{text[:80]!a} is not a digest: expected blake3:, blake3_tree:, ... and hex digits")
    return Digest(match[1], match[2] is not None, match[3])  # type: ignore[arg-type]


def is_hex_digest(text: object, algorithm: Algorithm) -> bool:
    """Whether it is what `chunk_digest` gives."""
    return isinstance(text, str) and re.fullmatch(rf"[0-9a-f]{{{_HEX_DIGITS[algorithm]}}}", text) is not None


@dataclass(frozen=True)
class FileDigest:
    whole: str
    """`blake3_tree:<hex>`."""
    chunks: tuple[str, ...]
    """Hex digests of consecutive chunks of `CHUNK_BYTES`; the last may be shorter."""


def chunk_digest(data: bytes | bytearray | memoryview, algorithm: Algorithm = ALGORITHM) -> str:
    return digest_state(algorithm, data).hexdigest()


def digest_state(algorithm: Algorithm = ALGORITHM, data: bytes | bytearray | memoryview = b"") -> Any:
    """An object with hashlib's `update` and `hexdigest`. It releases the GIL while it works."""
    state = _NEW[algorithm]()
    state.update(data)
    return state


class RunningDigests:
    """The chunk digests of bytes that come in pieces."""

    def __init__(self) -> None:
        self._chunks: list[str] = []
        self._state = digest_state()
        self._missing_bytes = CHUNK_BYTES  # of the current chunk

    def update(self, piece: memoryview) -> None:
        while len(piece):
            here = piece[: self._missing_bytes]
            self._state.update(here)
            self._missing_bytes -= len(here)
            piece = piece[len(here) :]
            if not self._missing_bytes:
                self._next()

    def finish(self) -> tuple[str, ...]:
        if self._missing_bytes < CHUNK_BYTES:
            self._next()
        return tuple(self._chunks)

    def _next(self) -> None:
        self._chunks.append(self._state.hexdigest())
        self._state = digest_state()
        self._missing_bytes = CHUNK_BYTES


def sample_digest(data: bytes | bytearray | memoryview) -> int:
    """xxh3_64 of one image's bytes, to see within a conversion whether a second read gives the same bytes."""
    return xxhash.xxh3_64_intdigest(data)


def combine(chunks: Sequence[str], algorithm: Algorithm = ALGORITHM) -> FileDigest:
    """The digest of a file from those of its chunks, in order."""
    tree = chunk_digest(b"".join(bytes.fromhex(chunk) for chunk in chunks), algorithm)
    return FileDigest(f"{algorithm}{TREE}:{tree}", tuple(chunks))


def digest_file(path: Path, algorithm: Algorithm = ALGORITHM) -> FileDigest:
    """The digest of a file and of its chunks."""
    chunks = []
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            chunks.append(chunk_digest(data, algorithm))
    return combine(chunks, algorithm)


def digest_stream(file: BinaryIO, algorithm: Algorithm) -> str:
    """`algorithm:<hex>` of the rest of a file; BLAKE3's is what `b3sum` prints."""
    state = digest_state(algorithm)
    while block := file.read(_BLOCK_BYTES):
        state.update(block)
    return f"{algorithm}:{state.hexdigest()}"


def digest_bytes(data: bytes | memoryview) -> str:
    """`blake3:<hex>`."""
    return f"{ALGORITHM}:{chunk_digest(data)}"
