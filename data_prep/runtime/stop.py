"""SIGINT and SIGTERM as a flag that a command checks between pieces of work, so that it always ends in an orderly
way."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from data_prep.errors import Stopped

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
    """Set by a signal. A second signal raises KeyboardInterrupt at once, for the impatient."""

    def __init__(
        self,
        what_is_lost: str = "unwritten work is repeated",
        end: Callable[[int, str], None] = end_at_once,
    ) -> None:
        """`end`: called at the second signal with the exit code and `what_is_lost`."""
        self.number: int | None = None
        """Of the first signal; None so far."""
        self._what_is_lost = what_is_lost
        self._end = end
        self._is_installed = False

    @property
    def exit_code(self) -> int:
        """The shell's convention: 128 + signal number (130 for Ctrl-C, 143 for SIGTERM)."""
        return 128 + (self.number or 0)

    def check(self) -> None:
        """Raises Stopped once a signal has come."""
        if self.number is not None:
            raise Stopped(self.number)

    def install(self) -> None:
        """Handles SIGINT and SIGTERM from now on."""
        self._is_installed = True
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)

    def install_again(self) -> None:
        """If it was installed: `ray.init` replaces the handlers."""
        if self._is_installed:
            self.install()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            self._end(128 + number, self._what_is_lost)
            raise KeyboardInterrupt
        self.number = number


@contextmanager
def stop_on_signals(
    what_is_lost: str = "unwritten work is repeated", end: Callable[[int, str], None] = end_at_once
) -> Iterator[StopFlag]:
    """A flag that is set by signals within the block; the handlers from before come back after it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    flag = StopFlag(what_is_lost, end)
    flag.install()
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
