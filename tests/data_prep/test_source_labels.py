"""Labels are proved or refused: known facts of ImageNet, numbers sorted as text, label files."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.sources import SourceOptions, open_source
from data_prep.sources.imagenet import check_labels, label_map
from data_prep.sources.labels import are_numbered, notes_on_order, order_classes
from data_prep.sources.splits import SplitRequest

ANY = SplitRequest(None, explicit=False)


def wnids() -> list[str]:
    """1,000 made-up wnids with ImageNet's known ones in their places."""
    low = [f"n{1440764 + i:08d}" for i in range(65)]
    middle = [f"n{1751748 + i:08d}" for i in range(934)]
    return [*low, *middle, "n15075141"]


def val_names() -> list[str]:
    """50,000 names, of which the first is of label 65."""
    return [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 50_001)]


def val_labels() -> np.ndarray:
    labels = np.arange(50_000) % 1000
    labels[[0, 65]] = labels[[65, 0]]
    return labels


# --- ImageNet's facts -------------------------------------------------------------------------------------------------


def test_imagenets_known_facts_are_checked() -> None:
    checks = check_labels(label_map(wnids()), val_labels(), val_names(), "here")
    assert checks == [
        "label 0 is n01440764",
        "label 65 is n01751748",
        "label 999 is n15075141",
        "but not all 1,000 wnids are those of ILSVRC2012",
        "ILSVRC2012_val_00000001 is n01751748",
        "50 validation images in each class",
    ]


def test_fewer_or_other_classes_are_no_imagenet() -> None:
    assert check_labels(label_map(wnids()[:999]), np.zeros(1, dtype=np.int64), ["a"], "here") == []
    others = label_map([f"n{i:08d}" for i in range(1000)])
    assert check_labels(others, np.zeros(1, dtype=np.int64), ["a"], "here") == [
        "1,000 wnids, none of which is known of ILSVRC2012: another set of classes"
    ]


def test_contradicted_facts_are_refused() -> None:
    names = wnids()
    swapped = label_map([*names[1:], names[0]])
    with pytest.raises(UserError, match=r"here: .* n01440764 should be label 0, here it is 999"):
        check_labels(swapped, val_labels(), val_names(), "here")
    missing = label_map([*names[:999], "n99999999"])
    with pytest.raises(UserError, match="n15075141 should be label 999, here it is none"):
        check_labels(missing, val_labels(), val_names(), "here")
    with pytest.raises(
        UserError, match=r"ILSVRC2012_val_00000001 should be n01751748 \(label 65\), here it has label 0"
    ):
        check_labels(label_map(names), np.arange(50_000) % 1000, val_names(), "here")
    uneven = val_labels()
    uneven[1] = 2
    with pytest.raises(UserError, match="each class should have 50 of the 50,000 validation images, label 1 has 49"):
        check_labels(label_map(names), uneven, val_names(), "here")


def test_a_tree_with_a_renamed_imagenet_class_is_refused(tmp_path: Path) -> None:
    for wnid in wnids():
        (tmp_path / wnid).mkdir()
        (tmp_path / wnid / "a.JPEG").write_bytes(b"1")
    source = open_source("image-folder", str(tmp_path), ANY)
    described = source.describe()
    assert described.label_map == label_map(wnids())
    assert described.label_checks[:3] == ["label 0 is n01440764", "label 65 is n01751748", "label 999 is n15075141"]
    (tmp_path / "n01440764").rename(tmp_path / "n16000000")
    with pytest.raises(UserError, match="n01440764 should be label 0, here it is none"):
        open_source("image-folder", str(tmp_path), ANY)


# --- the order of classes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "order", "expected"),
    [
        (["b", "a"], None, ["a", "b"]),
        (["2", "0", "1"], None, ["0", "1", "2"]),
        (["02", "10", "01"], None, ["01", "02", "10"]),
        (["10", "2", "1"], "number", ["1", "2", "10"]),
        (["10", "2", "1"], "text", ["1", "10", "2"]),
        (["class-10", "class-9"], "number", ["class-9", "class-10"]),
        (["10 cats", "9 dogs"], None, ["10 cats", "9 dogs"]),
        (["a", "10", "2"], "number", ["2", "10", "a"]),
        (["10 cats", "9 dogs"], "number", ["9 dogs", "10 cats"]),
        (["-1", "0", "10", "2"], "number", ["-1", "0", "2", "10"]),
        (["10.0", "2.0", "0.5"], "number", ["0.5", "2.0", "10.0"]),
        (["bird2", "dog1", "cat0"], "number", ["cat0", "dog1", "bird2"]),
        (["001.owl", "010.emu", "002.kiwi"], None, ["001.owl", "002.kiwi", "010.emu"]),
    ],
)
def test_order_classes(names: list[str], order: str | None, expected: list[str]) -> None:
    assert list(order_classes(names, order, "here")) == expected


