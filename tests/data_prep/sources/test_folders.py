"""Folders are recognised as splits or classes, or refused; nothing in them is dropped silently."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.cli.inspect import show
from data_prep.converter.survey import survey
from data_prep.sources.base import Source
from data_prep.sources.files.listing import PackedStrings
from data_prep.sources.splits import ANY_SPLIT, SplitRequest
from tests.data_prep.sources.opening import keys_of, named, opened, refuses

Tree = Callable[..., Path]


def open_tree(root: Path, split: SplitRequest = ANY_SPLIT, **options: str) -> Source:
    return opened("image-folder", root, split, **options)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Files below a folder, their content their name: `tree("train/cat/1.jpg", ...)`."""

    def make(*names: str) -> Path:
        root = tmp_path / "data"
        for name in names:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(os.fsencode(name))
        return root

    return make


def both(first: str, second: str, wrap: str = "") -> list[str]:
    return [f"{wrap}{split}/{name}/1.jpg" for split in (first, second) for name in ("cat", "dog")]


# --- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "val"),
    [("Training Set", "Validation Set"), ("TRAIN", "Test"), ("train2017", "val2017"), ("cars_train", "cars_test")],
)
@pytest.mark.parametrize("wrap", ["", "dataset/", "images/"])
def test_split_folders_are_found_however_they_are_written(train: str, val: str, wrap: str, tree: Tree) -> None:
    root = tree(*both(train, val, wrap))
    for request, split in ((SplitRequest("train"), train), (SplitRequest("val"), val), (named(train.upper()), train)):
        source = open_tree(root, request)
        assert (source.class_names, source.description.split) == (("cat", "dog"), split)
        assert [source[i].data.decode() for i in range(2)] == [f"{wrap}{split}/{name}/1.jpg" for name in ("cat", "dog")]
    refuses("holds the splits .*; say which with --split", open_tree, root)


def test_folders_beside_splits_are_noted(tree: Tree) -> None:
    root = tree(*both("train", "val"), "extra/cat/1.jpg", "notes/readme.txt")
    assert open_tree(root, SplitRequest("train")).notes == ("left out, not splits: extra, notes",)
    assert open_tree(root, named("EXTRA")).description.split == "extra"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("train/1.jpg test/2.jpg", "test, train: splits by name, but without class folders.*--labels"),
        ("train/1.jpg", "train: splits by name"),
        ("trainA/1.jpg trainB/1.jpg testA/1.jpg testB/2.jpg", "testA, testB, trainA and 1 more: splits by name"),
        ("train/1.jpg test/1.jpg plane/1.jpg", "test, train: splits by name"),
        ("train/a/1.jpg car/1.jpg bus/1.jpg", "train may be a split or a class; say --split train"),
        ("train_station/in/1.jpg airport/in/1.jpg", "train_station may be a split or a class"),
        ("cat/train/1.jpg cat/val/1.jpg dog/train/1.jpg dog/val/1.jpg", "cat holds train, val: splits below a"),
        ("images/train/1.jpg images/val/1.jpg labels/train/1.txt", r"images holds train, val.*--input \S*/images;"),
        ("plants/fir/1.jpg plants/oak/1.jpg", r"one folder only, plants.*in fir, oak.*--input \S*/plants"),
        ("color/cat/1.jpg color/dog/1.jpg gray/cat/1.jpg", "color, gray each hold a folder cat.*--split color"),
        ("lernen/cat/1.jpg lernen/dog/1.jpg pruefen/cat/1.jpg", "lernen, pruefen each hold a folder cat"),
        ("cat/train/1.jpg dog/train/1.jpg", "cat holds train: splits below a class are not understood"),
        ("images/1.jpg images/2.jpg", "its only folder is images; expected one folder for each class"),
        ("JPEGImages/1.jpg", "its only folder is JPEGImages"),
    ],
)
def test_folders_that_are_not_clear_are_refused_with_a_way_out(files: str, message: str, tree: Tree) -> None:
    names = files.split()
    root = tree(*names)
    refuses(rf"{root}: .*{message}.*--folders-are classes takes each folder as a class", open_tree, root)
    if all(name.endswith(".jpg") for name in names):
        assert sorted(keys_of(open_tree(root, folders_are="classes"))) == sorted(names)


def test_folders_are_splits_if_the_user_says_so(tree: Tree) -> None:
    root = tree(*both("color", "gray"), "car/1.jpg")
    assert open_tree(root, named("gray"), folders_are="splits").class_names == ("cat", "dog")
    assert open_tree(root, named("Gray")).description.split == "gray"
    refuses("holds the splits color, gray; say which", open_tree, root, folders_are="splits")
    refuses("--folders-are shapes: expected one of classes, splits", open_tree, root, folders_are="shapes")


