"""A table of labels is read as intended, or refused naming line and column; nothing in it is skipped silently."""

from __future__ import annotations

import os
import pickle
import random
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.sources.base import Source
from data_prep.sources.files.local import LocalPath
from data_prep.sources.label_file import read_class_names
from data_prep.sources.splits import ANY_SPLIT, SplitRequest
from tests.data_prep.sources.opening import OpenAllWithin, keys_of, named, opened, refused, refuses

NUM_IMAGES = 12
Open = Callable[..., Source]
NAMES = [f"img_{number:02d}.jpg" for number in range(NUM_IMAGES)]
ANIMALS = [f"cat{number % 3}" for number in range(NUM_IMAGES)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("labels") / "images"
    root.mkdir()
    for name in NAMES:
        (root / name).write_bytes(name.encode())
    return root


@pytest.fixture
def open_with(images: Path, tmp_path: Path) -> Open:
    """The images with a table: `open_with(text or bytes, split=..., label_column=...)`."""

    def make(table: str | bytes, split: SplitRequest = ANY_SPLIT, name: str = "labels.csv", **options: str) -> Source:
        path = tmp_path / name
        path.write_bytes(table.encode() if isinstance(table, str) else table)
        return opened("image-folder", images, split, labels=path, **options)

    return make


def table(titles: str, row: str | Callable[[int], str]) -> str:
    """Titles, and a row for each image: `row` with its name, stem, number, class and the next one's stem. A function
    gives what follows the name."""
    lines = [titles]
    for number, name in enumerate(NAMES):
        text = row if isinstance(row, str) else f"{{name}},{row(number)}"
        following = NAMES[(number + 1) % NUM_IMAGES].removesuffix(".jpg")
        values = {"name": name, "stem": name.removesuffix(".jpg"), "next": following, "class": ANIMALS[number]}
        for key, value in {**values, "number": str(number)}.items():
            text = text.replace(f"{{{key}}}", value)
        lines.append(text)
    return "\n".join(lines) + "\n"


def label_names(source: Source) -> list[str]:
    return [source.class_names[label] for label in source.labels]


# --- columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("titles", "row"),
    [
        ("filename,width,height,class", "{name},500,375,{class}"),
        ("filename,label,source", "{name},{class},web"),
        (",filename,label", "{number},{name},{class}"),
        ("label,filename", "{class},{name}"),
        ("species;picture", "{class};{name}"),
        ("picture\tspecies", "{name}\t{class}"),
        ("what,is it", "{name},{class}"),
        ("img_00.jpg cat0", "{name} {class}"),
        ("Path,Label", "images/{name},{class}"),
        ("id,label", "{stem},{class}"),
        ("name,file,label", "{next},{name},{class}"),
        ('"file","class"', '"{name}", "{class}"'),
    ],
)
def test_the_columns_are_found(titles: str, row: str, open_with: Open) -> None:
    assert label_names(open_with(table(titles, row))) == ANIMALS


def test_whole_paths_below_the_input_are_names(open_with: Open, images: Path) -> None:
    assert label_names(open_with(table("file,label", f"{images}/{{name}},{{class}}"))) == ANIMALS


def test_the_columns_can_be_named(open_with: Open) -> None:
    text = table("name,class,kind,other", "{name},x,{class},{name}")
    assert label_names(open_with(text, label_column="kind", file_column="name")) == ANIMALS
    assert label_names(open_with(text, label_column="3", file_column="NAME")) == ANIMALS
    bare = table("img_00.jpg,1,cat0", "{name},{number},{class}")
    assert label_names(open_with(bare, label_column="3")) == ANIMALS
    message = "labels.csv: --label-column sort: there is no such column; it has the columns name"
    refuses(message, open_with, text, label_column="sort")
    message = "labels.csv: --file-column 9: there is no such column; it has 3 columns without"
    refuses(message, open_with, bare, file_column="9")
    message = "the column kind cannot have both files and classes"
    refuses(message, open_with, text, label_column="kind", file_column="kind")
    twice = table("one,two,label", "{name},{next}.jpg,{class}")
    refuses("the columns one, two all name images; say which is meant with --file-column", open_with, twice)
    assert label_names(open_with(twice, file_column="one")) == ANIMALS
    message = "--file-column and --label-column are of the table that --labels names"
    refused(message, "image-folder", "/", label_column="x")


def test_unused_columns_are_noted(open_with: Open) -> None:
    assert open_with(table("filename,width,height,class", "{name},500,375,{class}")).notes == (
        "labels.csv: files are in the column filename, classes in class",
        "labels.csv: not used: width, height",
    )


