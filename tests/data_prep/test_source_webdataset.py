"""WebDataset shards: samples are put together by name, shards found by folder, glob and braces."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.sources import SourceOptions, open_source
from data_prep.sources.base import SourceWithEnds
from data_prep.sources.ends import HEAD_BYTES, TAIL_BYTES
from data_prep.sources.find_places import expand_braces
from data_prep.sources.local_place import LocalPlace
from data_prep.sources.places import FileStatus
from data_prep.sources.splits import SplitRequest
from data_prep.sources.webdataset import split_of_shard

TarOf = Callable[[dict[str, bytes]], bytes]
ANY = SplitRequest(None, explicit=False)


def sample(number: int) -> dict[str, bytes]:
    stem = f"s/{number:04d}"
    return {f"{stem}.cls": b"%d" % (number % 3), f"{stem}.jpg": b"jpg %d" % number, f"{stem}.json": b'{"label": 9}'}


@pytest.fixture
def shards(tmp_path: Path, tar_of: TarOf) -> Path:
    """Three train shards of two samples, one validation shard of one."""
    root = tmp_path / "wds"
    root.mkdir()
    for shard in range(3):
        data = tar_of(sample(2 * shard) | sample(2 * shard + 1))
        (root / f"in1k-train-{shard:02d}.tar").write_bytes(data)
    (root / "in1k-validation-00.tar").write_bytes(tar_of(sample(77)))
    (root / "_info.json").write_text("{}")
    return root


def test_webdataset_reads_shards_in_order(shards: Path) -> None:
    source = pickle.loads(pickle.dumps(open_source("webdataset", str(shards), SplitRequest("train", explicit=False))))
    assert [source[i].data for i in (*range(6), 0)] == [b"jpg %d" % i for i in (*range(6), 0)]
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert source.class_names == ("0", "1", "2")
    assert source.key(3) == "in1k-train-01.tar/s/0003"
    val = open_source("webdataset", str(shards), SplitRequest("val", explicit=True))
    assert (val.describe().split, len(val), val[0].data, val[0].label) == ("validation", 1, b"jpg 77", 2)
    with pytest.raises(UserError, match="holds the splits train, validation; say which"):
        open_source("webdataset", str(shards), ANY)


def test_the_ends_of_an_image_are_read_from_the_shard(tmp_path: Path, tar_of: TarOf) -> None:
    images = [bytes(size) + b"end" for size in (0, HEAD_BYTES - 3, HEAD_BYTES, HEAD_BYTES + TAIL_BYTES)]
    members = {f"{n}.{end}": data for n, image in enumerate(images) for end, data in (("jpg", image), ("cls", b"0"))}
    (tmp_path / "train-0.tar").write_bytes(tar_of(members))
    source = open_source("webdataset", str(tmp_path), ANY)
    assert isinstance(source, SourceWithEnds)
    ends = source.ends(range(len(images)))
    assert ends.num_bytes.tolist() == list(map(len, images))
    for index, image in enumerate(images):
        assert ends.of(index) == (image[:HEAD_BYTES], image[max(HEAD_BYTES, len(image) - TAIL_BYTES) :])
        into = memoryview(bytearray(len(image)))
        source.read_into([index], into)
        assert into == image
    together = memoryview(bytearray(sum(map(len, images))))
    source.read_into([3, 0, 2, 1], together)
    assert together == b"".join(images[index] for index in (3, 0, 2, 1))
    long = source.ends(range(len(images)), 2 * HEAD_BYTES)
    assert [long.of(index) for index in range(len(images))] == [(image, b"") for image in images]


def test_a_shard_that_cannot_be_read_is_told_when_its_images_are(
    tmp_path: Path, tar_of: TarOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train-0.tar").write_bytes(tar_of({"0.jpg": b"image", "0.cls": b"0"}))
    source = open_source("webdataset", str(tmp_path), ANY)

    def denied(self: LocalPlace, expected: FileStatus) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(LocalPlace, "reader", denied)
    assert source.ends([0]).num_bytes.tolist() == [-1]
    with pytest.raises(PermissionError):
        source[0]


@pytest.mark.parametrize(
    ("pattern", "num_samples"), [("in1k-train-{00..02}.tar", 6), ("*-train-0[12].tar", 4), ("in1k-train-01.tar", 2)]
)
def test_webdataset_patterns(shards: Path, pattern: str, num_samples: int) -> None:
    assert len(open_source("webdataset", str(shards / pattern), ANY)) == num_samples


def test_missing_shards_are_named(shards: Path) -> None:
    with pytest.raises(UserError, match=r"in1k-train-03\.tar: does not exist; 2 of 5 shards are missing"):
        open_source("webdataset", str(shards / "in1k-train-{00..04}.tar"), ANY)
    with pytest.raises(UserError, match="no tars there"):
        open_source("webdataset", str(shards / "x-*.tar"), ANY)


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("a", ["a"]),
        ("a-{08..11}", ["a-08", "a-09", "a-10", "a-11"]),
        ("{1..2}{x,y}", ["1x", "1y", "2x", "2y"]),
        ("{a}-{0..1}", ["{a}-0", "{a}-1"]),
    ],
)
def test_expand_braces(pattern: str, expanded: list[str]) -> None:
    assert expand_braces(pattern) == expanded


def test_braces_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="counts to more than 1,000,000"):
        open_source("webdataset", f"{tmp_path}/{{0..9999999}}.tar", ANY)


@pytest.mark.parametrize(
    ("name", "folder", "split"),
    [
        ("imagenet1k-validation-00.tar", "x", "validation"),
        ("train_0001.tar", "val", "train"),
        ("0001.tar", "test", "test"),
        ("trainer-1.tar", "x", "all"),
    ],
)
def test_split_of_shard(name: str, folder: str, split: str) -> None:
    assert split_of_shard(name, folder) == split


def test_labels_from_json_and_names_from_a_file(tmp_path: Path, tar_of: TarOf) -> None:
    files = {"a.b/x.png": b"png", "a.b/x.json": b'{"label": 1}', "y.JPEG": b"jpeg", "y.json": b'{"label": 0}'}
    (tmp_path / "0.tar").write_bytes(tar_of(files | {"notes.txt": b"?", ".hidden": b"?"}))
    names = tmp_path / "names.txt"
    names.write_text("n01000001 cat, pussy\nn02000002 dog\n")
    source = open_source("webdataset", str(tmp_path), ANY, SourceOptions(labels=str(names)))
    assert [(source[i].data, source[i].label) for i in range(2)] == [(b"png", 1), (b"jpeg", 0)]
    assert source.key(0) == "0.tar/a.b/x"
    assert (source.class_names, source.describe().label_map["n02000002"]) == (("n01000001", "n02000002"), 1)
    assert source.describe().num_left_out == 1
    names.write_text("cat\n")
    with pytest.raises(UserError, match=r"has labels 0\.\.1, expected 0\.\.0"):
        open_source("webdataset", str(tmp_path), ANY, SourceOptions(labels=str(names)))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jpg": b"1"}, r"0\.tar: a: has neither \.cls nor \.json, so no label"),
        ({"a.jpg": b"1", "a.cls": b"dog"}, r"0\.tar: a\.cls: holds no label; expected a number"),
        ({"a.jpg": b"1", "a.json": b"{}"}, r"0\.tar: a\.json: holds no label"),
        ({"a.jpg": b"1", "a.json": b"[" * 100_000}, r"0\.tar: a\.json: holds no label"),
        ({"a.jpg": b"1", "a.cls": b"1" * 2_000_000}, r"a\.cls: has 2,000,000 bytes, expected a label"),
        ({"a.jpg": b"1", "a.cls": b"-1"}, r"has labels -1\.\.-1, expected from 0; hidden test labels are -1"),
        ({"a.jpg": b"1", "a.cls": b"99999999"}, "expected numbers of classes, below 1,000,000"),
        ({"a.txt": b"1"}, "holds no samples"),
        ({"/a.jpg": b"1", "/a.cls": b"1"}, "leads out of the archive"),
    ],
)
def test_webdataset_mistakes(files: dict[str, bytes], message: str, tmp_path: Path, tar_of: TarOf) -> None:
    (tmp_path / "0.tar").write_bytes(tar_of(files))
    with pytest.raises(UserError, match=message):
        open_source("webdataset", str(tmp_path), ANY)
