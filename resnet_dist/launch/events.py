"""What happened to a run besides training: starts, restarts, resizes, ends. One line each, in `events.log`."""

from __future__ import annotations

import os
import re
import time
from itertools import pairwise

from data_prep.beton.files import Unfit, append, open_regular
from data_prep.redaction import redacted
from resnet_dist.launch.control import Status
from resnet_dist.storage.base import RunStorage

_MAX_READ_BYTES = 1 << 20
_WORKERS = re.compile(r"^\S+ workers up: (\d+)")


class EventLog:
    """Appends to the run's `events.log`, which outlives the driver."""

    def __init__(self, storage: RunStorage) -> None:
        self._storage = storage
        self.path = storage.folder / "events.log"
        self._attempt = 0
        self._step = 0
        self._num_warnings = 0
        self._unwritten: list[str] = []

    def note(self, event: str) -> None:
        """One line, the time (UTC) before it."""
        self._unwritten.append(
            f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {redacted(' '.join(event.split()))}\n"
        )
        try:
            append(self.path, "".join(self._unwritten))
            self._unwritten.clear()
            self._storage.publish(self.path)
        except OSError:
            return  # a full disk or a store that is away ends no run here; written with the next event

    def observe(self, status: Status) -> None:
        """Call it often; it notes every worker group that began, and every warning."""
        if status.attempt < self._attempt:  # the actor was killed, and counts anew
            self._attempt = self._num_warnings = 0
        if status.attempt > self._attempt and status.resumed_step is not None:
            before = f" (seen at step {self._step} before)" if self._attempt else ""
            self.note(f"workers up: {status.world_size}, going on from step {status.resumed_step}{before}")
            self._attempt = status.attempt
        if status.resumed_step is not None:
            self._step = status.step
        for warning in status.warnings[self._num_warnings :]:
            self.note(f"warning: {warning}")
        self._num_warnings = max(self._num_warnings, len(status.warnings))

    def read(self) -> str:
        """The newest megabyte of it."""
        try:
            with os.fdopen(open_regular(self.path, os.O_RDONLY), "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _MAX_READ_BYTES))
                return file.read(_MAX_READ_BYTES).decode("utf-8", "replace")
        except (FileNotFoundError, Unfit):
            return ""


def count_events(log: str) -> dict[str, str]:
    """Tags of the run: how often its workers were started again, and how often in another number."""
    sizes = [int(match.group(1)) for line in log.splitlines() if (match := _WORKERS.match(line))]
    resizes = sum(before != after for before, after in pairwise(sizes))
    return {"restarts": str(max(len(sizes) - 1, 0)), "resizes": str(resizes)}