@pytest.mark.parametrize("pattern", ["{}", "class_{}", "{}-x", "{}.0", "v{}.x"])
def test_numbers_sorted_as_text_are_refused(pattern: str) -> None:
    names = [pattern.format(number) for number in range(11)]
    with pytest.raises(UserError, match=r"sorted as text label 2 would be .*10.*, not .*2.*; say --class-order number"):
        order_classes(names, None, "here")


@pytest.mark.parametrize(
    ("names", "first", "second"),
    [
        ([*map(str, range(11)), "background"], "10", "2"),
        (["0.0", "1.0", "10.0", "2.0"], "10.0", "2.0"),
        (["01", "02", "3", "10"], "10", "3"),
        (["class1", "class2", "class10", "other"], "class10", "class2"),
        ([f"{n}_{name}" for n, name in enumerate("abcdefghijkl")], "10_k", "1_b"),
        (["cat0", "dog1", "bird2"], "bird2", "cat0"),
        (["1-2", "1-10", "1-1"], "1-10", "1-2"),
        ([f"{kind}{n}" for kind in ("bus", "train") for n in (1, 2, 10)], "bus10", "bus2"),
    ],
)
def test_numbers_that_mean_an_order_are_not_sorted_as_text(names: list[str], first: str, second: str) -> None:
    with pytest.raises(UserError, match=f"would be {first}, not {second}; say --class-order number .* --classes FILE"):
        order_classes(names, None, "here")
    for order in ("number", "text"):
        assert sorted(order_classes(names, order, "here")) == sorted(names)
    by_number = order_classes(names, "number", "here")
    assert by_number.index(second) < by_number.index(first)


@pytest.mark.parametrize("names", [["-1", "0", "1"], ["-1", "cat", "dog"], ["-1.0", "0.0"]])
def test_a_class_that_marks_hidden_labels_is_asked_about(names: list[str]) -> None:
    with pytest.raises(
        UserError, match=rf"here: one class is {names[0]}, which marks hidden labels.*--class-order number"
    ):
        order_classes(names, None, "here")
    assert order_classes(names, "number", "here")[0] == names[0]


def test_names_with_numbers_that_mean_no_order() -> None:
    cars = ["Audi 100 Sedan 1994", "Audi 80", "BMW 3 Series 2012", "Fiat 500", "Volvo 240", "VW Golf"]
    assert order_classes(cars, None, "here") == tuple(sorted(cars))
    assert notes_on_order(sorted(cars)) == ["classes are sorted as text: Audi 100 Sedan 1994 comes before Audi 80"]
    assert notes_on_order(["cat", "dog2"]) == []
    assert not are_numbered(["cat", "dog2"])
    assert are_numbered(["1", "2", "other"])
    with pytest.raises(UserError, match="--class-order number needs classes named by numbers, here is a"):
        order_classes(["b", "a"], "number", "here")


@given(st.lists(st.text(alphabet="ab01-._ ٣²", max_size=6), unique=True, min_size=1, max_size=8))
@settings(max_examples=100)
def test_any_names_have_an_order_by_number(names: list[str]) -> None:
    for order in ("number", "text", None):
        try:
            assert sorted(order_classes(names, order, "here")) == sorted(names)
        except UserError:
            assert order != "text"


def test_a_tree_of_numbered_folders(tmp_path: Path) -> None:
    for number in range(11):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "a.jpg").write_bytes(b"%d" % number)
    with pytest.raises(UserError, match="sorted as text label 2 would be 10, not 2"):
        open_source("image-folder", str(tmp_path), ANY)
    by_number = open_source("image-folder", str(tmp_path), ANY, SourceOptions(class_order="number"))
    assert [(by_number[i].label, by_number[i].data) for i in range(11)] == [(i, b"%d" % i) for i in range(11)]
    by_text = open_source("image-folder", str(tmp_path), ANY, SourceOptions(class_order="text"))
    assert by_text.class_names == ("0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9")
    with pytest.raises(UserError, match="--class-order digits: expected one of text, number"):
        open_source("image-folder", str(tmp_path), ANY, SourceOptions(class_order="digits"))


