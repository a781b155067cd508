"""Ends a worker that makes no progress, and records what it was doing.

A worker that hangs in Python or in the loader keeps its peers waiting in a collective, and Ray sees a healthy process.
So each worker watches itself; when it ends, Ray restarts the workers from the newest checkpoint.
"""

from __future__ import annotations

import faulthandler
import io
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from data_prep.beton.files import create, make_folder

EXIT_CODE = 70
_DUMP_LIMIT_S = 10.0


class Watchdog:
    """Ends the process if `heartbeat` is not called for `limit_s`; the stacks of all threads go to `dump` first.

    `publish` brings that file to where the user finds it; both together get ten seconds.
    """

    def __init__(self, limit_s: float, dump: Path, publish: Callable[[Path], None] = lambda path: None) -> None:
        self._limit_s = limit_s
        self._dump = dump
        self._publish = publish
        self._last_beat_s = time.monotonic()
        self._done = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def heartbeat(self) -> None:
        self._last_beat_s = time.monotonic()

    def close(self) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._limit_s / 4)):
            silent_s = time.monotonic() - self._last_beat_s
            if silent_s > self._limit_s:
                self._end(silent_s)

    def _end(self, silent_s: float) -> None:
        try:
            # The storage that the dump goes to may be what hangs.
            dumping = threading.Thread(target=self._write_dump, args=(silent_s,), daemon=True)
            dumping.start()
            dumping.join(_DUMP_LIMIT_S)
        finally:
            os._exit(EXIT_CODE)  # a thread that hangs in C cannot be asked to end

    def _write_dump(self, silent_s: float) -> None:
        make_folder(self._dump.parent)
        with create(self._dump) as raw, io.TextIOWrapper(raw, encoding="utf-8") as file:
            file.write(f"no progress for {silent_s:.0f} s (limit {self._limit_s:g} s); the worker ended here:\n\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
        self._publish(self._dump)
