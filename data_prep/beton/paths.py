"""`<name>.paths.txt.gz`, beside a beton: the file of the source that each sample was.

A line per sample, in order: `zgrep -n n01440764_10026 train.paths.txt.gz` finds one (line 1 is sample 0). A path is
relative to the location in the manifest's `source`, and empty where it is not known. The manifest has the digest of the
text, not of the compressed bytes, which depend on the version of zlib. Only people need the file: training does not
read it, and the beton's own digest does not depend on it.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from data_prep.beton.digest import ALGORITHM, digest_bytes, digest_state
from data_prep.beton.files import beside, read_location
from data_prep.beton.manifest import ADOPTED, Manifest
from data_prep.errors import UserError

PATHS = ".paths.txt.gz"
"""Replaces `.beton` in the name."""
MAX_PATH_BYTES = 4096
"""A longer path is cut in the middle."""
MAX_FILE_BYTES = 256 << 20
"""ImageNet's has 5 MB."""
MAX_TEXT_BYTES = 2 << 30
_GZIP = zlib.MAX_WBITS + 16
_PIECE_LINES = 1 << 14


class Paths(Sequence[str]):
    """Paths by sample. Not a list: a million strings would take 100 MB.

    ValueError if the text does not end with a line break.
    """

    def __init__(self, text: bytes) -> None:
        if text and not text.endswith(b"\n"):
            raise ValueError("ends within a line")
        self._text = text
        self._ends = np.flatnonzero(np.frombuffer(text, dtype=np.uint8) == ord("\n"))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        if not 0 <= index < len(self):
            raise IndexError(f"{index} of {len(self)}")
        start = int(self._ends[index - 1]) + 1 if index else 0
        line = self._text[start : int(self._ends[index])].decode("utf-8", errors="surrogateescape")
        return re.sub(r"\\(.)", lambda escaped: "\n" if escaped[1] == "n" else escaped[1], line)


def pack_paths(paths: Iterable[str]) -> tuple[bytes, str]:
    """The file of these paths, and the digest for `Manifest.paths_digest`."""
    compressor, digest, packed = zlib.compressobj(wbits=_GZIP), digest_state(), bytearray()
    for piece in _pieces(paths):
        digest.update(piece)
        packed += compressor.compress(piece)
    return bytes(packed + compressor.flush()), f"{ALGORITHM}:{digest.hexdigest()}"


def _pieces(paths: Iterable[str]) -> Iterator[bytes]:
    lines: list[bytes] = []
    for path in paths:
        lines.append(_line(path))
        if len(lines) == _PIECE_LINES:
            yield b"".join(lines)
            lines.clear()
    yield b"".join(lines)


def _line(path: str) -> bytes:
    line = path.encode("utf-8", errors="surrogateescape")
    if len(line) > MAX_PATH_BYTES:
        half = MAX_PATH_BYTES // 2 - 2
        line = line[:half] + b"..." + line[-half:]
    return line.replace(b"\\", b"\\\\").replace(b"\n", b"\\n") + b"\n"


def read_paths(beton: str, manifest: Manifest) -> Paths | None:
    """The paths of `beton`, a path or a URL; None if there are none, or not beside it (`why_no_paths`).

    UserError when the file does not match the manifest.
    """
    if not manifest.paths_digest:
        return None
    where = beside(beton, PATHS)
    try:
        unpack = zlib.decompressobj(_GZIP)
        text = unpack.decompress(read_location(where, MAX_FILE_BYTES), MAX_TEXT_BYTES)
        if not unpack.eof or digest_bytes(text) != manifest.paths_digest:
            raise ValueError("does not have the digest in the manifest")
        paths = Paths(text)
        if len(paths) != manifest.num_samples:
            raise ValueError(f"has {len(paths):,} lines for {manifest.num_samples:,} samples")
        return paths
    except FileNotFoundError:
        return None
    except (OSError, ValueError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{where}: {reason}; copy it again, or remove it: then source paths are not shown") from None


def why_no_paths(beton: str, manifest: Manifest) -> str:
    """What to do where `read_paths` is None."""
    where = beside(beton, PATHS)
    if manifest.paths_digest:
        return f"source paths are not known: {where} is missing; copy it from where the beton came from"
    if manifest.source.get("name") == ADOPTED:
        return "source paths are not known: ffcv's own writer, whose beton was adopted, keeps none"
    return (
        "source paths are not known: the beton was made by an earlier version; the command that converted it, run "
        f"again, writes {where} and nothing else"
    )