# --- label files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    root = tmp_path / "flat"
    (root / "more").mkdir(parents=True)
    for name in ("b.jpg", "a.jpg", "more/c.png"):
        (root / name).write_bytes(name.encode())
    (root / "readme.txt").write_text("no image")
    return root


def open_flat(root: Path, lines: str, class_order: str | None = None, split: SplitRequest = ANY):  # type: ignore[no-untyped-def]
    labels = root.parent / "labels.txt"
    labels.write_text(lines)
    return open_source("image-folder", str(root), split, SourceOptions(labels=str(labels), class_order=class_order))


@pytest.mark.parametrize(
    "lines",
    [
        "a.jpg,emu\nb.jpg,cat\nmore/c.png,red dog\n",
        "file,class\nb.jpg,cat\nmore/c.png,red dog\na.jpg,emu\n",
        "\ufeffa.jpg\temu\r\nb.jpg\tcat\r\nmore/c.png\tred dog\r\n",
        "a.jpg emu\nb.jpg cat\n\nmore/c.png red dog\n",
        "a,emu\nb,cat\nmore/c,red dog\n",
    ],
)
def test_a_flat_folder_with_a_label_file(flat: Path, lines: str) -> None:
    source = pickle.loads(pickle.dumps(open_flat(flat, lines)))
    assert source.class_names == ("cat", "emu", "red dog")
    expected = [("a.jpg", 1), ("b.jpg", 0), ("more/c.png", 2)]
    assert [(source[i].key, source[i].label) for i in range(3)] == expected
    assert source[2].data == b"more/c.png"
    assert source.describe().num_left_out == 1


def test_kaggles_solution_file_is_a_label_file(flat: Path) -> None:
    rows = (
        "ImageId,PredictionString",
        "a,n02000002 1 2 3 4 n02000002 5 6 7 8 ",
        "b,n01000001 1 2 3 4 ",
        "more/c,n02000002",
    )
    lines = "\n".join(rows)
    source = open_flat(flat, lines)
    assert (source.class_names, source.labels.tolist()) == (("n01000001", "n02000002"), [1, 0, 1])


def test_numbers_in_a_label_file_are_the_labels(flat: Path) -> None:
    source = open_flat(flat, "a.jpg 10\nb.jpg 0\nmore/c.png 2\n")
    assert (source.class_names, source.labels.tolist()) == (tuple(map(str, range(11))), [10, 0, 2])
    with pytest.raises(
        UserError, match="labels are numbers from 1, expected from 0; if they are classes, say --class-order"
    ):
        open_flat(flat, "a.jpg 10\nb.jpg 1\nmore/c.png 2\n")
    counted = open_flat(flat, "a.jpg 10\nb.jpg 1\nmore/c.png 2\n", "number")
    assert (counted.class_names, counted.labels.tolist()) == (("1", "2", "10"), [2, 0, 1])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "is empty"),
        ("a.jpg,1\nb.jpg,1\n", "names no class for 1 of 3 images, first more/c.png"),
        ("a.jpg,x\nb.jpg,x\nmore/c.png,x\nd.jpg,x\n", "names 4 images, of which 1 do not exist: d.jpg"),
        ("a.jpg,x\nb.jpg\n", "line 2 should be <file>,<class>"),
        ("file,class\na.jpg,\n", "line 2 should be"),
        ("a.jpg,x\na.jpg,y\n", "a.jpg has two classes, x and y"),
    ],
)
def test_label_file_mistakes(flat: Path, lines: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"labels\.txt: .*{message}"):
        open_flat(flat, lines)


def test_label_file_and_split(flat: Path, tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    flat.rename(tmp_path / "both" / "val")
    source = open_flat(tmp_path / "both", "a,1\nb,0\nmore/c,0\n", split=SplitRequest("val", explicit=False))
    assert (source.describe().split, source.key(0)) == ("val", "a.jpg")
    with pytest.raises(UserError, match=r"none\.txt: does not exist, or is no file"):
        open_source("image-folder", str(tmp_path / "both"), ANY, SourceOptions(labels=str(tmp_path / "none.txt")))
