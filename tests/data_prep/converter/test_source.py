"""A given list of classes makes labels mean the same in every split, for every source."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.converter.output import open_output
from data_prep.converter.source import class_notes, open_named, read_class_list, sibling_betons
from data_prep.errors import UserError
from data_prep.sources import SourceOptions
from data_prep.sources.base import Source
from data_prep.sources.datasets.builtin import Digits
from data_prep.sources.file_source import FileSource, with_classes
from data_prep.sources.splits import ANY_SPLIT, SplitRequest

NAMES = ("emu", "cat", "owl", "dog")


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    path = tmp_path / "classes.txt"
    path.write_text("\n".join(NAMES) + "\n")
    return path


def open_as(source: str, location: Path, classes: Path, split: SplitRequest = ANY_SPLIT, **options: str) -> Source:
    return open_named(source, str(location), split, SourceOptions(**options), str(classes))


def test_a_folder_has_the_classes_listed_in_their_order(image_tree: Path, listed: Path) -> None:
    source = pickle.loads(pickle.dumps(open_as("image-folder", image_tree, listed)))
    assert source.class_names == NAMES
    assert [(source.key(i), source[i].label, int(source.labels[i])) for i in range(6)] == [
        *(("cat/0.JPEG", 1, 1), ("cat/1.JPEG", 1, 1)),
        *(("dog/0.JPEG", 3, 3), ("dog/1.JPEG", 3, 3)),
        *(("emu/0.JPEG", 0, 0), ("emu/1.JPEG", 0, 0)),
    ]
    assert source.notes == (f"1 of the 4 classes of {listed} have no images here: owl",)
    assert isinstance(source, FileSource)
    data = bytearray(int(source.sizes[4]))  # type: ignore[index]
    source.read_into([4], memoryview(data))
    assert data == (image_tree / "emu/0.JPEG").read_bytes()
    plain = open_named("image-folder", str(image_tree), ANY_SPLIT, SourceOptions())
    assert source.description.identity != plain.description.identity
    listed.write_text("cat\ndog\nemu\n")
    assert open_as("image-folder", image_tree, listed).description == plain.description


def test_a_class_folder_may_be_empty_and_its_name_odd_when_listed(image_tree: Path, listed: Path) -> None:
    (image_tree / "owl").mkdir()
    assert "classes without images: owl" in open_as("image-folder", image_tree, listed).notes
    for old, new in zip(("cat", "dog", "emu"), ("0", "10", "2"), strict=True):
        (image_tree / old).rename(image_tree / new)
    (image_tree / "owl").rename(image_tree / "-1")
    listed.write_text("0\n1\n2\n10\n-1\n")
    source = open_as("image-folder", image_tree, listed)
    assert (source.class_names, source.labels.tolist()) == (("0", "1", "2", "10", "-1"), [0, 0, 3, 3, 2, 2])


def test_a_class_that_is_not_listed_is_refused_by_name(image_tree: Path, listed: Path) -> None:
    listed.write_text("cat\nemu\n")
    with pytest.raises(
        UserError, match=rf"{image_tree}: has images of dog, which {listed} does not list; add the name"
    ):
        open_as("image-folder", image_tree, listed)
    with pytest.raises(UserError, match="--class-order and --classes: both give the order"):
        open_as("image-folder", image_tree, listed, class_order="text")
    listed.write_text("cat\nDOG\nemu\n")
    with pytest.raises(UserError, match=r"dog, which .* \(it lists 'DOG', and names must be exactly the same\)"):
        open_as("image-folder", image_tree, listed)


def test_classes_that_are_not_listed_are_left_out_on_request(
    image_tree: Path, listed: Path, tmp_path: Path, tar_of: Callable[[dict[str, bytes]], bytes]
) -> None:
    listed.write_text("emu\t1\ncat\t0\n")
    source = open_named("image-folder", str(image_tree), ANY_SPLIT, SourceOptions(), str(listed), skip_unlisted=True)
    source = pickle.loads(pickle.dumps(source))
    assert source.class_names == ("cat", "emu")
    assert [(source.key(i), source[i].label) for i in range(len(source))] == [
        *(("cat/0.JPEG", 0), ("cat/1.JPEG", 0)),
        *(("emu/0.JPEG", 1), ("emu/1.JPEG", 1)),
    ]
    assert source.notes == (f"2 images of 1 class left out, which {listed} does not list: dog",)
    assert source.description.selected == {"unlisted": {"classes": 1, "samples": 2}}
    assert isinstance(source, FileSource)
    data = bytearray(int(source.sizes[3]))
    source.read_into([3], memoryview(data))
    assert data == source.read(3) == (image_tree / "emu/1.JPEG").read_bytes()
    assert source.ends([3]).num_bytes.tolist() == [len(data)]

    (tmp_path / "0.tar").write_bytes(
        tar_of({f"{n}{end}": text for n in range(4) for end, text in ((".jpg", b"%d" % n), (".cls", b"%d" % n))})
    )
    listed.write_text("3\n1\n")
    source = open_named(
        "webdataset", str(tmp_path / "0.tar"), ANY_SPLIT, SourceOptions(), str(listed), skip_unlisted=True
    )
    assert [(s.key, s.data, s.label) for s in map(source.__getitem__, range(2))] == [
        ("0.tar/1", b"1", 1),
        ("0.tar/3", b"3", 0),
    ]
    source = open_named("digits", None, ANY_SPLIT, SourceOptions(), str(listed), skip_unlisted=True)
    assert (source.class_names, len(source), source[0].key) == (("3", "1"), 365, "digit-0001")
    listed.write_text("x\n")
    with pytest.raises(UserError, match=r"scikit-learn: none of its classes \(0, 1, 2 and 7 more\) is listed in"):
        open_named("digits", None, ANY_SPLIT, SourceOptions(), str(listed), skip_unlisted=True)
    with pytest.raises(UserError, match="--skip-unlisted leaves out what --classes FILE does not list; add that"):
        open_named("digits", None, ANY_SPLIT, SourceOptions(), skip_unlisted=True)


def test_a_source_with_words_for_wnids_takes_a_list_of_wnids() -> None:
    source = Digits("all")
    wnids = tuple(f"n{number:08d}" for number in range(10))
    source.class_names = (*(f"word {number}" for number in range(8)), "crane", "crane")
    source.description.label_map.update({wnid: label for label, wnid in enumerate(wnids)})
    assert with_classes(source, wnids[::-1], "LIST").labels[:3].tolist() == [9, 8, 7]
    with pytest.raises(UserError, match="scikit-learn: crane is the name of two classes here; list wnids in LIST"):
        with_classes(source, (*source.class_names[:8], "crane", "more"), "LIST")
    with pytest.raises(UserError, match="LIST: crane is the name of two classes; list wnids, or rename one"):
        with_classes(source, (*source.class_names, "more"), "LIST")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("\ufeffemu\t1\r\n\r\n  cat \t 0 \r\n", ("cat", "emu")),
        ("hot dog, grilled\nemu\n", ("hot dog, grilled", "emu")),
        ("n02084071 1\nn01440764 0\n", ("n01440764", "n02084071")),
        ("n01440764\ttench, Tinca tinca\nn02084071\tdog\n", ("n01440764", "n02084071")),
        ("n01440764 tench\t1\nn02084071 dog\t0\n", ("n02084071", "n01440764")),
        ("emu\t0\ncat\t0\n", "label 0 is in line 1 and in line 2"),
        ("emu\t0\ncat\t2\n", r"no class has label 1; expected each of 0..1 once"),
        ("emu\t1\ncat\t2\n", r"no class has label 0: they count from 1"),
        ("emu\t0\ncat\n", "line 2 is cat; expected a class, and after a tab its label in every line or in none"),
        ("emu\tbird\ncat\tmammal\n", "line 1 is emu.tbird; expected a class, and after a tab its label"),
        ("0\temu\n1\tcat\n", "line 1 is 0.temu; expected a class, and after a tab its label"),
        ("emu,0\ncat,1\n", "line 1 is emu,0: a class and its label are separated by a tab, the class first"),
        ("1,emu\n2,cat\n", "line 1 is 1,emu: a class and its label are separated by a tab, the class first"),
        ("\n \n", "is empty; expected one class name per line"),
    ],
)
def test_lists_of_classes_give_their_order_by_lines_or_by_labels(
    tmp_path: Path, text: str, names: tuple[str, ...] | str
) -> None:
    (tmp_path / "list").write_text(text, newline="")
    if isinstance(names, tuple):
        assert read_class_list(str(tmp_path / "list")) == names
    else:
        with pytest.raises(UserError, match=names):
            read_class_list(str(tmp_path / "list"))


def test_a_table_of_labels_has_the_classes_listed(image_tree: Path, listed: Path, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    images = sorted(str(path.relative_to(image_tree)) for path in image_tree.rglob("*.JPEG"))
    table.write_text("\n".join(f"{name},{label}" for name, label in zip(images, [1, 3, 1, 3, 1, 3], strict=True)))
    listed.write_text("0\n1\n2\n3\n")
    source = open_as("image-folder", image_tree, listed, labels=str(table))
    assert (source.class_names, source.labels.tolist()) == (("0", "1", "2", "3"), [1, 3, 1, 3, 1, 3])
    table.write_text(
        "\n".join(f"{name},{label}" for name, label in zip(images, ["-1", "0 3", "0", "1", "2", "-1"], strict=True))
    )
    listed.write_text("-1\n0\n0 3\n1\n2\n")
    assert open_as("image-folder", image_tree, listed, labels=str(table)).labels.tolist() == [0, 2, 1, 3, 4, 0]


def test_other_sources_have_the_classes_listed(tmp_path: Path, tar_of: Callable[[dict[str, bytes]], bytes]) -> None:
    (tmp_path / "0.tar").write_bytes(tar_of({"a.jpg": b"1", "a.cls": b"2", "b.jpg": b"2", "b.cls": b"0"}))
    (tmp_path / "names").write_text("".join(f"{n}\n" for n in range(5)))
    source = open_as("webdataset", tmp_path / "0.tar", tmp_path / "names")
    assert (source.class_names, source.labels.tolist()) == (("0", "1", "2", "3", "4"), [2, 0])
    (tmp_path / "names").write_text("2\n1\n0\n")
    assert open_as("webdataset", tmp_path / "0.tar", tmp_path / "names").labels.tolist() == [0, 2]


def test_a_list_is_text_or_a_beton(tmp_path: Path, convert_here) -> None:
    convert_here("synthetic", "n=5,classes=4", tmp_path / "a.beton")
    expected = ("class-0", "class-1", "class-2", "class-3")
    assert read_class_list(str(tmp_path / "a.beton")) == read_class_list(str(tmp_path / "a.manifest.json")) == expected
    (tmp_path / "odd.json").write_text("[" * 50)
    (tmp_path / "twice").write_text("a\nb\na\n")
    (tmp_path / "long").write_text("a" * 5000)
    for name, message in [
        ("none", "does not exist, or is not a file"),
        ("none.beton", r"none\.manifest\.json: does not exist"),
        ("odd.json", "odd.json: "),
        ("twice", "a is in line 1 and in line 3; expected one class name per line"),
        ("long", "line 1 has 5,000 characters"),
    ]:
        with pytest.raises(UserError, match=message):
            read_class_list(str(tmp_path / name))


@pytest.mark.parametrize(
    ("beton", "siblings"),
    [
        ("o/val.beton", ["train", "training", "validation", "test"]),
        ("o/cars_train_v2.beton", ["cars_training_v2", "cars_val_v2", "cars_validation_v2", "cars_test_v2"]),
        ("o/trainval.beton", []),
        ("o/all.beton", []),
    ],
)
def test_siblings_differ_in_their_split(beton: str, siblings: list[str]) -> None:
    assert sibling_betons(beton) == [f"o/{name}.beton" for name in siblings]


def test_classes_other_than_the_training_sets_are_refused(tmp_path: Path, convert_here) -> None:
    convert_here("synthetic", "n=5,classes=4", tmp_path / "train.beton")
    names = [f"class-{number}" for number in range(4)]
    train, val = (open_output(tmp_path / f"{split}.beton") for split in ("train", "val"))
    assert class_notes(names, val) == []
    for other in (names[:3], names[::-1]):
        with pytest.raises(
            UserError, match=rf"val.beton: would have other classes.*say --classes {tmp_path}/train.beton"
        ):
            class_notes(other, val)
    (tmp_path / "train.manifest.json").rename(tmp_path / "val.manifest.json")
    (tmp_path / "train.beton").unlink()
    notes = class_notes(names[::-1], train)
    assert len(notes) == 1
    assert notes[0].endswith(f"convert {val.shown} again, with --classes {tmp_path}/train.beton")
    (tmp_path / "val.manifest.json").write_text("{}")
    assert class_notes(names[::-1], train) == []