# --- what is no class -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("titles", "row", "message"),
    [
        ("image,well,rust,scab", lambda i: f"{i % 3 == 0:d},{i % 3 == 1:d},{i % 3 == 2:d}", "well, rust, scab hold 0"),
        ("image,cat,dog", lambda i: f"{i % 2 == 0},{i % 2 == 1}", "cat, dog hold 0 and 1, or words"),
        ("image,a,b", lambda i: "1.0,0.0", "a, b hold 0 and 1, or words for them, one for each class: one class for"),
        ("image,label1,label2", lambda i: "cat,dog", "columns image, label1, label2; say which.*--label-column"),
        ("image,width,height", lambda i: "500,375", "has the columns image, width, height; say which"),
        ("image,tags", lambda i: f"{i % 3} {3 + i % 2}", "line 2 has several labels, 0 3: one class for each image"),
        ("image,tags", lambda i: f"{i % 3}|{3 + i % 2}", r"line 2 has several labels, 0\|3"),
        ("image,tags", lambda i: ["cat", "dog", "cat;dog"][i % 3], "line 4 has several labels, cat;dog"),
        ("image,tags", lambda i: ["cat", "dog", '"dog, cat"'][i % 3], "line 4 has several labels, dog, cat"),
        ("image,tags", lambda i: ["cat", "dog", "cat dog"][i % 3], "line 4 has several labels, cat dog"),
        ("image,tags", lambda i: '"[0, 3]"', "several labels"),
        ("image,tags", lambda i: "['cat']", "several labels"),
        ("image,age", lambda i: f"{i / 7:.3f}", "labels are numbers with fractions, 0.000 in line 2|0.143 in line 3"),
        ("image,age", lambda i: "1e-3", "numbers with fractions, 1e-3|several"),
        ("image,label", lambda i: str(i - 1), r"line 2: the label is '-1'; .*hidden labels \(-1\)"),
        ("image,label", lambda i: f"{i - 1}.0", r"line 2: the label is '-1.0'; .*hidden labels"),
        ("image,label", lambda i: "" if i == 4 else "cat", "line 6 should be <file>,<class>: it has no class"),
        ("image,label", lambda i: "nan" if i == 4 else "cat", r"line 6: the label is missing \(nan\)"),
        ("image,label", lambda i: "9999999999", "9999999999"),
        ("image,label", lambda i: str([0, 999_998][i % 2]), "2 different numbers up to 999,998"),
        ("image,label", lambda i: "9" * 5000, "has 5,000 characters"),
        ("image,label", lambda i: "0.5" if i else "cat", "line 3: the label is '0.5'"),
        ("image,width", lambda i: str(500 + i), "if they are classes, say --class-order number.*else name another"),
        # columns that may say the split
        ("file,label,split", lambda i: f"cat,{i % 5}", "the column split seems to name the split, by 0, 1, 2"),
        ("file,label,is_valid", lambda i: f"cat,{i % 2 == 0}", "is_valid seems to name the split, by False, True"),
        ("file,label,is_training_image", lambda i: f"cat,{i % 2}", "is_training_image seems to name the split"),
        ("file,label,split", lambda i: f"cat,{'train' if i else ''}", "line 2 should be .*: it has no split"),
        ("file,label,split", lambda i: f"cat,{'train' if i else 'trainval'}", "to name the split, by train, trainval"),
        ("file,label,split,phase", lambda i: "cat,train,val", "split, phase both name the split"),
    ],
)
def test_columns_that_are_not_one_class_or_split_are_refused(
    titles: str, row: Callable[[int], str], message: str, open_with: Open
) -> None:
    refuses(message, open_with, table(titles, row), named("train") if "cat," in row(1) else ANY_SPLIT)


def test_names_that_only_look_like_several_labels_are_classes(open_with: Open) -> None:
    for label in ('"big, red"', "hot dog", "a|b", "1 2 buckle"):
        source = open_with(table("image,label", lambda i, label=label: ["x", label][i % 2]))
        assert set(source.class_names) == {"x", label.strip('"')}


def test_whole_numbers_of_a_table_of_floats_are_labels(open_with: Open) -> None:
    source = open_with(table("image,label", lambda i: f"{(i + 10) % 12}.0"))
    assert source.class_names == tuple(map(str, range(12)))
    assert source.labels.tolist() == [(i + 10) % 12 for i in range(NUM_IMAGES)]


def test_kaggles_solution_file_is_a_table(open_with: Open) -> None:
    rows = (f"{name[:6]},n0{i % 2 + 1}000000 1 2 3 4 n0{i % 2 + 1}000000 5 6 7 8 " for i, name in enumerate(NAMES))
    source = open_with("\n".join(["ImageId,PredictionString", *rows]))
    assert (source.class_names, source.labels.tolist()) == (("n01000000", "n02000000"), [0, 1] * 6)


