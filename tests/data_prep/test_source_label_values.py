"""What counts as a label is one rule for all sources: whole numbers from 0, or names of classes."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.sources.labels import MAX_CLASSES, Label, digits_label, exact_label, number_classes, text_label


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (0, 0),
        (999_999, 999_999),
        ("3", 3),
        (" 12\n", 12),
        ("cat", "cat"),
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
def test_what_is_no_label_is_refused_with_the_reason(value: object, reason: str) -> None:
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


def test_text_labels_are_told_from_numbers_by_their_own_text() -> None:
    assert [text_label(text) for text in ("0", "00", "10", "01")] == [0, "00", 10, "01"]
