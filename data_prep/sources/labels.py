"""What a label is (a whole number from 0, or a class name), and how class names are ordered into labels."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.shown import shown

MAX_CLASSES = 1_000_000
"""Each label up to the largest has a name in memory and in the manifest: a label of ten digits would take gigabytes."""
MAX_NAME_CHARS = 1_000
MAX_DIGITS = 20
"""Longer numbers exceed every limit here, so they are not parsed: parsing takes quadratic time."""
MISSING_WORDS = frozenset({"nan", "<na>", "nat"})
"""What table libraries write for a missing value; `none` and `null` may be class names."""
OTHER_NUMBER = re.compile(r"[+-]\d+|[+-]?(\d+\.\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
"""A number that is not a label: -1, +3, 0.33, 1.0; but 007, 1_0, 1e3 and 1.2.3 may be names."""

CLASS_ORDERS = ("text", "number")
GIVEN = "given"
"""Not for users: `--classes` gives the order later, so any order will do here."""
HIDDEN_LABEL = Decimal(-1)
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")
"""A name that is a number as a whole, perhaps with a sign or a fraction."""
DIGITS = re.compile(r"\d+")
MIN_INDEX = 3
"""Fewer numbers than this are not taken for an index of the classes."""

LISTED = re.compile(r"[|;,]")
NOT_SUPPORTED = "one class for each image is supported, several labels and regression are not"
LIST_CLASSES = "if this is the name of one class, list all classes in a file for --classes"

Label = int | str
Numbers = tuple[Decimal, ...]


# --- labels -----------------------------------------------------------------------------------------------------------


def exact_label(value: object) -> Label:
    """The label in a container's value (of JSON, of a table's cell), never rounded or guessed.

    ValueError with the reason when it is not a label.
    """
    if isinstance(value, str):
        return text_label(value)
    if type(value) is int:  # a bool is an int to Python
        return _checked(value)
    kind = "missing" if value is None else f"{_short(value)}, a {type(value).__name__}"
    reason = "" if value is None else f": {NOT_SUPPORTED}"
    raise ValueError(f"the label is {kind}; expected a whole number from 0 or the name of a class{reason}")


def text_label(text: str) -> Label:
    """The number that a text writes (`7`, not `07` or `1_0`, which may be names), else the class name that it is.

    ValueError with the reason when it is neither: empty, several lines, a negative number or one with a fraction.
    """
    text = text.strip()
    if text.isascii() and text.isdigit() and (text[0] != "0" or text == "0"):
        return digits_label(text)
    if not text or text.lower() in MISSING_WORDS:
        raise ValueError(f"the label is missing{f' ({text})' if text else ''}")
    if len(text) > MAX_NAME_CHARS or any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in text):
        raise ValueError(f"the label is {_short(text)}; expected one line with the name of one class")
    if OTHER_NUMBER.fullmatch(text):
        raise ValueError(
            f"the label is {_short(text)}; expected a whole number from 0: hidden labels (-1) and regression are not "
            "supported"
        )
    return text


def digits_label(digits: str) -> int:
    """The number that ASCII digits write, with or without leading zeros. ValueError from MAX_CLASSES on."""
    significant = digits.lstrip("0")
    if len(significant) > MAX_DIGITS:
        raise ValueError(f"the label has {len(significant):,} digits; expected a number below {MAX_CLASSES:,}")
    return _checked(int(significant or "0"))


def number_classes(
    found: Mapping[Label, str], names: Sequence[str] | None, class_order: str | None, where: str
) -> tuple[tuple[str, ...], dict[Label, int]]:
    """The class names in label order, and the label number of each label found.

    Args:
        found: each label that occurs -> where it occurs first, for messages.
        names: of the classes, if known. Otherwise numbers are the labels themselves unless `class_order` is given, and
            texts are ordered by `order_classes`.

    Raises:
        UserError: some labels are numbers and others texts, or one is none of the names.
    """
    numbers = [label for label in found if isinstance(label, int)]
    texts = [label for label in found if isinstance(label, str)]
    if names is None and class_order == GIVEN:  # whatever the labels look like, they are listed as classes
        class_names = tuple(sorted(map(str, found)))
        by_name = {name: label for label, name in enumerate(class_names)}
        return class_names, {label: by_name[str(label)] for label in found}
    if names is None and texts:
        several = several_labels(map(str, found))
        if several is not None:
            raise UserError(
                f"{where}: {found[several]} has several labels, {_short(several)}: {NOT_SUPPORTED}; {LIST_CLASSES}"
            )
    if numbers and texts:
        raise UserError(
            f"{where}: labels are numbers and texts: {numbers[0]} in {found[numbers[0]]}, {_short(texts[0])} in "
            f"{found[texts[0]]}; make all of them one or the other"
        )
    if texts:
        class_names = order_classes(texts, class_order, where) if names is None else tuple(names)
        label_of = {name: label for label, name in enumerate(class_names)}
        if len(label_of) != len(class_names):
            raise UserError(f"{where}: the labels are names of classes, and two classes have the same name")
        unknown = next((name for name in texts if name not in label_of), None)
        if unknown is not None:
            raise UserError(
                f"{where}: {found[unknown]} has the label {_short(unknown)}, which is none of the {len(label_of):,} "
                "class names"
            )
        return class_names, {name: label_of[name] for name in texts}
    if names is None and class_order is not None:
        class_names = order_classes([str(number) for number in numbers], class_order, where)
        return class_names, {int(name): label for label, name in enumerate(class_names)}
    largest = max(numbers, default=-1)
    if names is not None and largest >= len(names):
        raise UserError(
            f"{where}: {found[largest]} has label {largest}, expected 0..{len(names) - 1}: {len(names):,} classes have "
            "a name"
        )
    class_names = tuple(map(str, range(largest + 1))) if names is None else tuple(names)
    return class_names, {number: number for number in numbers}


def several_labels(labels: Iterable[str]) -> str | None:
    """The first of a data set's labels that seems to be several: `0 3`, `cat|dog`, `['cat']`; None if none does."""
    texts = set(labels)
    # `cat dog` is two labels if both occur alone and most such cells are like that; else it may be a class: hot dog.
    words = [text.split() for text in texts if len(text.split()) > 1]
    parted = [parts for parts in words if set(parts) <= texts]
    listed = {text: [part.strip() for part in LISTED.split(text) if part.strip()] for text in texts}
    counts = Counter(part for parts in listed.values() for part in set(parts))
    for text in sorted(texts):
        parts = listed[text]
        # `tench, Tinca tinca` is one class; `a|b` and `b|c` are not.
        shared = len(parts) > 1 and "," not in text and any(counts[part] > 1 for part in parts)
        if text.startswith(("[", "{")) or (len(parts) > 1 and set(parts) <= texts) or shared or _all_numbers(parts):
            return text
    for text in sorted(texts):
        if _all_numbers(text.split()) or (text.split() in parted and 2 * len(parted) >= len(words)):
            return text
    return None


