"""Reads JSON that may be hostile or damaged: limited in bytes, depth and digits, with every key once."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NoReturn

MAX_DEPTH = 32
"""Levels of containers: our files have at most 8, and code that handles them may be recursive."""
MAX_DIGITS = 20
"""Digits of an integer of 64 bits."""


def parse(text: str | bytes, *, max_bytes: int, allow_nan: bool = False) -> Any:
    """The value of a JSON text. ValueError, with a short reason, if it is invalid or beyond the limits.

    `allow_nan`: accepts NaN and infinities, which Python's json writes for floats.
    """
    if len(text) > max_bytes:
        raise ValueError(f"has more than {max_bytes:,} bytes")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_with_unique_keys,
            parse_int=_integer,
            parse_float=float if allow_nan else _finite,
            parse_constant=float if allow_nan else _no_constant,
        )
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    except RecursionError:
        raise ValueError(f"is nested more than {MAX_DEPTH} deep") from None
    _require_shallow(value)
    return value


def _with_unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise ValueError(f"has the key {twice[:60]!a} twice")
    return tree


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"has a number of {len(digits):,} digits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"has the number {digits[:40]}, which is too large")
    return number


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"has {name} for a number")


def _require_shallow(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for container in level
            if isinstance(container, dict | list)
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"is nested more than {MAX_DEPTH} deep")
