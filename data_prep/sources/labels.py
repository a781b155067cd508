"""The order of classes, which is the meaning of labels: by name, and never silently by a number sorted as text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.shown import few, shown
from data_prep.sources.base import Sample, Source, SourceDescription, SourceWithEnds, digest_of, notes_of
from data_prep.sources.files.places import HEAD_BYTES, Ends
from data_prep.sources.imagenet import are_wnids, check_labels, label_map

CLASS_ORDERS = ("text", "number")
GIVEN = "given"
"""Not for users: the order comes from a list of classes, so that here any will do."""
HIDDEN_LABEL = Decimal(-1)
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")
"""A name that is a number as a whole; with a sign or a fraction it still is one."""
DIGITS = re.compile(r"\d+")
MIN_INDEX = 3
"""Fewer numbers than these are not taken for an index of the classes."""

Numbers = tuple[Decimal, ...]


def require_order(class_order: str | None) -> None:
    """UserError on a word that is no order."""
    if class_order not in (None, GIVEN, *CLASS_ORDERS):
        raise UserError(f"--class-order {shown(class_order)}: expected one of {', '.join(CLASS_ORDERS)}")


def order_classes(names: Collection[str], class_order: str | None, where: str) -> tuple[str, ...]:
    """Names by label. `class_order`: `text`, as torchvision's ImageFolder sorts; `number`; None: whichever is meant,
    which is clear as long as both are the same order.

    UserError when most names are numbered and the two orders differ (0, 1, 10, 2 shifts nearly every label), or when
    one is -1, which marks labels that are hidden.
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
            "number to make it a class of its own, label 0"
        )
    if 2 * len(misordered(names)) >= len(names) > 1:
        label = next(i for i, (a, b) in enumerate(zip(by_text, by_number, strict=True)) if a != b)
        raise UserError(
            f"{where}: the classes are named by numbers, and sorted as text label {label} would be "
            f"{shown(by_text[label])}, not {shown(by_number[label])}; say --class-order number (0, 1, 2, ..., 10), "
            "text to have 0, 1, 10, ..., 2, or give the order by --classes FILE"
        )
    return tuple(by_text)


def sorted_by_number(names: Collection[str]) -> list[str]:
    """By the index that the names hold, else by all of their numbers as they come; names without any are last."""
    index = _index(names)
    indexed = sorted(index or (), key=_key(index or {}))
    rest = [name for name in names if index is None or name not in index]
    return [*indexed, *sorted(rest, key=lambda name: (DIGITS.search(name) is None, _natural(name), name))]


def are_numbered(names: Collection[str]) -> bool:
    """Whether most names say no more than a number: 0, class_1, 2.0."""
    most = max(map(len, _alike(names).values()), default=0)
    return most > 1 and 2 * most >= len(names)


def notes_on_order(class_names: Sequence[str]) -> list[str]:
    """What a person should know of an order that nobody asked for, one line each."""
    if sorted(class_names) != list(class_names):
        return []
    notes = []
    by_number = [name for name in sorted_by_number(class_names) if DIGITS.search(name)]
    by_text = [name for name in class_names if DIGITS.search(name)]
    moved = next((pair for pair in zip(by_text, by_number, strict=True) if pair[0] != pair[1]), None)
    if moved is not None:
        notes.append(f"classes are sorted as text: {shown(moved[0])} comes before {shown(moved[1])}")
    alike: dict[str, str] = {}
    for name in class_names:
        same = unicodedata.normalize("NFKC", " ".join(name.split())).casefold()
        if alike.setdefault(same, name) != name:
            notes.append(f"two classes have nearly the same name: {shown(alike[same])!r} and {shown(name)!r}")
            break
    return notes


def misordered(names: Collection[str]) -> set[str]:
    """Names that are alike but for their numbers, or that hold an index, and which text sorts otherwise than number."""
    groups = [{name: _numbers(name) for name in group} for group in _alike(names).values() if len(group) > 1]
    index = _index(names)
    if index is not None:
        groups.append(index)
    return {name for group in groups if sorted(group) != sorted(group, key=_key(group)) for name in group}


def _key(numbers: Mapping[str, Numbers]) -> Callable[[str], tuple[Numbers, str]]:
    return lambda name: (numbers[name], name)