def _all_numbers(parts: Sequence[str]) -> bool:
    return len(parts) > 1 and all(map(NUMBER.fullmatch, parts))


def labels_without_samples(labels: NDArray[np.int64], class_names: Sequence[str]) -> list[str]:
    """A note when classes that are only numbers have no samples, as when labels count from 1."""
    (empty,) = np.nonzero(np.bincount(labels, minlength=len(class_names)) == 0)
    if not len(empty) or class_names != tuple(map(str, range(len(class_names)))):
        return []
    return [f"no sample has {len(empty):,} of the labels 0..{len(class_names) - 1}, first {empty[0]}"]


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


# --- the order of classes ---------------------------------------------------------------------------------------------


def order_classes(names: Collection[str], class_order: str | None, where: str) -> tuple[str, ...]:
    """Names in label order.

    Args:
        class_order: `text`, as torchvision's ImageFolder sorts; `number`; None: text, if number gives the same order.

    Raises:
        UserError: most names are numbered and the two orders differ (0, 1, 10, 2 shifts nearly every label), or one
            name is -1, which marks hidden labels.
    """
    by_text = sorted(names)
    if class_order in ("text", GIVEN):
        return tuple(by_text)
    by_number = sorted_by_number(names)
    if class_order == "number":
        if by_number == by_text and not any(map(DIGITS.search, names)):
            raise UserError(
                f"{where}: --class-order number needs classes named by numbers, here is {shown(by_text[0])}; leave it "
                "out, or give the order by --classes FILE"
            )
        return tuple(by_number)
    hidden = next((name for name in names if NUMBER.fullmatch(name) and Decimal(name) == HIDDEN_LABEL), None)
    if hidden is not None:
        raise UserError(
            f"{where}: one class is {hidden}, which marks hidden labels: leave these images out, or say --class-order "
            "number to make it a separate class, label 0"
        )
    # Sorted as text, 10 comes before 2: if most names are numbered, nearly every label would be wrong, and silently.
    if 2 * len(misordered(names)) >= len(names) > 1:
        label = next(i for i, (a, b) in enumerate(zip(by_text, by_number, strict=True)) if a != b)
        raise UserError(
            f"{where}: the classes are named by numbers, and sorted as text label {label} would be "
            f"{shown(by_text[label])}, not {shown(by_number[label])}; say --class-order number (0, 1, 2, ..., 10), "
            "text to have 0, 1, 10, ..., 2, or give the order by --classes FILE"
        )
    return tuple(by_text)


