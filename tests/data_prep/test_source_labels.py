"""Labels: what counts as a label, the order of classes, and ImageNet's known facts, confirmed or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.sources import SourceOptions, open_source
from data_prep.sources.imagenet import check_labels, label_map
from data_prep.sources.labels import (
    MAX_CLASSES,
    Label,
    are_numbered,
    digits_label,
    exact_label,
    notes_on_order,
    number_classes,
    order_classes,
)

# --- what a label is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (0, 0),
        (999_999, 999_999),
        ("3", 3),
        (" 12\n", 12),
        ("cat", "cat"),
        ("00", "00"),
        ("10", 10),
        ("007", "007"),  # not the 7 that it would be to int()
        ("1_0", "1_0"),
        ("٣", "٣"),  # an Arabic digit, which int() reads
        ("1e3", "1e3"),
        ("1.2.3", "1.2.3"),
        ("none", "none"),
        ("Crêpe, salée", "Crêpe, salée"),
    ],
)
def test_a_label_is_a_whole_number_or_a_text(value: object, label: Label) -> None:
    assert exact_label(value) == label
    assert type(exact_label(value)) is type(label)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (True, "the label is True, a bool; expected a whole number from 0 or the name of a class"),
        (0.33, r"is 0\.33, a float"),
        (3.0, r"is 3\.0, a float"),
        (float("inf"), "is inf, a float"),
        (float("nan"), "is nan, a float"),
        (None, "the label is missing"),
        ([1], r"is \[1\], a list"),
        ({"a": 1}, "a dict"),
        (b"3", "a bytes"),
        (-1, "is -1; hidden test labels are -1: choose another split"),
        (MAX_CLASSES, "is 1000000; expected the number of a class, below 1,000,000"),
        pytest.param(10**5000, "more than 64 bits", id="5,001 digits"),
        ("9" * 5000, "has 5,000 digits"),
        ("9999999999", "is 9999999999; expected the number of a class"),
        ("-1", "hidden labels"),
        ("+3", "expected a whole number"),
        ("0.33", "regression"),
        (".5", "regression"),
        ("1.0e-3", "regression"),
        ("", "the label is missing"),
        (" \n", "the label is missing"),
        ("NaN", r"the label is missing \(NaN\)"),
        ("cat\ndog", "expected one line with the name of one class"),
        ("\x1b[31mcat", r"\\x1b"),
        ("x" * 1001, "expected one line"),
    ],
)
def test_other_values_are_refused_with_the_reason(value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refused:
        exact_label(value)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 200


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@settings(max_examples=150, deadline=None)
@given(json_values)
@example("²")
def test_any_value_is_a_label_or_refused_on_one_line(value: object) -> None:
    try:
        label: Label | None = exact_label(value)
        said = ""
    except ValueError as error:
        label, said = None, str(error)
    assert said.isprintable()
    assert label is None or str(label) == str(value).strip()


def test_digits_may_have_zeros_before_them() -> None:
    assert [digits_label(digits) for digits in ("0", "000", "0012", "0" * 5000 + "7")] == [0, 0, 12, 7]
    with pytest.raises(ValueError, match="has 30 digits"):
        digits_label("1" * 30)


def test_numbers_are_the_labels_and_texts_are_sorted() -> None:
    assert number_classes({3: "c", 0: "a"}, None, None, "x") == (("0", "1", "2", "3"), {3: 3, 0: 0})
    assert number_classes({3: "c", 0: "a"}, list("abcd"), None, "x") == (("a", "b", "c", "d"), {3: 3, 0: 0})
    assert number_classes({10: "a", 9: "b"}, None, "number", "x") == (("9", "10"), {9: 0, 10: 1})
    assert number_classes({"dog": "1", "cat": "2"}, None, None, "x") == (("cat", "dog"), {"dog": 1, "cat": 0})
    assert number_classes({"dog": "1"}, ["dog", "cat"], None, "x") == (("dog", "cat"), {"dog": 0})
    assert number_classes({}, None, None, "x") == ((), {})


@pytest.mark.parametrize(
    ("found", "names", "reason"),
    [
        ({0: "a.cls", "cat": "b.cls"}, None, r"labels are numbers and texts: 0 in a\.cls, 'cat' in b\.cls"),
        ({2: "a.cls"}, ["x", "y"], r"a\.cls has label 2, expected 0\.\.1: 2 classes have a name"),
        ({"emu": "a.cls"}, ["x", "y"], r"a\.cls has the label 'emu', which is none of the 2 class names"),
        ({"x": "a.cls"}, ["x", "x"], "two classes have the same name"),
        ({"c 1": "a", "c 10": "b", "c 2": "c"}, None, "say --class-order number"),
    ],
)
def test_labels_that_contradict_one_another_are_refused(
    found: dict[Label, str], names: list[str] | None, reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        number_classes(found, names, None, "here")


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


def test_fewer_or_other_classes_are_not_imagenet() -> None:
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
    source = open_source("image-folder", str(tmp_path))
    described = source.description
    assert described.label_map == label_map(wnids())
    assert described.label_checks[:3] == ["label 0 is n01440764", "label 65 is n01751748", "label 999 is n15075141"]
    (tmp_path / "n01440764").rename(tmp_path / "n16000000")
    with pytest.raises(UserError, match="n01440764 should be label 0, here it is none"):
        open_source("image-folder", str(tmp_path))


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
        open_source("image-folder", str(tmp_path))
    by_number = open_source("image-folder", str(tmp_path), options=SourceOptions(class_order="number"))
    assert [(by_number[i].label, by_number[i].data) for i in range(11)] == [(i, b"%d" % i) for i in range(11)]
    by_text = open_source("image-folder", str(tmp_path), options=SourceOptions(class_order="text"))
    assert by_text.class_names == ("0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9")
    with pytest.raises(UserError, match="--class-order digits: expected one of text, number"):
        open_source("image-folder", str(tmp_path), options=SourceOptions(class_order="digits"))
