"""Why a command ends early: a mistake of the user's, something that broke, or a signal."""

from __future__ import annotations

import signal


class UserError(Exception):
    """A mistake the user can fix. One readable line: what is wrong, where, and how to fix it. Exit code 2."""


class Fault(Exception):
    """Something broke, without a mistake of the user's. One readable line: the cause and where to look. Exit code 1."""


class Interrupted(Exception):
    """A signal asked the command to stop, and its work has ended in an orderly way. Exit code 128 + its number."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number
