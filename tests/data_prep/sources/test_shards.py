"""The files of a split are found by their names; a name that is not understood is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_prep.sources.shards import Shards, choose_shards, find_shards, names_in_keys
from data_prep.sources.splits import SplitRequest
from tests.data_prep.sources.opening import named, refused, refuses

HASHES = ("-a67ea39dba1f0f10", "-0123456789abcdef")
TRAIN = SplitRequest("train")


def chosen(names: str, request: SplitRequest, root: str | None = "data") -> tuple[str, list[str]]:
    """The split, and its files."""
    shards = Shards("here", root, (), tuple(sorted(names.split())))
    found = choose_shards(shards, request)
    return found.split, [shards.names[index] for index in found.indices]


LAYOUTS = [
    (
        " ".join(f"train-0000{n}-of-00002{HASHES[n]}.parquet" for n in (0, 1)),
        f"valid-00000-of-00001{HASHES[0]}.parquet",
    ),
    ("data/train/0000.parquet data/train/0001.parquet", "data/validation/0000.parquet"),
    ("default/partial-train/0000.parquet", "default/partial-validation/0000.parquet"),
    ("train_0.parquet train_1.parquet", "val_0.parquet"),
    ("cifar-train.parquet", "cifar-test.parquet"),
    ("my-dataset-train-00000-of-00001.parquet", "my-dataset-test-00000-of-00001.parquet"),
    ("0000-train.parquet 0001-train.parquet", "0000-val.parquet"),
    ("TRAIN.1.parquet TRAIN.2.parquet", "VAL.1.parquet"),
    ("train2017.parquet", "val2017.parquet"),
    ("data-00000-of-00002-train.parquet data-00001-of-00002-train.parquet", "data-00000-of-00001-dev.parquet"),
    ("imagenet1k-train-0000.tar imagenet1k-train-0001.tar", "imagenet1k-validation-00.tar"),
    ("train/00/0.tar train/01/1.tar", "val/00/0.tar"),
    ("train-00001-of-00002.tar train-00002-of-00002.tar", "test-00000-of-00001.tar"),
]


@pytest.mark.parametrize(("train", "val"), LAYOUTS)
def test_the_word_for_a_split_is_found_anywhere_in_a_name(train: str, val: str) -> None:
    assert chosen(f"{train} {val}", TRAIN)[1] == train.split()
    assert chosen(f"{train} {val}", SplitRequest("val"))[1] == val.split()
    refuses("^here: holds the splits .*say which with --split", chosen, f"{train} {val}", SplitRequest())


def test_a_split_is_called_by_its_word_where_that_is_clear() -> None:
    assert chosen("in1k-validation-00.tar in1k-train-00.tar", SplitRequest("val"))[0] == "validation"
    assert chosen("train-1.tar train-extra-1.tar", TRAIN) == ("train", ["train-1.tar"])
    assert chosen("train-1.tar train-extra-1.tar", named("train-extra"))[1] == ["train-extra-1.tar"]
    shards = Shards("here", "data", (), ("train-1.tar", "train-extra-1.tar", "val-1.tar"))
    assert choose_shards(shards, TRAIN).notes == ["train-extra of here not taken, only train"]
    assert choose_shards(shards, SplitRequest("val")).notes == []
    assert chosen("unsupervised-0-of-1.parquet labelled-0-of-1.parquet", named("labelled"))[0] == "labelled"


@pytest.mark.parametrize(
    ("names", "request_", "message"),
    [
        ("0000.parquet 0001.parquet", TRAIN, "not divided into splits.*both have all of it"),
        ("0000.parquet", named("val"), "--split val: here is not divided into splits"),
        ("mydata-00000-of-00001.parquet", SplitRequest("val"), "not divided into splits"),
        ("train-0.tar extra-0.tar", TRAIN, r"name of extra-0\.tar says no split, that of train-0\.tar"),
        ("train-0.tar 0001.tar", named("train"), r"the name of 0001\.tar says no split"),
        ("trainval-0.tar", TRAIN, "holds the splits trainval, none of which"),
        ("in1k-train-0.tar in21k-train-0.tar", TRAIN, "of which in1k-train, in21k-train may be"),
        ("a/train/0.parquet b/train/0.parquet", TRAIN, "of which a/train, b/train may be"),
        ("a/train-0.tar b/train-0.tar", TRAIN, "holds a/train-0.tar and b/train-0.tar, so perhaps two"),
        ("train-0.tar val-0.tar", named("all"), "--split all does not combine"),
        ("train.tar train_2.tar", TRAIN, r"train\.tar and train_2\.tar may be parts of one split"),
        ("train.tar train-(1).tar val.tar", TRAIN, r"train-\(1\)\.tar .*may be parts of one split"),
    ],
)
def test_names_that_do_not_tell_are_refused(names: str, request_: SplitRequest, message: str) -> None:
    refuses(message, chosen, names, request_)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("train-00001-of-00002.parquet", "1 of 2 files are missing, the first is number 0"),
        (f"train-00000-of-00003{HASHES[0]}.parquet", "2 of 3 files are missing, the first is number 1"),
        (" ".join(f"train-0-of-1{hash_}.parquet" for hash_ in HASHES), "are both number 0 of 1, so of two data sets"),
        ("train-00000-of-00001.parquet train-00000-of-00002.parquet", "of sets of 1 and of 2 files"),
        ("train-0-of-1.tar train-7-of-1.tar", "train-7-of-1.tar is beyond its own count"),
        ("train-0-of-99999999999.tar", "99,999,999,998 of 99,999,999,999 files are missing"),
    ],
)
def test_an_incomplete_or_mixed_set_is_refused(names: str, message: str) -> None:
    for request in (TRAIN, named("train"), SplitRequest()):
        refuses(message, chosen, names, request)
    assert chosen(names, named("train"), root=None)[1] == sorted(names.split())  # files that were named one by one


@pytest.mark.parametrize(
    ("names", "gap"),
    [
        ("train-0.tar train-2.tar train-3.tar", "1 is missing after train-0.tar"),
        ("train/0001.tar train/0003.tar", "2 is missing after train/0001.tar"),
        ("train-1.tar train-2.tar train-10.tar train-20260101.tar", None),
        ("train-1.tar train-2.tar train-x-7.tar", None),
        ("train-00000-of-00002.tar train-00001-of-00002.tar", None),
    ],
)
def test_a_gap_in_the_numbers_is_noted(names: str, gap: str | None) -> None:
    notes = choose_shards(Shards("here", "data", (), tuple(names.split())), named("train")).notes
    expected = [f"files are numbered, and {gap}: is the set complete?"] if gap else []
    assert [note for note in notes if note.startswith("files are numbered")] == expected
    one_by_one = choose_shards(Shards("here", None, (), tuple(names.split())), named("train"))
    assert one_by_one.notes == notes[: len(notes) - len(expected)]


def test_without_splits_all_files_are_taken_only_if_asked_for() -> None:
    names = "0000.parquet 0001.parquet"
    assert chosen(names, SplitRequest()) == chosen(names, named("all")) == ("all", names.split())
    assert chosen(names, TRAIN, root="train")[1] == names.split()
    assert chosen("train/0.parquet", TRAIN, root=None) == ("train", ["train/0.parquet"])
    assert chosen("test_of_mine/0.parquet", SplitRequest(), root=None)[0] == "all"
    assert chosen("mydata-00000-of-00001.parquet", named("mydata"))[0] == "mydata"


def test_keys_of_samples_have_paths_where_file_names_are_equal() -> None:
    shards = Shards("here", None, (), ("a/0.tar", "b/0.tar", "b/1.tar"))
    assert names_in_keys(shards, [0, 2]) == ["0.tar", "1.tar"]
    assert names_in_keys(shards, [0, 1]) == ["a/0.tar", "b/0.tar"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("a.txt", "no tars there"),
        ("train-0.tar.gz", r"train-0\.tar\.gz is compressed, and pieces of it cannot be read in place; unpack it"),
        ("0.tar train-1.tgz", r"train-1\.tgz is compressed"),
        ("0.tar 1.tar.part", r"1\.tar\.part is an unfinished download"),
        ("0.tar 1.tar.incomplete", "unfinished download"),
    ],
)
def test_shards_that_cannot_be_read_are_not_skipped(tmp_path: Path, files: str, message: str) -> None:
    for name in files.split():
        (tmp_path / name).write_bytes(b"")
    refuses(message, find_shards, str(tmp_path), ".tar", "tars")


def test_files_are_each_named_once(tmp_path: Path) -> None:
    for name in ("0.tar", "1.TAR", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "sub").mkdir()
    here = tmp_path.name
    assert find_shards(str(tmp_path), ".tar", "tars").names == ("0.tar", "1.TAR")
    assert find_shards(f"{tmp_path}/{{0.tar,1.TAR}}", ".tar", "tars").names == (f"{here}/0.tar", f"{here}/1.TAR")
    for pattern, message in [
        ("{0.tar,0.tar}", r"names .*/0\.tar twice"),
        ("{0.tar,./0.tar}", r"names .*/0\.tar twice"),
        ("{0.tar,sub}", "sub: is a folder, one of 2 paths named"),
        ("{0..3}.tar", r"1\.tar: does not exist; 3 of 4 files are missing"),
        ("x-*.tar", "no tars there"),
    ]:
        refuses(message, find_shards, str(tmp_path / pattern), ".tar", "tars")


def test_a_pipe_is_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.tar")
    refused(r"0\.tar is not a file, nor a link to one", "webdataset", tmp_path)
    for source in ("webdataset", "hf-parquet", "cifar10"):
        refused(r"0\.tar: does not exist", source, tmp_path / "0.tar", TRAIN)
    refused("--class-order size: expected one of text, number", "webdataset", tmp_path, class_order="size")
