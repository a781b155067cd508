"""Files' ends and their JPEG headers read in C: the same as in Python; unusual files are left out."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import native as native_library
from data_prep.converter import encode as jpeg_headers
from data_prep.errors import Fault
from data_prep.jpeg.header import read_jpeg_header
from data_prep.sources.base import SourceOptions
from data_prep.sources.files import local
from data_prep.sources.files.paths import HEAD_BYTES, NO_FILE, TAIL_BYTES, Ends, ends_of
from data_prep.sources.image_folder import ImageFolder
from data_prep.sources.splits import SplitRequest

needs_c = pytest.mark.skipif(not native_library.is_built(), reason="the C was not built")

SIZES = (
    0,
    1,
    HEAD_BYTES - 1,
    HEAD_BYTES,
    HEAD_BYTES + 1,
    HEAD_BYTES + TAIL_BYTES,
    HEAD_BYTES + TAIL_BYTES + 1,
    300_000,
)


def by_python(ends: Ends) -> list[object]:
    return [read_jpeg_header(*map(bytes, ends.of(number))) for number in range(len(ends))]


@pytest.fixture(scope="module")
def plain(picture, image_file) -> list[bytes]:
    big = picture(120, 200)
    options = [{}, {"progressive": True}, {"subsampling": "4:2:0"}, {"comment": b"\xff\xd9\xff\xda"}, {"quality": 100}]
    return [*(image_file(big, **chosen) for chosen in options), image_file(big.convert("L"))]


@needs_c
def test_headers_of_plain_files_are_read_without_python(plain, ends_in, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = by_python(ends_in(plain))
    monkeypatch.setattr(jpeg_headers, "read_jpeg_header", None)
    assert jpeg_headers.read_jpeg_headers(ends_in(plain)) == expected
    assert None not in expected


@given(st.data())
def test_c_reads_any_bytes_as_python_does(plain, ends_in, data: st.DataObject) -> None:
    whole = bytearray(data.draw(st.sampled_from(plain)))
    headers = min(len(whole), 700)
    for at in data.draw(st.lists(st.integers(0, headers - 1), max_size=4)):
        whole[at] = data.draw(st.sampled_from([0x00, 0xFF, 0xC0, 0xC2, 0xC3, 0xC4, 0xD7, 0xD8, 0xD9, 0xDA, 0xDB, 8, 1]))
    noise = data.draw(st.binary(max_size=6))
    at = data.draw(st.integers(0, headers))
    files = [bytes(whole[:at] + noise + whole[at:]), bytes(whole[: data.draw(st.integers(0, len(whole)))]), noise]
    assert jpeg_headers.read_whole_jpeg_headers(files) == [read_jpeg_header(file) for file in files]
    for max_head_bytes in (HEAD_BYTES, 300, 8 * HEAD_BYTES):
        ends = ends_in(files, max_head_bytes)
        assert jpeg_headers.read_jpeg_headers(ends) == by_python(ends)
        if max_head_bytes >= HEAD_BYTES:
            assert [ends.checked(number) for number in range(3)] == [ends_of(memoryview(file)) for file in files]


@needs_c
def test_python_does_not_search_beyond_the_head(plain, ends_in, monkeypatch: pytest.MonkeyPatch) -> None:
    long = [data[:2] + b"\xff\xfe\x20\x02" + bytes(0x2000) + data[2:] for data in plain]
    monkeypatch.setattr(jpeg_headers, "read_jpeg_header", None)
    assert jpeg_headers.read_jpeg_headers(ends_in(long)) == [None] * len(long)
    assert jpeg_headers.read_jpeg_headers(ends_in(long, 4 * HEAD_BYTES)) == jpeg_headers.read_jpeg_headers(
        ends_in(plain)
    )


@needs_c
def test_c_returns_the_status_that_python_returns(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "plain").write_bytes(b"12345")
    (tmp_path / "old").write_bytes(b"1")
    os.utime(tmp_path / "old", ns=(-5_000_000_000, -5_000_000_001))
    (tmp_path / "older").write_bytes(b"12")
    os.utime(tmp_path / "older", ns=(-2, -2))  # the number by which C says that it does not know
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to("plain")
    (tmp_path / "to-folder").symlink_to("folder")
    (tmp_path / "to-nothing").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    odd = os.fsdecode(b"odd-\xff-\xe2\x98\x83")
    (tmp_path / odd).write_bytes(b"123")
    names = [*sorted(path.name for path in tmp_path.iterdir()), "missing"]
    found = dict(zip(names, local.stat_files(str(tmp_path), names), strict=True))
    assert found == {name: local._status(str(tmp_path), name) for name in names}
    assert found["plain"] == found["link"] == (5, (tmp_path / "plain").stat().st_mtime_ns)
    assert {name for name, status in found.items() if status == (0, NO_FILE)} == {
        *("folder", "missing", "pipe", "to-folder", "to-nothing")
    }
    assert local.stat_files(str(tmp_path), []) == []
    with pytest.raises(OSError, match="File name too long"):
        local.stat_files(str(tmp_path), ["x" * 5000])


def test_without_the_c_python_reads_headers_and_whole_files(
    plain, ends_in, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = jpeg_headers.read_jpeg_headers(ends_in(plain))
    monkeypatch.setattr(jpeg_headers, "native_library", lambda: None)
    monkeypatch.setattr(local, "native_library", lambda: None)
    assert jpeg_headers.read_jpeg_headers(ends_in(plain)) == expected
    source = tree_of(tmp_path, {"a.jpg": b"abc"})
    assert source.ends([0]).num_bytes.tolist() == [-1]
    into = memoryview(bytearray(3))
    source.read_into([0], into)
    assert into == b"abc"


def tree_of(root: Path, files: dict[str, bytes]) -> ImageFolder:
    for name, data in files.items():
        path = root / "class" / os.fsdecode(os.fsencode(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    opened = ImageFolder.open(str(root), SplitRequest(None, explicit=False), SourceOptions(folders_are="classes"))
    return pickle.loads(pickle.dumps(opened))


@needs_c
def test_ends_and_wholes_of_files_of_every_size(tmp_path: Path) -> None:
    files = {f"{n}-\N{SNOWMAN}-\udcff.jpg": np.random.default_rng(n).bytes(n) for n in SIZES}
    source = tree_of(tmp_path, files)
    order = [3, 0, 7, 1, 2, 6, 5, 4]
    ends = source.ends(order)
    for number, index in enumerate(order):
        data = files[source.key(index).partition("/")[2]]
        assert ends.num_bytes[number] == len(data)
        assert b"".join(ends.of(number)) == ends_of(memoryview(data))
        assert ends.checked(number) == ends_of(memoryview(data))
        into = memoryview(bytearray(len(data)))
        source.read_into([index], into)
        assert into == data
    together = memoryview(bytearray(sum(SIZES)))
    assert source._local is not None
    assert source._local.read_into(order, together)  # by C alone
    assert together == b"".join(files[source.key(index).partition("/")[2]] for index in order)
    assert not source._local.read_into(order, together[1:])
    assert not source._local.read_into(order[1:], together)


@needs_c
def test_changed_files_are_left_out_and_reported_when_read(tmp_path: Path) -> None:
    source = tree_of(tmp_path, {f"{name}.jpg": b"x" * 99 for name in ("changed", "gone", "longer", "same", "z-pipe")})
    paths = {path.name: path for path in (tmp_path / "class").iterdir()}
    os.utime(paths["changed.jpg"], ns=(1, 1))
    paths["gone.jpg"].unlink()
    paths["longer.jpg"].write_bytes(b"x" * 100)
    paths["z-pipe.jpg"].unlink()
    os.mkfifo(paths["z-pipe.jpg"])
    ends = source.ends(range(5))
    assert ends.num_bytes.tolist() == [-1, -1, -1, 99, -1]
    assert (len(ends.of(0)[0]), len(ends.of(0)[1]), len(ends.checked(0))) == (0, 0, 0)
    into = memoryview(bytearray(99))
    source.read_into([3], into)
    assert into == b"x" * 99
    for index in (0, 1, 2, 4):
        with pytest.raises(Fault, match="changed while it was being read"):
            source.read_into([index], into)


@needs_c
def test_a_file_larger_than_a_sample_may_be_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tree_of(tmp_path, {"a.jpg": b"abc", "b.jpg": b"abcd"})
    monkeypatch.setattr(local, "MAX_SAMPLE_BYTES", 3)
    assert source.ends(range(2)).num_bytes.tolist() == [3, -1]
