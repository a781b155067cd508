"""What counts as a label, the same for every source: a whole number from 0, or the text of a class's name.

Nothing is rounded, cut or guessed: what is neither is refused with the place that holds it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.sources.class_order import order_classes

MAX_CLASSES = 1_000_000
"""Each label up to the largest has a name in memory and in the manifest: one of ten digits must not take gigabytes."""
MAX_NAME_CHARS = 1_000
MAX_DIGITS = 20
"""Of a number that is read at all; more are beyond every limit here."""
MISSING_WORDS = frozenset({"nan", "<na>", "nat"})
"""What libraries for tables write where there is no value; `none` and `null` may be names of classes."""
OTHER_NUMBER = re.compile(r"[+-]\d+|[+-]?(\d+\.\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
"""A number that is no label: -1, +3, 0.33, 1.0; but 007, 1_0, 1e3 and 1.2.3 may be names."""

Label = int | str


def exact_label(value: object) -> Label:
    """A value as a container holds it (of JSON, a table's cell). ValueError, with the reason, when it is no label."""
    if isinstance(value, str):
        return text_label(value)
    if type(value) is int:  # a bool is an int to Python
        return _checked(value)
    kind = "missing" if value is None else f"{_short(value)}, a {type(value).__name__}"
    raise ValueError(f"the label is {kind}; expected a whole number from 0 or the name of a class")


def text_label(text: str) -> Label:
    """Of a text: the number that it writes (`7`, not `07` or `1_0`, which may be names), else the name of a class.

    ValueError, with the reason, when it is neither: empty, several lines, a negative number or one with a fraction.
    """
    text = text.strip()
    if text.isascii() and text.isdigit() and (text[0] != "0" or text == "0"):
        return digits_label(text)
    if not text or text.lower() in MISSING_WORDS:
        raise ValueError(f"the label is missing{f' ({text})' if text else ''}")
    if len(text) > MAX_NAME_CHARS or any(
        unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text
    ):
        raise ValueError(f"the label is {_short(text)}; expected one line with the name of one class")
    if OTHER_NUMBER.fullmatch(text):
        raise ValueError(
            f"the label is {_short(text)}; expected a whole number from 0: hidden labels (-1) and regression are not "
            "supported"
        )
    return text


def digits_label(digits: str) -> int:
    """The number that ASCII digits write, with zeros before it or not. ValueError beyond MAX_CLASSES."""
    significant = digits.lstrip("0")
    if len(significant) > MAX_DIGITS:
        raise ValueError(f"the label has {len(significant):,} digits; expected a number below {MAX_CLASSES:,}")
    return _checked(int(significant or "0"))


def number_classes(
    found: Mapping[Label, str], names: Sequence[str] | None, class_order: str | None, where: str
) -> tuple[tuple[str, ...], dict[Label, int]]:
    """The classes' names in the order of their numbers, and the number of each label.

    `found`: every label that occurs, once, and where it occurs first, for messages. `names`: of the classes where they
    are known. Else numbers are the labels themselves unless `class_order` is given, and texts are ordered by
    `order_classes`. UserError when labels are numbers here and texts there, or none of the names.
    """
    by_kind = {kind: next((label for label in found if isinstance(label, kind)), None) for kind in (int, str)}
    number, text = by_kind[int], by_kind[str]
    if number is not None and text is not None:
        raise UserError(
            f"{where}: has numbers and texts for labels: {number} in {found[number]}, {_short(text)} in {found[text]}; "
            "make all of them one or the other"
        )
    if text is not None:
        class_names = (
            tuple(names) if names is not None else order_classes([str(label) for label in found], class_order, where)
        )
        by_name = {name: number for number, name in enumerate(class_names)}
        if len(by_name) != len(class_names):
            raise UserError(f"{where}: the labels are names of classes, and two classes have the same name")
        unknown = next((label for label in found if label not in by_name), None)
        if unknown is not None:
            raise UserError(
                f"{where}: {found[unknown]} has the label {_short(unknown)}, which is none of the {len(by_name):,} "
                "class names"
            )
        return class_names, {label: by_name[str(label)] for label in found}
    numbers = [label for label in found if isinstance(label, int)]
    if names is None and class_order is not None:
        class_names = order_classes([str(label) for label in numbers], class_order, where)
        return class_names, {int(name): number for number, name in enumerate(class_names)}
    largest = max(numbers, default=-1)
    if names is not None and largest >= len(names):
        raise UserError(
            f"{where}: {found[largest]} has label {largest}, expected 0..{len(names) - 1}: {len(names):,} classes have "
            "a name"
        )
    class_names = tuple(names) if names is not None else tuple(str(label) for label in range(largest + 1))
    return class_names, {label: label for label in numbers}


def labels_without_samples(labels: NDArray[np.int64], class_names: Sequence[str]) -> list[str]:
    """A note when classes that are only numbers have no samples: do they count from 1?"""
    if class_names != tuple(str(label) for label in range(len(class_names))):
        return []
    (empty,) = np.nonzero(np.bincount(labels, minlength=len(class_names)) == 0)
    return (
        [f"no sample has {len(empty):,} of the labels 0..{len(class_names) - 1}, first {empty[0]}"]
        if len(empty)
        else []
    )


def _checked(number: int) -> int:
    if number.bit_length() > 64:
        raise ValueError(f"the label is a number of more than 64 bits; expected one below {MAX_CLASSES:,}")
    if number < 0:
        raise ValueError(f"the label is {number}; hidden test labels are -1: choose another split")
    if number >= MAX_CLASSES:
        raise ValueError(f"the label is {number}; expected the number of a class, below {MAX_CLASSES:,}")
    return number


def _short(value: object) -> str:
    text = repr(value)  # control characters are escaped
    return text if len(text) <= 60 else f"{text[:57]}..."
