"""The two ways a command ends badly: the user can mend it, or something broke."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can mend. One readable line: what is wrong, where, and how to mend it. Exit code 2."""


class Fault(Exception):
    """Something broke that is not the user's doing. One readable line with the cause and where to look. Exit code 1."""
