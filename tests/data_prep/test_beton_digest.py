"""Digests do not depend on how the bytes arrive, and are those that xxhash itself gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import xxhash

from data_prep.beton.digest import CHUNK_BYTES, Digester, digest_file


@pytest.mark.parametrize("total_bytes", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES + 3])
@pytest.mark.parametrize("piece_bytes", [CHUNK_BYTES // 3 + 1, CHUNK_BYTES, 5 * CHUNK_BYTES])
def test_digests_of_pieces_are_those_of_the_whole(total_bytes: int, piece_bytes: int, tmp_path: Path) -> None:
    data = (b"0123456789abcdefghijklmnopqrstu" * (total_bytes // 31 + 1))[:total_bytes]
    digester = Digester()
    for start in range(0, total_bytes, piece_bytes):
        digester.update(data[start : start + piece_bytes])
    digest = digester.finish()

    chunks = [data[i : i + CHUNK_BYTES] for i in range(0, total_bytes, CHUNK_BYTES)]
    assert digest.whole == "xxh3_128:" + xxhash.xxh3_128_hexdigest(data)
    assert digest.chunks == tuple(xxhash.xxh3_128_hexdigest(chunk) for chunk in chunks)
    (tmp_path / "file").write_bytes(data)
    assert digest_file(tmp_path / "file") == digest
