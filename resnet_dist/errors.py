"""The two ways a command ends badly; the same two classes as data preparation's, so that they mean one thing."""

from __future__ import annotations

from data_prep.errors import Fault, UserError

__all__ = ["Fault", "UserError"]