def sorted_by_number(names: Collection[str]) -> list[str]:
    """By the index that the names contain, else by all of their numbers in turn; names without numbers are last."""
    index = _index(names) or {}
    rest = sorted(set(names) - set(index), key=lambda name: (DIGITS.search(name) is None, _natural(name), name))
    return [*sorted(index, key=lambda name: (index[name], name)), *rest]


def are_numbered(names: Collection[str]) -> bool:
    """Whether most names are a number with or without the same word: 0, class_1, 2.0."""
    most = max(map(len, _by_skeleton(names)), default=0)
    return most > 1 and 2 * most >= len(names)


def notes_on_order(class_names: Sequence[str]) -> list[str]:
    """What a user should know about text order when it was not requested, one line each."""
    if sorted(class_names) != list(class_names):
        return []
    notes = []
    by_number = [name for name in sorted_by_number(class_names) if DIGITS.search(name)]
    by_text = [name for name in class_names if DIGITS.search(name)]
    moved = next((pair for pair in zip(by_text, by_number, strict=True) if pair[0] != pair[1]), None)
    if moved is not None:
        notes.append(f"classes are sorted as text: {shown(moved[0])} comes before {shown(moved[1])}")
    first: dict[str, str] = {}
    for name in class_names:
        folded = unicodedata.normalize("NFKC", " ".join(name.split())).casefold()
        if first.setdefault(folded, name) != name:
            notes.append(f"two classes have nearly the same name: {shown(first[folded])!r} and {shown(name)!r}")
            break
    return notes


def misordered(names: Collection[str]) -> set[str]:
    """Names that are alike but for their numbers, or that have an index, and whose text and number orders differ."""
    groups = [{name: _numbers(name) for name in group} for group in _by_skeleton(names) if len(group) > 1]
    groups.append(_index(names) or {})
    return {name for group in groups if sorted(group) != sorted(group, key=lambda n: (group[n], n)) for name in group}


def _by_skeleton(names: Collection[str]) -> list[list[str]]:
    """Groups of the names that are the same without their numbers; names without numbers are in no group."""
    groups: dict[str, list[str]] = {}
    for name in names:
        skeleton = "#" if NUMBER.fullmatch(name) else DIGITS.sub("#", name)
        if skeleton != name:
            groups.setdefault(skeleton, []).append(name)
    return list(groups.values())


def _numbers(name: str) -> Numbers:
    return tuple(map(Decimal, [name] if NUMBER.fullmatch(name) else DIGITS.findall(name)))


def _index(names: Collection[str]) -> dict[str, Numbers] | None:
    """The numbers of `0_cat`, `1_dog`, ... or `cat0`, `dog1`, ...: an index if at least half of the names have one, all
    different and without gaps from 0 or 1."""
    for position in (r"[-_. ]*(\d+)(?!\d)", r".*?(\d+)$"):
        matches = {name: match[1] for name in names if (match := re.match(position, name, re.DOTALL))}
        numbers: dict[str, Numbers] = {name: (Decimal(digits),) for name, digits in matches.items()}
        values = sorted(int(value) for (value,) in numbers.values() if value < len(names) + 2)
        count = len(matches)
        if max(MIN_INDEX, len(names) / 2) <= count and values in (list(range(count)), list(range(1, count + 1))):
            return numbers
    return None


def _natural(name: str) -> list[tuple[int, Decimal, str]]:
    """Texts and numbers in turn, so that numbers are compared with numbers."""
    if NUMBER.fullmatch(name):
        return [(0, Decimal(name), "")]
    parts = re.split(r"(\d+)", name)
    return [(0, Decimal(part), "") if DIGITS.fullmatch(part) else (1, Decimal(0), part) for part in parts if part]
