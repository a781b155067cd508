"""Labels: what counts as a label, the order of classes, and ImageNet's known facts, confirmed or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
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
    several_labels,
)
from tests.data_prep.sources.opening import opened, refused, refuses

# --- what a label is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (0, 0),
        (999_999, 999_999),
        ("3", 3),
        (" 12\n", 12),
        *((text, text) for text in ("cat", "00", "1_0", "1e3", "1.2.3", "none", "Crêpe, salée")),
        ("007", "007"),  # not the 7 that it would be to int()
        ("٣", "٣"),  # an Arabic digit, which int() reads
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
        (float("nan"), "is nan, a float"),
        (None, "the label is missing"),
        ([1], r"is \[1\], a list"),
        (b"3", "a bytes"),
        (-1, "is -1; hidden test labels are -1: choose another split"),
        (MAX_CLASSES, "is 1000000; expected the number of a class, below 1,000,000"),
        pytest.param(10**5000, "more than 64 bits", id="5,001 digits"),
        ("9" * 5000, "has 5,000 digits"),
        ("9999999999", "is 9999999999; expected the number of a class"),
        ("-1", "hidden labels"),
        ("+3", "expected a whole number"),
        *((text, "regression") for text in ("0.33", ".5", "1.0e-3")),
        *((text, "the label is missing") for text in ("", " \n")),
        ("NaN", r"the label is missing \(NaN\)"),
        ("cat\ndog", "expected one line with the name of one class"),
        ("\x1b[31mcat", r"\\x1b"),
        ("x" * 1001, "expected one line"),
    ],
)
def test_other_values_are_refused_with_the_reason(value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refusal:
        exact_label(value)
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 200


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


@settings(max_examples=60, deadline=None)
@given(scalars | st.lists(scalars, max_size=2) | st.dictionaries(st.text(), scalars, max_size=2))
@example("²")
def test_any_value_is_a_label_or_refused_on_one_line(value: object) -> None:
    try:
        label = exact_label(value)
    except ValueError as error:
        assert str(error).isprintable()  # noqa: PT017  # either may be
        return
    assert str(label) == str(value).strip()


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
    refuses("two classes have the same name", number_classes, {"x": "a.cls"}, ["x", "x"], None, "here")


# --- ImageNet's facts -------------------------------------------------------------------------------------------------

WNIDS = [*(f"n{1440764 + i:08d}" for i in range(65)), *(f"n{1751748 + i:08d}" for i in range(934)), "n15075141"]
"""1,000 made-up wnids with ImageNet's known ones in their places."""
VAL_NAMES = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 50_001)]


def val_labels() -> np.ndarray:
    """Of VAL_NAMES, of which the first has label 65."""
    labels = np.arange(50_000) % 1000
    labels[[0, 65]] = labels[[65, 0]]
    return labels


@pytest.mark.parametrize(
    ("texts", "several"),
    [
        (["cat", "dog", "cat|dog"], "cat|dog"),
        (["cat|dog", "dog|emu"], "cat|dog"),
        (["cat", "cat; dog"], "cat; dog"),
        (["cat", "dog", "dog, cat"], "dog, cat"),
        (["cat", "dog", "cat dog"], "cat dog"),
        (["0", "3", "0 3"], "0 3"),
        (["0,3"], "0,3"),
        (["['cat']"], "['cat']"),
        (["hot dog", "dog", "cat"], None),
        (["tench, Tinca tinca", "tench, other", "crane"], None),
        (["a|b", "c"], None),
        (["12", "n01440764", "class-1"], None),
    ],
)
def test_texts_that_hold_several_labels_are_refused(texts: list[str], several: str | None) -> None:
    assert several_labels(texts) == several
    found: dict[Label, str] = {
        (int(text) if text.isdecimal() else text): f"row {row}" for row, text in enumerate(texts)
    }
    if several is not None:
        with pytest.raises(
            UserError, match=rf"x: row {texts.index(several)} has several labels, .* regression are not"
        ):
            number_classes(found, None, None, "x")
        assert number_classes(found, None, "given", "x")[0] == tuple(sorted(texts))


def test_imagenets_known_facts_are_checked() -> None:
    assert check_labels(label_map(WNIDS), val_labels(), VAL_NAMES, "here") == [
        "label 0 is n01440764",
        "label 65 is n01751748",
        "label 999 is n15075141",
        "but not all 1,000 wnids are those of ILSVRC2012",
        "ILSVRC2012_val_00000001 is n01751748",
        "50 validation images in each class",
    ]
    one = np.zeros(1, dtype=np.int64)
    assert check_labels(label_map(WNIDS[:999]), one, ["a"], "here") == []
    note = "1,000 wnids, none of which is known of ILSVRC2012: another set of classes"
    assert check_labels(label_map([f"n{i:08d}" for i in range(1000)]), one, ["a"], "here") == [note]