def test_numbers_in_a_table_are_the_labels(open_with: Open) -> None:
    source = open_with(table("file,label", lambda i: str((0, 10)[i % 2])))
    assert (source.class_names, source.labels.tolist()) == (tuple(map(str, range(11))), [0, 10] * 6)
    from_one = table("file,label", lambda i: str((1, 2, 10)[i % 3]))
    refuses("labels are numbers from 1, expected from 0.*, say --class-order", open_with, from_one)
    counted = open_with(from_one, class_order="number")
    assert (counted.class_names, counted.labels.tolist()) == (("1", "2", "10"), [0, 1, 2] * 4)


def test_a_table_names_files_in_folders_and_of_one_split(tmp_path: Path) -> None:
    for name in ("both/val/b.jpg", "both/val/a.jpg", "both/val/more/c.png", "both/val/readme.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "labels.txt").write_text("a,1\nb,0\n\nmore/c,0\n")
    source = opened("image-folder", tmp_path / "both", SplitRequest("val"), labels=tmp_path / "labels.txt")
    source = pickle.loads(pickle.dumps(source))
    assert [(source[i].key, source[i].label) for i in range(3)] == [("a.jpg", 1), ("b.jpg", 0), ("more/c.png", 0)]
    assert (source[2].data, source.description.split) == (b"both/val/more/c.png", "val")
    assert source.description.num_left_out == 1


# --- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("title", ["split", "subset", "Phase", "whatever"])
@pytest.mark.parametrize(("train", "val"), [("train", "val"), ("Training", "Testing"), ("TRAIN", "valid")])
def test_a_column_of_splits_is_kept_to(title: str, train: str, val: str, open_with: Open) -> None:
    text = table(f"filename,label,{title}", lambda i: f"{{class}},{train if i % 4 else val}")
    first, second = (open_with(text, SplitRequest(split)) for split in ("train", "val"))
    assert keys_of(first) == [name for i, name in enumerate(NAMES) if i % 4]
    assert keys_of(second) == NAMES[::4]
    assert first.class_names == second.class_names == ("cat0", "cat1", "cat2")
    assert first.description.split == train
    assert len(open_with(text, named("all"))) == NUM_IMAGES
    refuses("holds the splits .*; say which", open_with, text)


def test_a_class_without_images_in_a_split_keeps_its_label_and_is_noted(open_with: Open) -> None:
    text = table("file,label,split", lambda i: f"{'abc'[i % 3]},{'val' if i == 2 else 'train'}")
    source = open_with(text, named("val"))
    assert (source.class_names, source.labels.tolist()) == (("a", "b", "c"), [2])
    assert "classes without images: a, b" in source.notes


def test_the_tables_name_gives_its_split(open_with: Open) -> None:
    text = table("file,label", "{name},{class}")
    assert open_with(text, SplitRequest("train"), name="train_labels.csv").description.split == "train"
    message = r"is train, by the name train, but the output's name \(val\)"
    refuses(message, open_with, text, SplitRequest("val"), name="train.csv")


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (str.upper, "no class for 12 of 12 images, first img_00.jpg; it names IMG_00.JPG, which differs in upper"),
        (lambda name: f"/data/{name}", "it names /data/img_00.jpg, which differs in its folder"),
        (lambda name: f"images\\{name}", r"it names images\\img_00.jpg, which differs in its folder"),
        (lambda name: name.replace("03", "99"), "names no class for 1 of 12 images, first img_03.jpg"),
    ],
)
def test_files_must_be_named_as_they_are(rename: Callable[[str], str], message: str, open_with: Open) -> None:
    refuses(message, open_with, "file,label\n" + "".join(f"{rename(name)},cat\n" for name in NAMES))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("img_50.jpg,cat\nimg_51.jpg,cat\n", "names 14 images, of which 2 do not exist: img_50.jpg, img_51.jpg"),
        ("img_00.jpg,dog\n", "img_00.jpg has two classes, cat and dog"),
        ("img_00,dog\n", "names 13 images, of which 1 do not exist: img_00"),
        (",dog\n", "line 14 should be <file>,<class>: it has no file"),
        ("img_00.jpg\n", "line 14 should be <file>,<class>: it has no class"),
        ("img_00.jpg,big, red\n", "line 14 has 3 columns, the first line 2; put a name that holds , in quotes"),
        ('img_00.jpg,"cat\n', "line 14 cannot be read .*is a quote not closed"),
        ('img_00.jpg,"c"at"\n', "line 14 cannot be read"),
        ('img_00.jpg,"' + "x" * 200_000 + '"\n', "line 14 has 200,014 characters"),
        ('img_00.jpg,"cat' + "\n" * 5_000 + '"\n', "line 14 cannot be .*more than 20 lines.*is a quote not closed"),
        ("a," * 100_000, "line 14 has 200,000 characters"),
        ("img_00.jpg,ca\0t\n", "line 14 holds a NUL character"),
    ],
)
def test_a_line_that_cannot_be_meant_is_refused_by_number(more: str, message: str, open_with: Open) -> None:
    refuses(message, open_with, table("file,label", "{name},cat") + more)


