"""What a check returns."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

TIME_S = 30.0
"""A check with several parts starts none after this time; its process has a minute."""


class Result(NamedTuple):
    measured: dict[str, Any]
    """What was measured, for the JSON file: plain values."""
    passed: bool | None
    """Whether it meets its threshold. None: it has none, and what was measured is the result."""
    line: str
    """The same in one line, for people; says the threshold."""


class Skipped(Exception):
    """A check cannot run here: its text says why."""


class Clock:
    """Time of one check."""

    def __init__(self) -> None:
        self._end_s = time.monotonic() + TIME_S

    def expired(self) -> bool:
        return time.monotonic() > self._end_s


def largest(values: Iterable[float]) -> float:
    """The maximum; NaN if any of them is, which no limit allows."""
    values = list(values)
    return math.nan if any(map(math.isnan, values)) else max(values)