@pytest.mark.parametrize(
    "files",
    [
        "train/1.jpg car/1.jpg bus/1.jpg",
        "train_station/1.jpg airport/1.jpg bus_station/2.jpg",
        "cat/indoor/1.jpg cat/2.jpg dog/outdoor/2.jpg",
        "cat/2020/1.jpg dog/2021/1.jpg emu/2022/1.jpg",
        "cat/images/1.jpg dog/images/1.jpg emu/images/1.jpg",
    ],
)
def test_classes_stay_classes(files: str, tree: Tree) -> None:
    names = files.split()
    source = open_tree(tree(*names))
    assert source.class_names == tuple(sorted({name.partition("/")[0] for name in names}))
    assert len(source) == len(names)


def test_a_split_that_is_not_there_is_refused_with_what_there_is(tree: Tree) -> None:
    root = tree("cat/1.jpg", "dog/1.jpg")
    refuses(r"--split Cat: \S*/cat holds no class folders: it is a class, not a split", open_tree, root, named("Cat"))
    refuses(r"--split vali: .* its folders \(cat, dog\) are classes; --split all", open_tree, root, named("vali"))
    assert len(open_tree(root, named("ALL"))) == 2
    split = tree(*both("train", "val"))
    refuses("holds the splits train, val, none of which is what --split vali asks", open_tree, split, named("vali"))


def test_an_ambiguous_shape_is_reported_before_the_split(tree: Tree) -> None:
    root = tree(*both("color", "gray"))
    refuses("color, gray each hold a folder cat.*--split color", open_tree, root, SplitRequest("train"))
    assert open_tree(root, named("gray")).description.split == "gray"
    tree("../more/data/train/a/1.jpg", "../more/data/test/1.jpg")
    message = r"data \(beside test, without class folders\): holds the splits train, none of"
    refuses(message, open_tree, root.parent / "more/data", SplitRequest("test"))


def test_the_folder_given_may_be_the_split(tree: Tree) -> None:
    root = tree(*both("train", "images/val"))
    for folder, request in (("train", "train"), ("images/val", "val"), ("images/val", "dev")):
        assert len(open_tree(root / folder, SplitRequest(request))) == 2
    message = r"is train, by the name train, but the output's name \(val\) asks for another"
    refuses(message, open_tree, root / "train", SplitRequest("val"))


def test_splits_with_other_classes_are_noted(tree: Tree) -> None:
    root = tree("train/ant/a.jpg", "train/bee/a.jpg", "train/cow/a.jpg", "val/ant/a.jpg", "val/cow/a.jpg")
    for split, other in (("val", "train"), ("train", "val")):
        note = f"{other} has other classes, so other labels: bee is not in both"
        assert open_tree(root, named(split)).description.label_checks == [note]
    (root / "train/bee").rename(root / "bee")
    assert open_tree(root, named("train")).description.label_checks == []


# --- what is left out -------------------------------------------------------------------------------------------------


def test_files_left_out_are_noted_by_suffix_and_name(tree: Tree) -> None:
    root = tree(
        *("cat/1.JPG", "cat/2.heic", "cat/3.HEIC", "cat/IMG_4", "cat/notes.txt", "cat/._1.JPG", "cat/.5.jpg"),
        *("cat/.cache/6.jpg", ".old/cat/7.jpg", ".top.jpg", "dog/1.Jpeg", "8.png"),
    )
    assert open_tree(root).notes == (
        "1 image skipped, in no class folder: 8.png",
        "4 files skipped, not an image suffix (.heic 2, no suffix 1, .txt 1): cat/2.heic, cat/3.HEIC, cat/IMG_4 and 1 "
        "more; .heic are not read: convert such images to JPEG or PNG first, or install pillow-heif for HEIC",
        "4 hidden files or folders skipped: .old, .top.jpg, cat/.5.jpg and 1 more",
    )
    assert keys_of(open_tree(root)) == ["cat/1.JPG", "dog/1.Jpeg"]


def test_odd_class_folders_are_noted_or_refused(tree: Tree) -> None:
    note = "there is only one class, cat: a model has nothing to tell apart"
    assert open_tree(tree("cat/1.jpg")).notes == (note,)
    note = "two classes have nearly the same name: 'Cat' and 'cat'"
    assert open_tree(tree("Cat/1.jpg", "dog/1.jpg")).notes == (note,)
    root = tree("emu/1.heic", "emu/2.jxl")
    message = r"/emu: this class folder holds no images but 1.heic, 2.jxl \(.heic and .jxl are not read: convert"
    refuses(message, open_tree, root)
    (root / "ant").mkdir()
    refuses("ant: this class folder holds no images; fill or remove it", open_tree, root)
    refuses("is not a folder", open_tree, root / "none")
    refuses("holds no class folders; expected dog/<class>/<image files>", open_tree, root / "dog")


