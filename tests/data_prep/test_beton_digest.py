"""Digests of chunks are xxhash's own; the file's is made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import xxhash

from data_prep.beton.digest import CHUNK_BYTES, combine, digest_file


@pytest.mark.parametrize("total_bytes", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES + 3])
def test_the_digest_of_a_file_is_that_of_its_chunks_digests(total_bytes: int, tmp_path: Path) -> None:
    data = (b"0123456789abcdefghijklmnopqrstu" * (total_bytes // 31 + 1))[:total_bytes]
    (tmp_path / "file").write_bytes(data)
    digest = digest_file(tmp_path / "file")

    chunks = [xxhash.xxh3_128(data[i : i + CHUNK_BYTES]) for i in range(0, total_bytes, CHUNK_BYTES)]
    assert digest.chunks == tuple(chunk.hexdigest() for chunk in chunks)
    assert digest.whole == "xxh3_128_tree:" + xxhash.xxh3_128_hexdigest(b"".join(c.digest() for c in chunks))
    assert combine(digest.chunks) == digest


def test_chunks_in_another_order_have_another_digest() -> None:
    one, two = (xxhash.xxh3_128_hexdigest(data) for data in (b"one", b"two"))
    assert combine([one, two]).whole != combine([two, one]).whole
