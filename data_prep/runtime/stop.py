"""SIGINT and SIGTERM set a flag, which a command checks between pieces of work and then ends in an orderly way."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from data_prep.errors import Interrupted

LIMIT_S = 5.0
"""Limit for the cleanup after a second signal."""


def end_at_once(exit_code: int, what_is_lost: str, limit_s: float = LIMIT_S) -> None:
    """Ends this process within `limit_s`, and its local Ray with it. Call it in a signal handler, then raise
    KeyboardInterrupt."""
    line = f"\nstopping at once: {what_is_lost}; the same command resumes (this takes {limit_s:g} s at most)\n"
    os.write(sys.stderr.fileno() if sys.stderr and not sys.stderr.closed else 2, line.encode())
    timer = threading.Timer(limit_s, os._exit, (exit_code,))
    timer.daemon = True
    timer.start()


class StopFlag:
    """Set by the first signal within its `with` block. A second one raises KeyboardInterrupt at once.

    Args:
        what_is_lost: by a second signal, for the line that it prints.
        end: called at the second signal with the exit code and `what_is_lost`.
    """

    def __init__(
        self,
        what_is_lost: str = "unwritten work is repeated",
        end: Callable[[int, str], None] = end_at_once,
    ) -> None:
        self.number: int | None = None
        """Number of the first signal; None so far."""
        self._what_is_lost = what_is_lost
        self._end = end
        self._handlers_before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._handlers_before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.install_again()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        self._handlers_before = {}

    def install_again(self) -> None:
        """Call it after `ray.init`, which replaces the handlers. Does nothing outside the `with` block."""
        for number in self._handlers_before:
            signal.signal(number, self._handle)

    def stop_requested(self) -> bool:
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """The shell's convention: 128 + signal number (130 for Ctrl-C, 143 for SIGTERM)."""
        return 128 + (self.number or 0)

    def check(self) -> None:
        """Raises Interrupted once a signal has come."""
        if self.number is not None:
            raise Interrupted(self.number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            self._end(128 + number, self._what_is_lost)
            raise KeyboardInterrupt
        self.number = number
