"""Ctrl-C and SIGTERM as a wish that the driver can look at, instead of an exception at a random place."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from data_prep.last_signal import end_at_once


@dataclass
class StopSignal:
    """`number` is the first signal received, None so far. A second one interrupts at once."""

    number: int | None = None

    @property
    def exit_code(self) -> int:
        """The shell's convention: 128 + signal number (130 for Ctrl-C, 143 for SIGTERM)."""
        return 128 + (self.number or 0)


@contextmanager
def stop_signals(end: Callable[[int, str], None] = end_at_once) -> Iterator[StopSignal]:
    """Catches SIGINT and SIGTERM. Enter after `ray.init`, which installs a SIGTERM handler of its own.

    `end`: what is done at the second signal, given the exit code and what is lost.
    """
    stop = StopSignal()

    def note(number: int, frame: FrameType | None) -> None:
        if stop.number is not None:
            end(stop.exit_code, "steps since the last checkpoint are trained again")
            raise KeyboardInterrupt
        stop.number = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
