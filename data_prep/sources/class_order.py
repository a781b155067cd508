"""The order of classes, which is the meaning of labels: by name, and never silently by a number sorted as text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from decimal import Decimal

from data_prep.errors import UserError
from data_prep.shown import shown

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
