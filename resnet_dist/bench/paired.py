"""How benchmarks compare: the arms take turns in every round, ratios are taken within a round, results are Markdown.

A machine is never idle. Arms that alternate are slowed alike by its other work, so the median over rounds of the ratio
within a round hardly shows it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from statistics import median
from threading import Timer
from typing import Any, TypeVar

from resnet_dist.errors import Fault, UserError

T = TypeVar("T")
_ANSWER_LIMIT_S = 3600.0
_END_LIMIT_S = 30.0


def rotated(arms: Sequence[T], round_number: int) -> list[T]:
    """The arms in the order of a round, which changes so that no arm always follows the same other."""
    first = round_number % len(arms)
    return [*arms[first:], *arms[:first]]


def ratios(ones: Sequence[float], others: Sequence[float]) -> list[float]:
    """Ratios within the same round, ascending."""
    return sorted(one / other for one, other in zip(ones, others, strict=True))


def median_ratio(ones: Sequence[float], others: Sequence[float]) -> str:
    return f"{median(ratios(ones, others)):.2f}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = ["|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def require_peers(asked: Iterable[str], known: Sequence[str]) -> None:
    if unknown := sorted(set(asked) - set(known)):
        raise UserError(f"there is no peer {', '.join(unknown)}; there are {', '.join(known)}")


def print_result(values: dict[str, Any]) -> None:
    """In a subject's process: sends a result to `Subject.answer`."""
    print(json.dumps(values), flush=True)


class Subject:
    """What is measured, in its own process: `python -m MODULE ARGUMENTS`, which prints its results as lines of JSON.

    Leaving `with` ends the process: its input is closed and it gets 30 s.
    """

    def __init__(self, name: str, module: str, *arguments: str) -> None:
        """`name`: for errors."""
        self._name = name
        command = [sys.executable, "-m", module, *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self) -> dict[str, Any]:
        """The next result. Raises Fault if the process ends, or prints none within an hour."""
        assert self._process.stdout is not None
        limit = Timer(_ANSWER_LIMIT_S, self._process.kill)
        limit.start()
        try:
            for line in self._process.stdout:
                if line.startswith("{"):
                    answer: dict[str, Any] = json.loads(line)
                    return answer
        finally:
            limit.cancel()
        raise Fault(f"the process of {self._name} ended; the reason is above")

    def ask(self) -> dict[str, Any]:
        """Makes the process measure again, by sending an empty line; returns its result."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.answer()

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            if error == (None, None, None):
                self._process.wait(_END_LIMIT_S)
        finally:
            self._process.kill()
            self._process.wait()
