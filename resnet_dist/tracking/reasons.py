"""One readable line out of an exception of mlflow's, which often wraps four others and shows the whole address."""

from __future__ import annotations

from data_prep.redaction import redacted

_MAX_CHARS = 300


def first_line(error: BaseException) -> str:
    """The exception's own message, without secrets: what a server that answered has to say."""
    lines = [line.strip() for line in redacted(str(error)).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:_MAX_CHARS]


def root_reason(error: BaseException) -> str:
    """The message of what happened first ("Connection refused"), without secrets: why a call did not get through."""
    seen = {id(error)}
    while (below := error.__cause__ or error.__context__) and id(below) not in seen:
        seen.add(id(below))
        error = below
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        return first_line(OSError(error.strerror))  # without its number
    return first_line(error)
