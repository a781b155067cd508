"""How a command ends.

0 done, 2 the user's mistake (one line on stderr), 1 anything else, 130/143 stopped by SIGINT/SIGTERM.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Mapping
from typing import NoReturn

import typer

from data_prep.errors import Fault, Interrupted, UserError
from data_prep.redaction import redacted
from data_prep.runtime.environment import blamed, correct_environment
from data_prep.runtime.import_path import look_here_last
from data_prep.shown import shown

MAX_LINE_CHARACTERS = 4000
_MAX_READ_CHARACTERS = 50 * MAX_LINE_CHARACTERS
"""Longer messages, which may quote a file, are cut before secrets are looked for."""
_HELP = frozenset({"--help", "-h"})


def run_and_exit(app: typer.Typer, command: str) -> NoReturn:
    """Corrects the environment, runs the command line and exits. With --json among the arguments, an error is also one
    line of JSON on stdout."""
    look_here_last()
    try:
        if sys.argv[1:] and _HELP.isdisjoint(sys.argv[1:]):
            correct_environment(command)
        sys.exit(app(standalone_mode=False, prog_name=command))
    except typer.TyperException as error:
        _fail(command, error.exit_code, error.format_message() or "see --help")
    except Interrupted as error:
        _fail(command, 128 + error.signal_number, f"stopped by {error}; the same command resumes")
    except (typer.Abort, KeyboardInterrupt):
        _fail(command, 130, "interrupted")
    except Exception as error:  # noqa: BLE001 - the last line of defence
        code, message = ending(error, os.environ)
        _fail(command, code, message or _unexpected(command, error))


def ending(error: Exception, environment: Mapping[str, str]) -> tuple[int, str | None]:
    """The exit code of an exception and its line; None for an unexpected one."""
    if (ray := sys.modules.get("ray")) is not None and isinstance(error, ray.exceptions.RayError):
        from data_prep.runtime.ray_errors import as_raised

        error = as_raised(error, "Ray")
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, Fault | OSError):  # OSError: a full disk, a lost permission, ...
        return 1, str(error)
    if isinstance(error, MemoryError):
        detail = f" ({error})" if str(error) else ""
        return 1, f"there is not enough memory{detail}; give it more (a container's limit, ulimit -v), or stop others"
    if isinstance(error, ValueError) and (why := blamed(error, environment)) is not None:
        return 2, why
    return 1, None


def _unexpected(command: str, error: Exception) -> str:
    """The cause in one line; the traceback is written to a file."""
    line = f"unexpected {type(error).__name__}: {error}"
    try:
        with tempfile.NamedTemporaryFile("w", prefix=f"{command}-", suffix=".log", delete=False) as log:
            log.write(redacted("".join(traceback.format_exception(error))))
    except OSError:  # no folder for temporary files can be written to
        return line
    return f"{line}; details are in {log.name}"


def _fail(command: str, code: int, message: str) -> NoReturn:
    if len(message) > _MAX_READ_CHARACTERS:  # cut between words: half a password might not be recognised
        message = message[:_MAX_READ_CHARACTERS].rpartition(" ")[0]
    line = shown(redacted(" ".join(message.split())), MAX_LINE_CHARACTERS)  # it may quote untrusted file names
    print(f"{command}: {line}", file=sys.stderr)
    if "--json" in sys.argv[1:]:
        print(json.dumps({"ok": False, "exit_code": code, "error": line}), flush=True)
    sys.exit(code)
