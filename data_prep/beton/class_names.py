"""Describes where two lists of class names differ. A label is a position in such a list, so the lists must agree."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

_MAX_SHOWN = 60
"""Characters of a name in a message."""


def difference(first: Sequence[str], second: Sequence[str], in_first: str, in_second: str) -> str | None:
    """Describes the first label at which the two lists differ; None if they are equal.

    `in_first`, `in_second`: where each is from, as "runs/demo".
    """
    if tuple(first) == tuple(second):
        return None
    label = _first_unequal(first, second)
    one, other = _shown(first, label), _shown(second, label)
    if label < min(len(first), len(second)) and _look_alike(first[label], second[label]):
        one, other = _spelled(first[label], second[label])
    if len(first) != len(second):
        in_first, in_second = f"{in_first} ({len(first)} classes)", f"{in_second} ({len(second)} classes)"
    order = "; the names are the same, their order is not" if sorted(first) == sorted(second) else ""
    return f"class {label} is {one} in {in_first}, {other} in {in_second}{order}"


def _shown(names: Sequence[str], label: int) -> str:
    if label >= len(names):
        return "missing"
    name = names[label]
    return repr(name if len(name) <= _MAX_SHOWN else f"{name[: _MAX_SHOWN - 1]}…")


def _look_alike(one: str, other: str) -> bool:
    """Whether the difference would not be visible: spaces, a letter in other code points, a late position."""
    one, other = (unicodedata.normalize("NFKC", name).strip() for name in (one, other))
    return one[: _MAX_SHOWN - 1] == other[: _MAX_SHOWN - 1]


def _spelled(one: str, other: str) -> tuple[str, str]:
    """Both names from shortly before the position where they differ, with escapes for all but ASCII."""
    start = max(0, _first_unequal(one, other) - _MAX_SHOWN // 2)
    dots = "…" if start else ""
    return f"{dots}{one[start : start + _MAX_SHOWN]!a}", f"{dots}{other[start : start + _MAX_SHOWN]!a}"


def _first_unequal(first: Sequence[str], second: Sequence[str]) -> int:
    """The first position at which the two differ; the end of the shorter one, if there is none before."""
    shorter = min(len(first), len(second))
    return next((k for k in range(shorter) if first[k] != second[k]), shorter)
