"""Digests of chunks are BLAKE3; the file's digest is made from them; invalid digests are refused."""

from __future__ import annotations

from pathlib import Path

import blake3
import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep.beton.digest import CHUNK_BYTES, Digest, combine, digest_file, parse_digest


@pytest.mark.parametrize("total_bytes", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES + 3])
def test_the_digest_of_a_file_is_that_of_its_chunks_digests(total_bytes: int, tmp_path: Path) -> None:
    data = (b"0123456789abcdefghijklmnopqrstu" * (total_bytes // 31 + 1))[:total_bytes]
    (tmp_path / "file").write_bytes(data)
    pieces = [data[i : i + CHUNK_BYTES] for i in range(0, total_bytes, CHUNK_BYTES)]

    digest = digest_file(tmp_path / "file")
    chunks = [blake3.blake3(piece) for piece in pieces]
    assert digest.chunks == tuple(chunk.hexdigest() for chunk in chunks)
    assert digest.whole == "blake3_tree:" + blake3.blake3(b"".join(c.digest() for c in chunks)).hexdigest()
    assert combine(digest.chunks) == digest

    earlier = digest_file(tmp_path / "file", "xxh3_128")
    chunks = [xxhash.xxh3_128(piece) for piece in pieces]
    assert earlier.chunks == tuple(chunk.hexdigest() for chunk in chunks)
    assert earlier.whole == "xxh3_128_tree:" + xxhash.xxh3_128_hexdigest(b"".join(c.digest() for c in chunks))


def test_a_digest_is_read() -> None:
    assert parse_digest("blake3_tree:" + "0a" * 32) == Digest("blake3", True, "0a" * 32)
    assert parse_digest("blake3:" + "0a" * 32) == Digest("blake3", False, "0a" * 32)
    assert parse_digest("xxh3_128_tree:" + "0a" * 16) == Digest("xxh3_128", True, "0a" * 16)
    assert [parse_digest(d).is_proof for d in ("blake3:" + "0" * 64, "xxh3_128:" + "0" * 32)] == [True, False]
    assert [parse_digest(d).short for d in ("blake3:" + "0" * 64, "xxh3_128:" + "0" * 32)] == ["0" * 32, "0" * 16]


HEX = "0" * 64


@pytest.mark.parametrize(
    "text",
    [
        "",
        HEX,
        "x:/tmp/y",
        "blake3_tree:/tmp/y",
        "blake3_tree:../../" + HEX,
        f"blake3_tree:{HEX}\n",
        f"blake3_tree:{HEX[:-1]}\0",
        f"blake3_tree:{HEX[:-1]}",
        f"blake3_tree:{HEX}0",
        f"blake3_tree:{HEX[:-1]}F",
        f"blake3_tree:{HEX[:-1]}٣",
        f"xxh3_128_tree:{HEX}",
        f"BLAKE3_tree:{HEX}",
        f" blake3_tree:{HEX}",
        f"blake3_tree_tree:{HEX}",
        f"md5:{HEX[:32]}",
    ],
)
def test_an_invalid_digest_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a digest"):
        parse_digest(text)


@given(st.text(max_size=90))
@example("xxh3_128:" + "0" * 32)
@settings(max_examples=60)
def test_every_digest_that_is_read_is_a_plain_name(text: str) -> None:
    try:
        digest = parse_digest(text)
    except ValueError:
        return
    assert set(digest.short) <= set("0123456789abcdef")