def test_duplicate_lines_are_noted(open_with: Open) -> None:
    assert open_with(table("file,label", "{name},{class}") + "img_00.jpg,cat0\n").notes == (
        "labels.csv: 1 duplicate line",
    )


@pytest.mark.parametrize("end", ["\n\n\n", "\n,\n", "\n  \n\t\n", "", "\r\n\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_files_of_all_editors_are_read(end: str, encoding: str, newline: str, open_with: Open) -> None:
    text = table("file,label", "{name},kätz{class}").strip().replace("\n", newline) + end
    assert label_names(open_with(text.encode(encoding))) == [f"kätz{name}" for name in ANIMALS]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("img_00.jpg,k\xe4tzchen\n".encode("latin-1"), "line 1 cannot be read as text .*save the file as UTF-8"),
        ("img_00.jpg,cat\n".encode("utf-16-le"), "line 1 holds a NUL character"),
        (b"\xff\xfe\0\0i\0\0\0", "NUL character"),
        (b"\x89PNG\r\n\x1a\n", "cannot be read as text"),
        (b"\n \n", "is empty"),
        (b"file,label\n", "has titles but no lines"),
        (b"img_00.jpg\n", "it has one column"),
        (b"img_00.jpg cat 1\nimg_01.jpg dog 2\n", "its lines have several values after the file"),
        (b'{"file": "img_00.jpg", "label": "cat"}', "looks like JSON; expected a table"),
    ],
)
def test_a_file_that_is_not_a_table_is_refused(data: bytes, message: str, open_with: Open) -> None:
    refuses(message, open_with, data)


def test_a_small_table_takes_little_memory(images: Path, tmp_path: Path, open_all_within: OpenAllWithin) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("".join(f"{name},cat\n" for name in NAMES))
    (outcome,) = open_all_within(160, [("image-folder", str(images), {"labels": str(table)})])
    assert outcome == f"read {NUM_IMAGES} of {NUM_IMAGES}"


def test_endless_and_odd_files_are_refused_at_once(images: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "huge.csv").touch()
    os.truncate(tmp_path / "huge.csv", 1 << 40)
    for path, message in [
        ("/dev/zero", "does not exist, or is not a file"),
        (tmp_path / "pipe", "does not exist, or is not a file"),
        (tmp_path / "none.txt", r"none\.txt: does not exist, or is not a file"),
        (tmp_path, "is a folder"),
        (tmp_path / "huge.csv", "has more than 268,435,456 bytes"),
    ]:
        refused(message, "image-folder", images, labels=path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20  # KiB


# --- any bytes --------------------------------------------------------------------------------------------------------

GOOD = table("file,label,split", lambda i: f'"cat {i % 3}",{"train" if i % 4 else "val"}').encode()
ODD = (
    b'"', b",", b"\n", b"\r", b"\0", b"\xff", b"\t", b";", b" ",
    b"-1", b"0.5", b"9" * 30, b"train", b"nan", b"\xef\xbb\xbf",
)  # fmt: skip
MANY = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def mutated(seed: int) -> bytes:
    draw = random.Random(seed)
    data = bytearray(GOOD)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        data[at : at + draw.choice((0, 0, 1, 3, 20))] = draw.choice((*ODD, bytes([draw.randrange(256)])))
    return bytes(data)


@given(
    st.integers(0, 10**9).map(mutated)
    | st.binary(max_size=200)
    | st.text(alphabet='img_0.jpg,;\t\n"\r -1 catrin', max_size=200).map(str.encode)
)
@example(b",")
@example(b'"')
@example(b" \n\x85\x1c,")
@settings(MANY, max_examples=120)
def test_any_bytes_are_a_table_or_refused(open_with: Open, data: bytes) -> None:
    for options in (
        {"label_column": "1"},
        {"class_order": "number"},
        {"split": named("train")},
        {"split": named("all")},
    ):
        try:
            source = open_with(data, **options)
        except UserError:
            continue
        assert 0 < len(source) <= NUM_IMAGES
        assert len(source.class_names) <= 1_000
        assert min(source.labels) >= 0
        assert max(source.labels) < len(source.class_names)


@given(st.one_of(st.binary(max_size=100), st.text(alphabet="abn0123 \n\r\0", max_size=100).map(str.encode)))
@MANY
def test_any_bytes_are_class_names_or_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "names").write_bytes(data)
    try:
        found = read_class_names(LocalPath(str(tmp_path / "names")))
    except UserError:
        return
    assert len(set(found)) == len(found) > 0
