"""Each source gives the images, labels, names and identity of what lies there, and says what it cannot read."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_prep.errors import UserError
from data_prep.sources import SourceOptions, open_source
from data_prep.sources.files.listing import PackedStrings
from data_prep.sources.image_folder import ImageFolder
from data_prep.sources.splits import SplitRequest, choose_split, requested_split

ANY = SplitRequest(None, explicit=False)


def named(split: str) -> SplitRequest:
    return SplitRequest(split, explicit=True)


def implied(split: str) -> SplitRequest:
    return SplitRequest(split, explicit=False)


# --- names ------------------------------------------------------------------------------------------------------------


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(UserError, match="--source tars: unknown; known sources: cifar10, cifar100, digits, hf-parquet"):
        open_source("tars", None, ANY)


def test_an_option_of_another_source_is_refused() -> None:
    with pytest.raises(UserError, match="--class-order: --source digits does not take it; it belongs to hf-parquet"):
        open_source("digits", None, ANY, SourceOptions(class_order="text"))


# --- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "output", "expected"),
    [
        (None, "train.beton", implied("train")),
        (None, "val.beton", implied("val")),
        (None, "cifar.beton", ANY),
        ("test", "train.beton", named("test")),
    ],
)
def test_requested_split(option: str | None, output: str, expected: SplitRequest) -> None:
    assert requested_split(option, Path("/data") / output) == expected


@pytest.mark.parametrize(
    ("available", "request_", "chosen"),
    [
        (["train", "validation", "test"], named("val"), "validation"),
        (["train", "test"], implied("val"), "test"),
        (["train", "val"], named("validation"), "val"),
        (["train", "validation", "test"], named("test"), "test"),
        (["unsupervised", "train"], named("unsupervised"), "unsupervised"),
        (["all"], ANY, "all"),
    ],
)
def test_choose_split(available: list[str], request_: SplitRequest, chosen: str) -> None:
    assert choose_split(available, request_, "here") == chosen


@pytest.mark.parametrize("request_", [ANY, named("test"), implied("test"), named("vali")])
def test_an_unclear_split_is_refused_with_the_choices(request_: SplitRequest) -> None:
    with pytest.raises(UserError, match=r"^here: holds the splits train, val.*--split$"):
        choose_split(["train", "val"], request_, "here")


# --- listings ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=20).filter(lambda name: b"\0" not in name)))
def test_packed_strings_hold_any_file_names(raw: list[bytes]) -> None:
    names = [os.fsdecode(name) for name in raw]
    packed = pickle.loads(pickle.dumps(PackedStrings(names)))
    assert list(packed) == names
    assert len(packed) == len(names)


# --- digits -----------------------------------------------------------------------------------------------------------


def test_digits_splits_are_disjoint_and_stratified() -> None:
    whole, train, val = (open_source("digits", None, request) for request in (ANY, named("train"), implied("val")))
    assert (len(whole), len(train), len(val)) == (1797, 1442, 355)
    keys = {name: {source.key(i) for i in range(len(source))} for name, source in (("train", train), ("val", val))}
    assert not keys["train"] & keys["val"]
    assert keys["train"] | keys["val"] == {whole.key(i) for i in range(1797)}
    assert [val.describe().split, whole.describe().split] == ["val", "all"]
    counts = Counter(val[i].label for i in range(355))
    assert [counts[label] for label in range(10)] == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    assert len({source.describe().identity for source in (whole, train, val)}) == 3


def test_digits_are_the_real_ones() -> None:
    from sklearn.datasets import load_digits

    whole = pickle.loads(pickle.dumps(open_source("digits", None, ANY)))
    bunch = load_digits()
    for index in (0, 5, 1796):
        sample = whole[index]
        image = Image.open(io.BytesIO(sample.data))
        assert (image.format, image.size, image.mode) == ("JPEG", (32, 32), "RGB")
        shrunk = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX)).astype(float)
        assert np.corrcoef(shrunk.ravel(), bunch.images[index].ravel())[0, 1] > 0.95
        assert sample.label == bunch.target[index]
        assert whole.class_names[sample.label] == str(bunch.target[index])


def test_digits_take_no_input() -> None:
    with pytest.raises(UserError, match="takes no --input"):
        open_source("digits", "/data", ANY)
    with pytest.raises(UserError, match="holds the splits train, val"):
        open_source("digits", None, named("test2"))


# --- synthetic --------------------------------------------------------------------------------------------------------


def test_synthetic_is_as_asked_and_repeatable() -> None:
    source = open_source("synthetic", "n=30,size=20..40,classes=4,seed=3", ANY)
    again = open_source("synthetic", "n=30,size=20..40,classes=4,seed=3", ANY)
    sides = set()
    for i in range(30):
        sample = source[i]
        assert sample == again[i]
        assert sample.label == i % 4
        image = Image.open(io.BytesIO(sample.data))
        assert image.format == "JPEG"
        sides |= set(image.size)
    assert min(sides) >= 20
    assert max(sides) <= 40
    assert len(sides) > 10
    others = [
        open_source("synthetic", f"n=30,size=20..40,classes=4,seed={s}", r) for s, r in ((4, ANY), (3, named("val")))
    ]
    assert all(source[0].data != other[0].data for other in others)


@pytest.mark.parametrize(
    "location",
    ["n=0", "size=9..8", "size=0", "size=20000", "n=x", "colour=red", "format=gif", "classes=0", "seed=-1", "n"],
)
def test_synthetic_parameters_are_checked(location: str) -> None:
    with pytest.raises(UserError, match=r"^--input "):
        open_source("synthetic", location, ANY)


# --- image-folder -----------------------------------------------------------------------------------------------------


def test_image_folder_reads_classes_in_text_order(image_tree: Path) -> None:
    (image_tree / "dog" / "puppies").mkdir()
    (image_tree / "dog" / "puppies" / "9.png").write_bytes(b"pixels")
    (image_tree / "dog" / "notes.txt").write_text("no image")
    (image_tree / "dog" / ".hidden.jpg").write_text("hidden")
    (image_tree / ".cache").mkdir()
    source = pickle.loads(pickle.dumps(open_source("image-folder", str(image_tree), ANY)))
    assert source.class_names == ("cat", "dog", "emu")
    keys = ["cat/0.JPEG", "cat/1.JPEG", "dog/0.JPEG", "dog/1.JPEG", "dog/puppies/9.png", "emu/0.JPEG", "emu/1.JPEG"]
    assert [source[i].key for i in range(len(source))] == keys == [source.key(i) for i in range(len(source))]
    assert [source[i].label for i in range(7)] == [0, 0, 1, 1, 1, 2, 2]
    assert source[4].data == b"pixels"
    assert source[6].data == (image_tree / "emu/1.JPEG").read_bytes()
    assert source.describe().num_left_out == 1


def test_image_folder_with_splits(image_tree: Path, tmp_path: Path) -> None:
    root = tmp_path / "both"
    for split in ("train", "validation"):
        (root / split / "cat").mkdir(parents=True)
        (root / split / "cat" / f"{split}.jpg").write_bytes(b"1")
    assert open_source("image-folder", str(root), implied("val"))[0].key == "cat/validation.jpg"
    assert open_source("image-folder", str(root), named("train")).describe().split == "train"
    with pytest.raises(UserError, match="holds the splits train, validation; say which with --split"):
        open_source("image-folder", str(root), ANY)
    # A tree without splits is taken whole on purpose, or under a name that asks for no split.
    assert len(open_source("image-folder", str(image_tree), named("all"))) == 6
    assert len(open_source("image-folder", str(image_tree), ANY)) == 6
    for request in (implied("val"), named("val")):
        with pytest.raises(UserError, match=r"is not divided into splits.*--split all"):
            open_source("image-folder", str(image_tree), request)
    image_tree.rename(tmp_path / "Validation")
    assert open_source("image-folder", str(tmp_path / "Validation"), implied("val")).describe().split == "val"
    with pytest.raises(UserError, match=r"is val, by the name Validation, but the output's name .train. asks"):
        open_source("image-folder", str(tmp_path / "Validation"), implied("train"))


def test_splits_with_other_classes_are_noted(tmp_path: Path) -> None:
    for folder in ("train/ant", "train/bee", "train/cow", "val/ant", "val/cow"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.jpg").write_bytes(b"1")
    note = "{} has other classes, so other labels: bee is not in both"
    assert open_source("image-folder", str(tmp_path), named("val")).describe().label_checks == [note.format("train")]
    assert open_source("image-folder", str(tmp_path), named("train")).describe().label_checks == [note.format("val")]
    (tmp_path / "train/bee").rename(tmp_path / "bee")
    assert open_source("image-folder", str(tmp_path), named("train")).describe().label_checks == []


def test_a_class_called_train_is_no_split(image_tree: Path) -> None:
    (image_tree / "cat").rename(image_tree / "train")
    assert open_source("image-folder", str(image_tree), ANY).class_names == ("dog", "emu", "train")


def test_image_folder_identity_survives_a_copy_and_notices_changes(image_tree: Path, tmp_path: Path) -> None:
    import shutil

    first = ImageFolder.open(str(image_tree), ANY).describe()
    copy = tmp_path / "copy"
    shutil.copytree(image_tree, copy)
    os.utime(copy / "cat" / "0.JPEG", ns=(1, 1))
    second = ImageFolder.open(str(copy), ANY).describe()
    assert first.identity == second.identity
    assert first.state != second.state
    (copy / "cat" / "0.JPEG").write_bytes(b"longer or shorter")
    assert ImageFolder.open(str(copy), ANY).describe().identity != first.identity
    (image_tree / "cat").rename(image_tree / "bat")
    assert ImageFolder.open(str(image_tree), ANY).describe().identity != first.identity


def test_image_folder_mistakes(image_tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs --input"):
        open_source("image-folder", None, ANY)
    with pytest.raises(UserError, match="is not a folder"):
        open_source("image-folder", str(tmp_path / "none"), ANY)
    with pytest.raises(UserError, match="holds no class folders; expected cat/<class>/<image files>"):
        open_source("image-folder", str(image_tree / "cat"), ANY)
    (image_tree / "fox").mkdir()
    with pytest.raises(UserError, match="fox: this class folder holds no images"):
        open_source("image-folder", str(image_tree), ANY)


# --- hf-parquet -------------------------------------------------------------------------------------------------------

NAMES = ["plane", "car", "bird"]


def write_parquet(
    path: Path,
    images: list[bytes | None],
    labels: list[int | None],
    *,
    image_column: str = "image",
    label_column: str = "label",
    metadata: bool = True,
    row_group_size: int = 4,
) -> None:
    struct = pa.array(
        [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)],
        type=pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({image_column: struct, label_column: pa.array(labels, type=pa.int64())})
    if metadata:
        features = {image_column: {"_type": "Image"}, label_column: {"names": NAMES, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """Two train files of 10 and 3 rows, one test file of 5."""
    root = tmp_path / "hub"
    for name, start, rows in (
        ("train-00000-of-00002", 0, 10),
        ("train-00001-of-00002", 10, 3),
        ("test-00000-of-00001", 50, 5),
    ):
        numbers = range(start, start + rows)
        write_parquet(root / "data" / f"{name}.parquet", [b"image %d" % i for i in numbers], [i % 3 for i in numbers])
    return root


def test_hf_parquet_reads_rows_in_order_and_at_random(hub: Path) -> None:
    source = pickle.loads(pickle.dumps(open_source("hf-parquet", str(hub), implied("train"))))
    assert source.class_names == tuple(NAMES)
    assert len(source) == 13
    for i in [*range(13), 12, 0, 7, 3, 11]:
        sample = source[i]
        assert (sample.data, sample.label) == (b"image %d" % i, i % 3)
    assert source.key(9) == "train-00000-of-00002.parquet row 9"
    assert source.key(11) == "train-00001-of-00002.parquet row 1"
    again = pickle.loads(pickle.dumps(source))
    assert again[12].data == b"image 12"
    val = open_source("hf-parquet", str(hub), named("val"))
    assert (val.describe().split, len(val), val[0].data) == ("test", 5, b"image 50")


def test_large_row_groups_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.sources.hf_parquet.LARGE_GROUP_BYTES", 100)
    monkeypatch.setattr("data_prep.sources.parquet_file.rows_at_once", lambda *_, **__: 3)
    write_parquet(tmp_path / "0.parquet", [b"image %d" % i for i in range(30)], [0] * 30, row_group_size=20)
    source = open_source("hf-parquet", str(tmp_path), ANY)
    for i in [*range(30), 29, 19, 5, 4, 18, 0]:
        assert source[i].data == b"image %d" % i


def test_hf_parquet_takes_a_file_or_a_glob(hub: Path) -> None:
    data = hub / "data"
    assert len(open_source("hf-parquet", str(data / "train-00001-of-00002.parquet"), ANY)) == 3
    assert len(open_source("hf-parquet", str(data / "train-*.parquet"), ANY)) == 13
    with pytest.raises(UserError, match=r"holds the splits test, none of which is what the output's name \(train\)"):
        open_source("hf-parquet", str(data / "test-*.parquet"), implied("train"))
    with pytest.raises(UserError, match="holds the splits test, train; say which"):
        open_source("hf-parquet", str(hub), ANY)


def test_hf_parquet_notices_a_missing_download(hub: Path) -> None:
    (hub / "data" / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(UserError, match="1 of 2 files are missing, the first is number 0"):
        open_source("hf-parquet", str(hub), named("train"))
    assert len(open_source("hf-parquet", str(hub / "data" / "train-*"), named("train"))) == 3


def test_cifars_column_names_work_too(tmp_path: Path) -> None:
    write_parquet(tmp_path / "0.parquet", [b"x"], [2], image_column="img", label_column="fine_label")
    source = open_source("hf-parquet", str(tmp_path), ANY)
    assert (source[0].data, source[0].label, source.describe().split) == (b"x", 2, "all")


def test_a_row_without_bytes_is_a_bad_sample(tmp_path: Path) -> None:
    write_parquet(tmp_path / "0.parquet", [b"x", None], [0, 1])
    with pytest.raises(ValueError, match="no bytes for it, only a path"):
        open_source("hf-parquet", str(tmp_path), ANY)[1]


@pytest.mark.parametrize(
    ("options", "labels", "message"),
    [
        ({"image_column": "picture"}, [0, 1], "has the columns picture, label, expected one named image or img"),
        ({"label_column": "y"}, [0, 1], "expected one named label or labels or fine_label; --label-column says which"),
        ({}, [0, -1], r"0\.parquet: row 1: label: the label is -1; hidden test labels are -1: choose another split"),
        ({}, [0, 3], r"0\.parquet row 1 has label 3, expected 0\.\.2: 3 classes have a name"),
        ({}, [0, None], r"0\.parquet: row 1 has no label"),
    ],
)
def test_hf_parquet_mistakes(
    tmp_path: Path, options: dict[str, object], labels: list[int | None], message: str
) -> None:
    write_parquet(tmp_path / "0.parquet", [b"x", b"y"], labels, **options)
    with pytest.raises(UserError, match=message):
        open_source("hf-parquet", str(tmp_path), ANY)


def test_hf_parquet_without_parquet(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs --input"):
        open_source("hf-parquet", None, ANY)
    with pytest.raises(UserError, match="no parquet files there"):
        open_source("hf-parquet", str(tmp_path), ANY)
    (tmp_path / "a.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read as parquet"):
        open_source("hf-parquet", str(tmp_path), ANY)