def test_contradicted_facts_are_refused() -> None:
    uneven = val_labels()
    uneven[1] = 2
    for wnids, labels, message in [
        ([*WNIDS[1:], WNIDS[0]], val_labels(), "here: .* n01440764 should be label 0, here it is 999"),
        ([*WNIDS[:999], "n99999999"], val_labels(), "n15075141 should be label 999, here it is none"),
        (WNIDS, np.arange(50_000) % 1000, r"val_00000001 should be n01751748 \(label 65\), here it has label 0"),
        (WNIDS, uneven, "each class should have 50 of the 50,000 validation images, label 1 has 49"),
    ]:
        refuses(message, check_labels, label_map(wnids), labels, VAL_NAMES, "here")


def test_a_tree_with_a_renamed_imagenet_class_is_refused(tmp_path: Path) -> None:
    for wnid in WNIDS:
        (tmp_path / wnid).mkdir()
        (tmp_path / wnid / "a.JPEG").write_bytes(b"1")
    described = opened("image-folder", tmp_path).description
    assert described.label_map == label_map(WNIDS)
    assert described.label_checks[:3] == ["label 0 is n01440764", "label 65 is n01751748", "label 999 is n15075141"]
    (tmp_path / "n01440764").rename(tmp_path / "n16000000")
    refused("n01440764 should be label 0, here it is none", "image-folder", tmp_path)


# --- the order of classes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "order", "expected"),
    [
        ("b a", None, "a b"),
        ("2 0 1", None, "0 1 2"),
        ("02 10 01", None, "01 02 10"),
        ("10 2 1", "number", "1 2 10"),
        ("10 2 1", "text", "1 10 2"),
        ("class-10 class-9", "number", "class-9 class-10"),
        ("10_cats 9_dogs", None, "10_cats 9_dogs"),
        ("a 10 2", "number", "2 10 a"),
        ("10_cats 9_dogs", "number", "9_dogs 10_cats"),
        ("-1 0 10 2", "number", "-1 0 2 10"),
        ("10.0 2.0 0.5", "number", "0.5 2.0 10.0"),
        ("bird2 dog1 cat0", "number", "cat0 dog1 bird2"),
        ("001.owl 010.emu 002.kiwi", None, "001.owl 002.kiwi 010.emu"),
    ],
)
def test_order_classes(names: str, order: str | None, expected: str) -> None:
    assert list(order_classes(names.split(), order, "here")) == expected.split()


@pytest.mark.parametrize(
    ("names", "first", "second"),
    [
        *(
            ([form.format(n) for n in range(11)], form.format(10), form.format(2))
            for form in ("{}", "class_{}", "{}-x", "{}.0", "v{}.x")
        ),
        ([*map(str, range(11)), "background"], "10", "2"),
        (["01", "02", "3", "10"], "10", "3"),
        (["class1", "class2", "class10", "other"], "class10", "class2"),
        ([f"{n}_{name}" for n, name in enumerate("abcdefghijkl")], "10_k", "1_b"),
        (["cat0", "dog1", "bird2"], "bird2", "cat0"),
        (["1-2", "1-10", "1-1"], "1-10", "1-2"),
        ([f"{kind}{n}" for kind in ("bus", "train") for n in (1, 2, 10)], "bus10", "bus2"),
    ],
)
def test_numbers_that_mean_an_order_are_not_sorted_as_text(names: list[str], first: str, second: str) -> None:
    message = f"would be {first}, not {second}; say --class-order number .* --classes FILE"
    refuses(message, order_classes, names, None, "here")
    for order in ("number", "text"):
        assert sorted(order_classes(names, order, "here")) == sorted(names)
    by_number = order_classes(names, "number", "here")
    assert by_number.index(second) < by_number.index(first)


@pytest.mark.parametrize("names", [["-1", "0", "1"], ["-1", "cat", "dog"], ["-1.0", "0.0"]])
def test_a_class_that_marks_hidden_labels_is_asked_about(names: list[str]) -> None:
    message = rf"here: one class is {names[0]}, which marks hidden labels.*--class-order number"
    refuses(message, order_classes, names, None, "here")
    assert order_classes(names, "number", "here")[0] == names[0]


def test_names_with_numbers_that_mean_no_order() -> None:
    cars = ["Audi 100 Sedan 1994", "Audi 80", "BMW 3 Series 2012", "Fiat 500", "Volvo 240", "VW Golf"]
    assert order_classes(cars, None, "here") == tuple(sorted(cars))
    assert notes_on_order(sorted(cars)) == ["classes are sorted as text: Audi 100 Sedan 1994 comes before Audi 80"]
    assert notes_on_order(["cat", "dog2"]) == []
    assert not are_numbered(["cat", "dog2"])
    assert are_numbered(["1", "2", "other"])
    message = "--class-order number needs classes named by numbers, here is a"
    refuses(message, order_classes, ["b", "a"], "number", "here")


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
    refused("sorted as text label 2 would be 10, not 2", "image-folder", tmp_path)
    by_number = opened("image-folder", tmp_path, class_order="number")
    assert [(by_number[i].label, by_number[i].data) for i in range(11)] == [(i, b"%d" % i) for i in range(11)]
    assert opened("image-folder", tmp_path, class_order="text").class_names == tuple(sorted(map(str, range(11))))
    message = "--class-order digits: expected one of text, number"
    refused(message, "image-folder", tmp_path, class_order="digits")