def _alike(names: Collection[str]) -> dict[str, list[str]]:
    """By what is left of a name without its numbers; names without any are in no group."""
    groups: dict[str, list[str]] = {}
    for name in names:
        skeleton = "#" if NUMBER.fullmatch(name) else DIGITS.sub("#", name)
        if skeleton != name:
            groups.setdefault(skeleton, []).append(name)
    return groups


def _numbers(name: str) -> Numbers:
    if NUMBER.fullmatch(name):
        return (Decimal(name),)
    return tuple(Decimal(digits) for digits in DIGITS.findall(name))


def _index(names: Collection[str]) -> dict[str, Numbers] | None:
    """Of `0_cat`, `1_dog`, ... or `cat0`, `dog1`, ... the numbers: an index if at least half of the names have one,
    each another, without gaps from 0 or 1."""
    for position in (r"[-_. ]*(\d+)(?!\d)", r".*?(\d+)$"):
        found = {name: match[1] for name in names if (match := re.match(position, name, re.DOTALL))}
        numbers: dict[str, Numbers] = {name: (Decimal(digits),) for name, digits in found.items()}
        values = sorted(int(value) for (value, *_) in numbers.values() if value < len(names) + 2)
        if len(found) >= MIN_INDEX and 2 * len(found) >= len(names) and _counts(values, len(found)):
            return numbers
    return None


def _counts(values: Sequence[int], count: int) -> bool:
    return values in (list(range(count)), list(range(1, count + 1)))


def _natural(name: str) -> list[tuple[int, Decimal, str]]:
    """Texts and numbers in turn, so that numbers meet numbers."""
    if NUMBER.fullmatch(name):
        return [(0, Decimal(name), "")]
    parts = re.split(r"(\d+)", name)
    return [(0, Decimal(part), "") if DIGITS.fullmatch(part) else (1, Decimal(0), part) for part in parts if part]


# What counts as a label, the same for every source: a whole number from 0, or the text of a class's name.


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


# Any source with a list of classes that is given: labels count in that list, and mean the same in every split.


def with_classes(source: Source, class_names: tuple[str, ...], where: str) -> Source:
    """The same samples, with labels by that list; the source itself if its classes are those already.

    `where` names the list. Classes without samples are noted. UserError when samples are of a class that is not listed.
    """
    if tuple(source.class_names) == class_names:
        return source
    return (
        FixedClassesWithEnds(source, class_names, where)
        if isinstance(source, SourceWithEnds)
        else FixedClasses(source, class_names, where)
    )


class FixedClasses:
    def __init__(self, source: Source, class_names: tuple[str, ...], where: str) -> None:
        described = source.describe()
        label_of = {name: label for label, name in enumerate(class_names)}
        counts = np.bincount(source.labels, minlength=len(source.class_names))
        used = [name for name, count in zip(source.class_names, counts.tolist(), strict=True) if count]
        unknown = [name for name in used if name not in label_of]
        if unknown:
            raise UserError(
                f"{described.location}: has images of {few(unknown)}, which {where} does not list; add the name there, "
                "or leave these images out"
            )
        new_labels = np.array([label_of.get(name, -1) for name in source.class_names], dtype=np.int64)
        self._source = source
        self.class_names = class_names
        self.labels: NDArray[np.int64] = new_labels[source.labels]
        found = set(source.class_names)
        missing = [name for name in class_names if name not in found]
        note = f"{len(missing):,} of the {len(class_names):,} classes of {where} are not here: {few(missing)}"
        self.notes = (*notes_of(source), *([note] if missing else []))
        wnids = label_map(class_names) if are_wnids(class_names) else {}
        keys = (source.key(index) for index in range(len(source)))
        self._description = replace(
            described,
            identity=digest_of([described.identity, "classes", *class_names]),
            state=digest_of([described.state, "classes", *class_names]),
            label_map=wnids,
            label_checks=check_labels(wnids, self.labels, keys, described.location),
        )

    @property
    def sizes(self) -> NDArray[np.int64] | None:
        return self._source.sizes

    def describe(self) -> SourceDescription:
        return self._description

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, index: int) -> str:
        return self._source.key(index)

    def __getitem__(self, index: int) -> Sample:
        return replace(self._source[index], label=int(self.labels[index]))


class FixedClassesWithEnds(FixedClasses):
    _source: SourceWithEnds

    def ends(self, indices: Sequence[int], max_head_bytes: int = HEAD_BYTES) -> Ends:
        return self._source.ends(indices, max_head_bytes)

    def read_into(self, indices: Sequence[int], into: memoryview) -> None:
        self._source.read_into(indices, into)