def test_links_are_followed_and_never_for_ever(tree: Tree) -> None:
    root = tree("cat/1.jpg", "dog/1.jpg", "../elsewhere/2.jpg")
    (root / "cat/more").symlink_to(root.parent / "elsewhere")
    (root / "cat/self.jpg").symlink_to("self.jpg")
    (root / "cat/self").symlink_to("self")
    (root / "cat/gone.jpg").symlink_to("nothing")
    source = open_tree(root)
    assert keys_of(source) == ["cat/1.jpg", "cat/gone.jpg", "cat/more/2.jpg", "cat/self.jpg", "dog/1.jpg"]
    for index in (1, 3):
        with pytest.raises(OSError, match="is not a file, nor a link to one"):
            source[index]
    (root / "dog/up").symlink_to("..")
    refuses("dog/up: is a link to a folder that it is in, .*data; remove the link", open_tree, root)
    (root / "dog/up").unlink()
    (root / "cat/d").symlink_to(root / "dog")
    (root / "dog/c").symlink_to(root / "cat")
    refuses("is a link to a folder that it is in", open_tree, root)


def test_folders_within_folders_have_no_limit(tree: Tree) -> None:
    deep = "d/" * 1_200
    root = tree("cat/1.jpg", "dog/1.jpg")
    folder = os.open(root / "cat", os.O_RDONLY)
    for _ in deep.split("/")[:-1]:
        os.mkdir("d", dir_fd=folder)  # below a descriptor: the whole path is too long for one call
        inner = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(os.open("1.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
    os.close(folder)
    keys = keys_of(open_tree(root))
    subprocess.run(["rm", "-r", root], check=True, timeout=60)  # pytest's own way is recursive, and so ends at 1,000
    assert keys == ["cat/1.jpg", f"cat/{deep}1.jpg", "dog/1.jpg"]


def test_odd_names_do_not_reach_the_terminal(tree: Tree) -> None:
    odd = "x\t\x1b[31m\n\udce9.jpg"
    source = open_tree(tree(f"c\x1bat/{odd}", "dog/1.jpg"))
    assert source.key(0) == f"c\x1bat/{odd}"
    text = io.StringIO()
    show(survey(source, 5, on_header=lambda *_: None), text)
    assert r"c\x1bat/x\t\x1b[31m\n\udce9.jpg" in text.getvalue()
    assert "\x1b" not in text.getvalue()
    text.getvalue().encode()


# --- listings ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=20).filter(lambda name: b"\0" not in name)))
def test_packed_strings_keep_any_file_names(raw: list[bytes]) -> None:
    names = [os.fsdecode(name) for name in raw]
    packed = pickle.loads(pickle.dumps(PackedStrings(names)))
    assert list(packed) == names
    assert len(packed) == len(names)


def test_image_folder_reads_classes_in_text_order(image_tree: Path) -> None:
    (image_tree / "dog" / "puppies").mkdir()
    (image_tree / "dog" / "puppies" / "9.png").write_bytes(b"pixels")
    (image_tree / "dog" / "notes.txt").write_text("no image")
    source = pickle.loads(pickle.dumps(open_tree(image_tree)))
    assert source.class_names == ("cat", "dog", "emu")
    keys = ["cat/0.JPEG", "cat/1.JPEG", "dog/0.JPEG", "dog/1.JPEG", "dog/puppies/9.png", "emu/0.JPEG", "emu/1.JPEG"]
    assert [source[i].key for i in range(7)] == keys == keys_of(source)
    assert [source[i].label for i in range(7)] == [0, 0, 1, 1, 1, 2, 2]
    assert (source[4].data, source[6].data) == (b"pixels", (image_tree / "emu/1.JPEG").read_bytes())
    assert source.description.num_left_out == 1


def test_image_folder_identity_survives_a_copy_and_notices_changes(image_tree: Path, tmp_path: Path) -> None:
    first = open_tree(image_tree).description
    copy = tmp_path / "copy"
    shutil.copytree(image_tree, copy)
    os.utime(copy / "cat" / "0.JPEG", ns=(1, 1))
    second = open_tree(copy).description
    assert first.identity == second.identity
    assert first.state != second.state
    (copy / "cat" / "0.JPEG").write_bytes(b"longer or shorter")
    assert open_tree(copy).description.identity != first.identity
    (image_tree / "cat").rename(image_tree / "bat")
    assert open_tree(image_tree).description.identity != first.identity
