"""The ways a command ends early: the user can fix it, something broke, or a signal came."""

from __future__ import annotations

import signal


class UserError(Exception):
    """A mistake the user can fix. One readable line: what is wrong, where, and how to fix it. Exit code 2."""


class Fault(Exception):
    """Something broke that is not the user's mistake. One readable line with the cause and where to look. Exit code
    1."""


class Interrupted(Exception):
    """A signal requested the end, and the work ended in an orderly way. The exit code is 128 + its number."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number
