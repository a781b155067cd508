"""The second signal to a command that is already ending: it says so, and is over within seconds."""

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
"""For what a command still does on its way out."""


def end_at_once(exit_code: int, what_is_lost: str, limit_s: float = LIMIT_S) -> None:
    """Call it in the handler of that signal, and raise KeyboardInterrupt. A process that is not at its end by then ends
    without more ado; a Ray of its own and its workers end with it.
    """
    line = f"\nstopping at once: {what_is_lost}; the same command resumes (this takes {limit_s:g} s at most)\n"
    os.write(sys.stderr.fileno() if sys.stderr and not sys.stderr.closed else 2, line.encode())
    timer = threading.Timer(limit_s, os._exit, (exit_code,))
    timer.daemon = True
    timer.start()


# SIGINT and SIGTERM as a flag that the conversion looks at between pieces of work, so that it always ends in order.


class StopFlag:
    """Set by a signal. A second signal raises KeyboardInterrupt at once, for the impatient."""

    def __init__(self, end: Callable[[int, str], None] = end_at_once) -> None:
        """`end`: what is done at the second signal, given the exit code and what is lost."""
        self._signal_number: int | None = None
        self._end = end

    def check(self) -> None:
        """Raises Stopped once a signal has come."""
        if self._signal_number is not None:
            raise Stopped(self._signal_number)

    def install(self) -> None:
        """Takes over SIGINT and SIGTERM. `ray.init` replaces the handlers: call this again behind it."""
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, signal_number: int, frame: FrameType | None) -> None:
        if self._signal_number is not None:
            self._end(128 + signal_number, "what is not yet written is done again")
            raise KeyboardInterrupt
        self._signal_number = signal_number


@contextmanager
def stop_on_signals(end: Callable[[int, str], None] = end_at_once) -> Iterator[StopFlag]:
    """A flag that is set by signals within the block; the handlers from before come back behind it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    flag = StopFlag(end)
    flag.install()
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
