"""What a check returns."""

from __future__ import annotations

from typing import Any, NamedTuple


class Result(NamedTuple):
    measured: dict[str, Any]
    """What was measured, for the JSON file: plain values."""
    passed: bool | None
    """Whether it keeps its threshold. None: there is none, what was measured is the result."""
    line: str
    """The same in one line, for people; says the threshold."""


class Skipped(Exception):
    """A check cannot run here: its text says why."""
