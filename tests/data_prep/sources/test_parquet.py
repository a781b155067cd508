"""Parquet files are checked for consistency, each and together: columns, types, class names, counts, and memory."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.errors import Fault
from data_prep.sources.base import Source
from data_prep.sources.splits import SplitRequest
from tests.data_prep.sources.opening import OpenAllWithin, data_of, named, opened, refused

CATS = ["cat", "dog"]


def images(*data: bytes | None, paths: list[str] | None = None) -> pa.Array:
    names = paths or [f"{number}.png" for number in range(len(data))]
    rows = [{"bytes": each, "path": name} for each, name in zip(data, names, strict=True)]
    return pa.array(rows, type=pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def write(path: Path, columns: dict[str, Any], names: Any = None, **options: Any) -> Path:
    table = pa.table(columns) if isinstance(columns, dict) else columns
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, **options)
    return path


def opened_file(path: Path, **options: object) -> Source:
    return opened("hf-parquet", path, **options)


TWO = images(b"a", b"b")
PLAIN = pa.array([b"a", b"b"], pa.binary())


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """Two train files of 10 and 3 rows, one test file of 5."""
    root = tmp_path / "hub" / "data"
    root.mkdir(parents=True)
    for name, numbers in (
        ("train-00000-of-00002", range(10)),
        ("train-00001-of-00002", range(10, 13)),
        ("test-00000-of-00001", range(50, 55)),
    ):
        columns = {"image": images(*(b"image %d" % i for i in numbers)), "label": [i % 3 for i in numbers]}
        write(root / f"{name}.parquet", columns, [*CATS, "emu"], row_group_size=4)
    return root.parent


# --- reading ----------------------------------------------------------------------------------------------------------


def test_it_reads_rows_in_order_and_at_random(hub: Path) -> None:
    source = pickle.loads(pickle.dumps(opened("hf-parquet", hub, SplitRequest("train"))))
    assert source.class_names == (*CATS, "emu")
    assert len(source) == 13
    for i in [*range(13), 12, 0, 7, 3, 11]:
        sample = source[i]
        assert (sample.data, sample.label) == (b"image %d" % i, i % 3)
    assert source.key(9) == "train-00000-of-00002.parquet row 9"
    assert source.key(11) == "train-00001-of-00002.parquet row 1"
    again = pickle.loads(pickle.dumps(source))
    assert again[12].data == b"image 12"
    val = opened("hf-parquet", hub, named("val"))
    assert (val.description.split, len(val), val[0].data) == ("test", 5, b"image 50")


def test_large_row_groups_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.sources.hf_parquet.LARGE_GROUP_BYTES", 100)
    monkeypatch.setattr("data_prep.sources.parquet_file.rows_at_once", lambda *_, **__: 3)
    columns = {"image": images(*(b"image %d" % i for i in range(30))), "label": [0] * 30}
    source = opened_file(write(tmp_path / "0.parquet", columns, row_group_size=20))
    for i in [*range(30), 29, 19, 5, 4, 18, 0]:
        assert source[i].data == b"image %d" % i


def test_it_takes_a_file_or_a_glob(hub: Path) -> None:
    data = hub / "data"
    assert len(opened_file(data / "train-00001-of-00002.parquet")) == 3
    assert len(opened_file(data / "train-*.parquet")) == 13
    message = r"holds the splits test, none of which is what the output's name \(train\)"
    refused(message, "hf-parquet", data / "test-*.parquet", SplitRequest("train"))
    refused("holds the splits test, train; say which", "hf-parquet", hub)


def test_a_row_without_bytes_is_a_bad_sample(tmp_path: Path) -> None:
    path = write(tmp_path / "0.parquet", {"image": images(b"x", None), "label": [0, 1]})
    with pytest.raises(ValueError, match="no bytes for it, only a path"):
        opened_file(path)[1]


def test_a_file_that_changes_is_not_read_on(tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", {"image": TWO, "label": [0, 1]})
    packed = pickle.dumps(opened_file(path))
    os.utime(path, ns=(1, 1))
    with pytest.raises(Fault, match=r"train\.parquet: changed"):
        pickle.loads(packed)[0]


@pytest.mark.parametrize(
    "column",
    [
        TWO,
        PLAIN,
        PLAIN.cast(pa.large_binary()),
        PLAIN.cast(pa.binary(1)),
        PLAIN.cast(pa.binary_view()),
        PLAIN.dictionary_encode(),
        pa.StructArray.from_arrays([PLAIN], ["bytes"]),
        pa.StructArray.from_arrays([PLAIN.cast(pa.large_binary()), pa.array([1, 2])], ["bytes", "path"]),
    ],
    ids=lambda column: str(column.type),
)
def test_images_are_read_from_columns_of_bytes(tmp_path: Path, column: pa.Array) -> None:
    source = opened_file(write(tmp_path / "0.parquet", {"image": column, "label": [1, 0]}, CATS))
    assert [(source[i].data, source[i].label) for i in (0, 1, 0)] == [(b"a", 1), (b"b", 0), (b"a", 1)]
    assert source.class_names == ("cat", "dog")


TEXTS = pa.array(["dog", "cat"])


@pytest.mark.parametrize(
    ("labels", "class_names", "expected"),
    [
        *((pa.array([2, 0], kind), ("0", "1", "2"), [2, 0]) for kind in (pa.uint8(), pa.uint64())),
        *((TEXTS.cast(kind), ("cat", "dog"), [1, 0]) for kind in (pa.string(), pa.large_string(), pa.string_view())),
        (TEXTS.dictionary_encode(), ("cat", "dog"), [1, 0]),
        (pa.array(["1", "0"]), ("0", "1"), [1, 0]),
        (pa.array([1, 0]).dictionary_encode(), ("0", "1"), [1, 0]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else None,
)
def test_labels_are_numbers_or_texts(
    tmp_path: Path, labels: pa.Array, class_names: tuple[str, ...], expected: list[int]
) -> None:
    source = opened_file(write(tmp_path / "0.parquet", {"image": TWO, "label": labels}))
    assert (source.class_names, source.labels.tolist()) == (class_names, expected)


# --- one file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "names", "message"),
    [
        (pa.array([0.0, 1.0]), CATS, "column label is of type double; expected whole numbers"),
        (pa.array(np.float16([0.5, 1])), CATS, "column label is of type halffloat"),
        ([True, False], CATS, "column label is of type bool"),
        (pa.array([1, 0], pa.decimal128(5, 2)), CATS, r"of type decimal128\(5, 2\)"),
        ([[0], [1]], CATS, "of type list.*several labels for one image"),
        ([{"id": 1}, {"id": 0}], CATS, "of type struct"),
        (pa.nulls(2), CATS, "of type null"),
        ([b"0", b"1"], CATS, "of type binary"),
        (pa.array([1, 2], pa.timestamp("s")), CATS, "of type timestamp"),
        ([0, 1], "cat", 'has "cat" for the names of the classes of label, expected a list'),
        ([0, 1], {"0": "cat"}, "name the classes with --labels FILE"),
        ([0, 1], [], r"has \[\] for the names"),
        ([0, 1], [1, 2], r"has \[1, 2\] for the names"),
        ([0, 1], ["cat"], r"0\.parquet row 1 has label 1, expected 0\.\.0"),
        (["cat", "emu"], CATS, "row 1 has the label 'emu', which is none of the 2"),
        ([0, -1], CATS, r"0\.parquet: row 1: label: the label is -1; hidden test labels are -1: choose another split"),
        ([0, None], CATS, "row 1 has no label"),
        (["cat", ""], None, "row 1: label: the label is missing"),
        (pa.array([0, 2**64 - 1], pa.uint64()), None, "is 18446744073709551615; expected the"),
    ],
)
def test_labels_that_are_not_understood_are_refused(tmp_path: Path, label: Any, names: Any, message: str) -> None:
    refused(message, "hf-parquet", write(tmp_path / "0.parquet", {"image": TWO, "label": label}, names))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": ["a.jpg", "b.jpg"], "label": [0, 1]}, "column image is of type string; expected the images' bytes"),
        ({"image": [[b"a"], [b"b"]], "label": [0, 1]}, "column image is of type list"),
        ({"image": [{"path": "a"}, {"path": "b"}], "label": [0, 1]}, "column image is of type struct<path"),
        ({"image": [{"bytes": "a"}, {"bytes": "b"}], "label": [0, 1]}, "column image is of type struct<bytes"),
        ({"image": TWO, "label": [0, 1], "labels": [1, 0]}, "label and labels; say with --label-column"),
        ({"image": TWO, "img": TWO, "label": [1, 0]}, "has the columns image and img; say with --image-column"),
        ({"Image": TWO, "label": [1, 0]}, "Image, label, expected one named image or img; --image-c"),
        ({"image": TWO, "class": [1, 0]}, "--label-column says which it is"),
        (pa.Table.from_arrays([TWO, *[pa.array([1, 0])] * 2], ["image", "label", "label"]), "2 columns named"),
        ({"image": TWO[:0], "label": pa.array([], pa.int64())}, "holds no samples: none of 1 files has a row"),
    ],
)
def test_columns_that_are_not_understood_are_refused(tmp_path: Path, columns: Any, message: str) -> None:
    refused(message, "hf-parquet", write(tmp_path / "0.parquet", columns))


def test_metadata_without_the_label_is_allowed(tmp_path: Path) -> None:
    table = pa.table({"image": TWO, "label": [1, 0]})
    for described in ({}, {"info": None}, {"info": {"features": {"label": {"dtype": "int64", "_type": "Value"}}}}):
        path = write(tmp_path / "0.parquet", table.replace_schema_metadata({"huggingface": json.dumps(described)}))
        assert opened_file(path).class_names == ("0", "1")
    for text in ("{", "[" * 100_000):
        path = write(tmp_path / "0.parquet", table.replace_schema_metadata({"huggingface": text}))
        refused(r"metadata \(key huggingface\) is not JSON; name the classes with", "hf-parquet", path)


def test_the_user_may_name_columns_and_classes(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    path = write(tmp_path / "0.parquet", {"photo": PLAIN, "img": TWO, "breed": ["dog", "cat"], "label": [0, 0]}, "cat")
    source = opened_file(path, image_column="photo", label_column="breed", labels=names)
    assert (data_of(source), source.labels.tolist()) == ([b"a", b"b"], [1, 0])
    assert opened_file(path, labels=names, image_column="img").class_names == ("cat", "dog")  # for the odd ones
    message = "none of them picture; --image-column says which it is"
    refused(message, "hf-parquet", path, image_column="picture")
    path = write(tmp_path / "0.parquet", {"img": TWO, "label": [0, 1]}, ["dog", "cat"])
    message = r"class 0 is 'dog' in .*0\.parquet, 'cat' in --labels; the names are the same"
    refused(message, "hf-parquet", path, labels=names)
    path = write(tmp_path / "0.parquet", {"img": images(*[b"x"] * 4), "label": ["c1", "c10", "c2", "c3"]})
    refused("--class-order number", "hf-parquet", path)
    assert opened_file(path, class_order="number").class_names == ("c1", "c2", "c3", "c10")
    path = write(tmp_path / "0.parquet", {"img": TWO, "fine_label": [5, 0], "coarse_label": [1, 0]})  # as CIFAR-100's
    assert opened_file(path).labels.tolist() == [5, 0]
    assert opened_file(path, label_column="coarse_label").labels.tolist() == [1, 0]


def test_imagenets_labels_are_proved_by_its_paths(tmp_path: Path) -> None:
    wnids = ["n02000002_1_n02000002.JPEG", "n01000001_7_n01000001.JPEG", "n02000002_2_n02000002.JPEG"]
    column = images(b"a", b"b", b"c", paths=wnids)
    path = write(tmp_path / "train-00000-of-00001.parquet", {"image": column, "label": [1, 0, 1]})
    assert opened_file(path).description.label_map == {"n01000001": 0, "n02000002": 1}
    for labels, contradiction in (([1, 0, 2], "wnid 2000002"), ([1, 1, 1], "label 1")):
        write(path, {"image": column, "label": labels})
        refused(f"the paths' wnids contradict the labels: {contradiction} goes with several", "hf-parquet", path)


# --- several files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "names", "message"),
    [
        ({}, ["dog", "cat"], r"class 0 is 'cat' in .*/0\.parquet, 'dog' in .*/1\.parquet; the"),
        ({}, ["cat", "dog", "emu"], r"class 2 is missing in .*0\.parquet \(2 classes\)"),
        ({}, None, r"1\.parquet: does not name its classes, and .*0\.parquet does"),
        ({"label": ["cat", "dog"]}, CATS, r"1\.parquet: the labels in label are texts, in .*0\.parquet numb"),
        ({"image": PLAIN}, CATS, r"1\.parquet: the images in image are of another type than in"),
        ({"label": [0.0, 1.0]}, CATS, r"1\.parquet: the column label is of type double"),
        ({"x": [1, 2]}, CATS, r"1\.parquet: has the columns image, label, x, .*0\.parquet has"),
        ({"label": [0, None]}, CATS, r"1\.parquet: row 1 has no label"),
    ],
)
def test_shards_that_differ_from_the_first_are_refused(tmp_path: Path, columns: Any, names: Any, message: str) -> None:
    same = {"image": TWO, "label": [0, 1]}
    write(tmp_path / "0.parquet", same, CATS)
    write(tmp_path / "1.parquet", same | columns, names)
    refused(message, "hf-parquet", tmp_path)


def test_shards_may_differ_in_what_does_not_matter(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    write(tmp_path / "0.parquet", {"image": TWO, "label": pa.array([0, 1], pa.int32())}, CATS)
    write(tmp_path / "1.parquet", {"image": TWO, "label": pa.array([1, 1], pa.int64())}, CATS)
    write(tmp_path / "2.parquet", {"image": TWO[:0], "label": pa.array([], pa.int64())}, CATS)
    source = opened_file(tmp_path)
    assert (source.labels.tolist(), source.key(3)) == ([0, 1, 1, 1], "1.parquet row 1")
    write(tmp_path / "1.parquet", {"image": TWO, "label": [1, 1]})  # without class names, which the user gives
    assert opened_file(tmp_path, labels=names).labels.tolist() == [0, 1, 1, 1]


def test_a_column_may_say_the_split(tmp_path: Path) -> None:
    path = write(tmp_path / "0.parquet", {"image": TWO, "label": [0, 1], "split": ["train", "test"]}, CATS)
    refused("samples of several splits, by the column split test, train: .*--split all", "hf-parquet", path)
    assert len(opened("hf-parquet", path, named("all"))) == 2
    for values in (["train", "train"], ["banana split", "peas"], [1, 2], [None, "val"]):
        write(path, {"image": TWO, "label": [0, 1], "split": values}, CATS)
        assert len(opened_file(path)) == 2


# --- hostile files ----------------------------------------------------------------------------------------------------


def test_a_file_that_is_not_parquet_is_named_by_what_it_is(tmp_path: Path) -> None:
    for data, message in (
        (b"<!DOCTYPE html><html>Sign in", "is a web page; is a login needed"),
        (b"PAR1" + bytes(100), "cannot be read as parquet: .*; copy or download it again"),
        (b"", "cannot be read as parquet"),
    ):
        (tmp_path / "0.parquet").write_bytes(data)
        refused(message, "hf-parquet", tmp_path)


def often(value: bytes | str, count: int) -> pa.Array:
    """One value many times, stored once."""
    kind = pa.binary() if isinstance(value, bytes) else pa.string()
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([value], kind))


def test_a_small_file_takes_little_memory(tmp_path: Path, open_all_within: OpenAllWithin) -> None:
    """Values that are stored once and meant often, and pages that unpack to a thousand times their size."""
    large, none = bytes(24 << 20), pa.nulls(8_000, pa.binary())
    paths = pa.StructArray.from_arrays([none, often("y" * 80_000, 8_000)], ["bytes", "path"])
    empty = {"image": pa.nulls(1_000_000, pa.binary()), "label": np.zeros(1_000_000, np.int8)}
    prefixes = {"use_dictionary": False, "column_encoding": {"image": "DELTA_BYTE_ARRAY", "label": "PLAIN"}}
    cases: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
        "rows": (empty, {}, "rows in [0-9]{1,2},[0-9]{3} bytes, so no images"),
        "images": ({"image": often(large, 24), "label": [0] * 24}, {}, "read 24 of 24$"),
        "prefixes": ({"image": pa.array([large] * 12), "label": [0] * 12}, prefixes, "read 12 of 12$"),
        "label": ({"image": PLAIN, "label": often("x" * len(large), 2)}, {}, "labels in label take 25,1.* for 2 rows"),
        "labels": ({"image": none, "label": often("x" * 80_000, 8_000)}, {}, "row 0: label: the label is 'xxx"),
        "paths": (
            {"image": paths, "label": pa.array([0] * 8_000, pa.int8())},
            {},
            "read 0 of 8000: the parquet file has no bytes for it, only a path",
        ),
    }
    for name, (columns, options, _) in cases.items():
        path = write(tmp_path / f"{name}.parquet", columns, compression="zstd", store_schema=False, **options)
        assert path.stat().st_size < 200_000, name
    outcomes = open_all_within(500, [("hf-parquet", str(tmp_path / f"{name}.parquet"), {}) for name in cases])
    for text, (name, (_, _, expected)) in zip(outcomes, cases.items(), strict=True):
        assert re.search(expected, text), (name, text)
