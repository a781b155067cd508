"""How a command ends.

0 done, 2 the user's mistake (one line on stderr), 1 anything else, 130/143 stopped by SIGINT/SIGTERM.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from typing import NoReturn

import typer

from data_prep.errors import Fault, Stopped, UserError
from data_prep.redaction import redacted
from data_prep.shown import shown

MAX_LINE_CHARACTERS = 4000
_MAX_READ_CHARACTERS = 50 * MAX_LINE_CHARACTERS
"""Of a message, which may quote a file."""


def run_and_exit(app: typer.Typer, command: str) -> NoReturn:
    """Runs the command line and exits. With --json among its words, an error is also one line of JSON on stdout."""
    try:
        sys.exit(app(standalone_mode=False, prog_name=command))
    except typer.TyperException as error:
        _fail(command, error.exit_code, error.format_message() or "see --help")
    except Stopped as error:
        _fail(command, 128 + error.signal_number, f"stopped by {error}; the same command goes on from where it was")
    except (typer.Abort, KeyboardInterrupt):
        _fail(command, 130, "interrupted")
    except UserError as error:
        _fail(command, 2, str(error))
    except (Fault, OSError) as error:  # OSError: a full disk, a lost permission, ...
        _fail(command, 1, str(error))
    except Exception as error:  # noqa: BLE001 - the last line of defence: the cause in one line, the rest in a file
        with tempfile.NamedTemporaryFile("w", prefix=f"{command}-", suffix=".log", delete=False) as log:
            log.write(redacted("".join(traceback.format_exception(error))))
        _fail(command, 1, f"unexpected {type(error).__name__}: {error}; the whole story is in {log.name}")


def _fail(command: str, code: int, message: str) -> NoReturn:
    if len(message) > _MAX_READ_CHARACTERS:  # whole words only: of a password in two parts neither looks like one
        message = message[:_MAX_READ_CHARACTERS].rpartition(" ")[0]
    line = shown(redacted(" ".join(message.split())), MAX_LINE_CHARACTERS)  # file names from outside are in it
    print(f"{command}: {line}", file=sys.stderr)
    if "--json" in sys.argv[1:]:
        print(json.dumps({"ok": False, "exit_code": code, "error": line}), flush=True)
    sys.exit(code)
