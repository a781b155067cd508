"""The second signal to a command that is already ending: it says so, and is over within seconds."""

from __future__ import annotations

import os
import sys
import threading

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
