"""The order of classes, which is the meaning of labels: by name, and never silently by a number sorted as text."""

from __future__ import annotations

import re
from collections.abc import Collection

from data_prep.errors import UserError

CLASS_ORDERS = ("text", "number")
NUMBERED = re.compile(r"(\D*)(\d+)(\D*)")


def order_classes(names: Collection[str], class_order: str | None, where: str) -> tuple[str, ...]:
    """Names by label. `class_order`: `text`, as torchvision's ImageFolder sorts; `number`; None: whichever is meant,
    which is clear as long as both are the same order.

    UserError when the names are numbered and the two orders differ: 0, 1, 10, 2 shifts nearly every label.
    """
    by_text = sorted(names)
    if class_order == "text":
        return tuple(by_text)
    by_number = sorted_by_number(names)
    if class_order == "number":
        if by_number is None:
            odd = next((name for name in by_text if not NUMBERED.fullmatch(name)), by_text[0])
            raise UserError(f"{where}: --class-order number needs classes named by numbers, here is {odd}")
        return tuple(by_number)
    if by_number is not None and by_number != by_text:
        label = next(i for i, (a, b) in enumerate(zip(by_text, by_number, strict=True)) if a != b)
        raise UserError(
            f"{where}: the classes are named by numbers, and sorted as text label {label} would be {by_text[label]}, "
            f"not {by_number[label]}; say --class-order number (0, 1, 2, ..., 10), or text to have 0, 1, 10, ..., 2"
        )
    return tuple(by_text)


def sorted_by_number(names: Collection[str]) -> list[str] | None:
    """None unless all names are numbers, or numbers with the same text before and behind."""
    matches = [NUMBERED.fullmatch(name) for name in names]
    found = [match for match in matches if match is not None]
    if len(found) != len(matches) or len({(match[1], match[3]) for match in found}) != 1:
        return None
    return sorted(names, key=lambda name: (int(re.sub(r"\D", "", name)), name))
