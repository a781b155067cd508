"""`ledger.jsonl` in the sweep's folder: everything that happened, one line each, appended and never changed.

It is the sweep's only memory. Whoever reads it from the top knows which trials are finished, which go on and what the
search has seen, so a sweep can be killed at any moment.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.beton.files import open_regular, read_small
from resnet_dist.errors import Fault, UserError
from resnet_dist.tune.events import Event, decode, encode

FILE = "ledger.jsonl"
MAX_LEDGER_BYTES = 1 << 30


def ledger_file(sweep_dir: Path) -> Path:
    return sweep_dir / FILE


def read_ledger(sweep_dir: Path) -> list[Event]:
    """Everything so far; a last line that is being written is left out. Raises UserError, Fault for a damaged line."""
    path = ledger_file(sweep_dir)
    try:
        data = read_small(path, MAX_LEDGER_BYTES)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the folder of a sweep, <storage>/<sweep's name>") from None
    events = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        try:
            events.append(decode(line))
        except ValueError as error:
            raise Fault(f"{path}: line {number} is damaged ({error}); fix or remove that line") from None
    return events


class Ledger:
    """The one writer."""

    def __init__(self, descriptor: int, events: list[Event]) -> None:
        self._descriptor = descriptor
        self.events = events
        """All of them, those of this writer too."""

    def append(self, event: Event) -> None:
        """On return the event survives a power cut."""
        line = encode(event)
        while line:
            line = line[os.write(self._descriptor, line) :]
        os.fsync(self._descriptor)
        self.events.append(event)


@contextmanager
def open_ledger(sweep_dir: Path) -> Iterator[Ledger]:
    """For the one driver of the sweep; UserError while another one has it. The line of a killed writer is cut off."""
    path = ledger_file(sweep_dir)
    sweep_dir.mkdir(parents=True, exist_ok=True)
    descriptor = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{sweep_dir}: another command is running this sweep; wait for it, or stop it") from None
        data = read_small(path, MAX_LEDGER_BYTES)
        if not data.endswith(b"\n"):
            os.ftruncate(descriptor, data.rfind(b"\n") + 1)
        yield Ledger(descriptor, read_ledger(sweep_dir))
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)
