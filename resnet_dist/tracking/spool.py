"""The writer of a spool: every event of a run becomes a line of JSON in the run's folder before anything is sent."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from resnet_dist.storage.base import RunStorage
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.tracking.events import Event, Metrics, Opened, Tags, Text, encode, unseen
from resnet_dist.tracking.segments import parse, segment_number, segments

_log = logging.getLogger(__name__)
_RETRY_WRITE_S = 1.0


class Spool:
    """The writer. `append_*` only puts a line in memory (microseconds); a thread writes and syncs it.

    The writing thread picks a line up at once, so a SIGKILL loses at most the lines of the last milliseconds; a lost
    machine at most those of `sync_interval_s`: a second in a folder, five in an object store. Storage that is full
    or away is tried again, with the lines kept in memory.
    Opening continues the numbering of the older segments; a torn last line of theirs is left out (`num_dropped_lines`).
    Raises OSError from the constructor only.
    """

    def __init__(
        self,
        folder: Path,
        storage: RunStorage | None = None,
        *,
        sync_interval_s: float | None = None,
        on_durable: Callable[[], None] = lambda: None,
    ) -> None:
        """`folder` lies in `storage.folder`; without `storage` it is the storage."""
        self._folder = folder
        self._storage = storage or FolderStorage(folder)
        self._sync_interval_s = self._storage.sync_every_s if sync_interval_s is None else sync_interval_s
        self.on_durable = on_durable
        """Called by the writing thread whenever more events have become durable."""
        folder.mkdir(parents=True, exist_ok=True)
        # Claim first, then measure: whatever an older writer appends after the claim does not count.
        self.path = self._claim()
        self._storage.pull()
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        self.newest_steps: dict[str, int] = {}
        """Newest step of every key in the spool."""
        self.num_dropped_lines = 0
        self._last_seq = 0
        opening = encode(Opened(_now_ms(), socket.gethostname(), os.getpid(), self._take_stock()))
        os.write(self._file, opening)
        self._storage.extended(self.path, len(opening))
        self._durable = (self._last_seq, len(opening))

        self._changed = threading.Condition()
        self._lines: list[bytes] = []
        self._sync_wanted = False
        self._closing = False
        self._writer = threading.Thread(target=self._write_until_closed, name="spool-writer", daemon=True)
        self._writer.start()

    @property
    def last_seq(self) -> int:
        """Number of the newest event appended; 0 before the first."""
        return self._last_seq

    @property
    def durable(self) -> tuple[int, int]:
        """Number of the newest event on disk, and the bytes of this segment up to its end."""
        return self._durable

    def append_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Leaves out what the spool has already, by the rule of `unseen`."""
        with self._changed:
            new = unseen(values, step, self.newest_steps)
            if new:
                self._append(Metrics(self._last_seq + 1, _now_ms(), step, new))
                self.newest_steps.update(dict.fromkeys(new, step))

    def append_tags(self, values: Mapping[str, str]) -> None:
        with self._changed:
            self._append(Tags(self._last_seq + 1, _now_ms(), values))

    def append_text(self, path: str, content: str) -> None:
        with self._changed:
            self._append(Text(self._last_seq + 1, _now_ms(), path, content))

    def persist(self, timeout_s: float) -> bool:
        """Waits until every event appended so far is on disk. False if that took longer than `timeout_s`."""
        with self._changed:
            seq = self._last_seq
            self._sync_wanted = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._durable[0] >= seq, timeout_s)

    def is_newest(self) -> bool:
        """False as soon as another writer has opened the spool: then this one must send nothing any more."""
        return max(self._segment_numbers(), default=0) == int(self.path.stem)

    def close(self, timeout_s: float) -> bool:
        """Writes and syncs what is left. False if storage did not take it within `timeout_s`."""
        done = self.persist(timeout_s)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._writer.join(timeout_s if done else 0.0)
        if not done:
            _log.error("%s: storage did not take the last events of this run within %.0f s", self.path, timeout_s)
        return done

    def _append(self, event: Event) -> None:
        if self._closing:
            raise RuntimeError(f"{self.path}: the spool is closed")
        self._lines.append(encode(event))
        self._last_seq = event.seq
        self._changed.notify_all()

    def _claim(self) -> Path:
        """A new segment after all others, created by this process alone."""
        while True:
            path = self._folder / f"{max(self._segment_numbers(), default=0) + 1:04d}.jsonl"
            if self._storage.claim(path):
                return path

    def _segment_numbers(self) -> list[int]:
        """Of all segments in storage, those of other machines too."""
        names = self._storage.names(str(self._folder.relative_to(self._storage.folder)))
        return [number for name in names if (number := segment_number(name)) is not None]

    def _take_stock(self) -> dict[str, int]:
        """Reads the older segments; how many bytes of each count from now on: those before the first damage, as what
        was logged after it is computed and logged again. But its numbers are taken: it may have been sent.
        """
        kept: dict[str, int] = {}
        for segment in segments(self._folder):
            data = segment.path.read_bytes()[: segment.num_bytes]
            parsed = parse(data)
            kept[segment.path.stem] = parsed.bytes_before_bad
            self.num_dropped_lines += len(data[parsed.bytes_before_bad :].splitlines())
            for index, record in enumerate(parsed.records):
                if isinstance(record, Opened):
                    continue
                self._last_seq = max(self._last_seq, record.seq)
                if isinstance(record, Metrics) and index < parsed.num_before_bad:
                    self.newest_steps.update(dict.fromkeys(record.values, record.step))
        if self.num_dropped_lines:
            _log.warning("%s: %d torn or unreadable lines dropped", self._folder, self.num_dropped_lines)
        return kept

    def _write_until_closed(self) -> None:
        buffer = b""
        written = self._durable  # (seq, bytes) handed to the kernel
        next_sync_s = time.monotonic()
        failing = False
        while True:
            with self._changed:
                idle = not buffer and written == self._durable
                timeout_s = None if idle else max(0.0, next_sync_s - time.monotonic())
                if failing:
                    self._changed.wait_for(lambda: self._closing, _RETRY_WRITE_S)
                else:
                    self._changed.wait_for(lambda: self._lines or self._sync_wanted or self._closing, timeout_s)
                buffer += b"".join(self._lines)
                self._lines.clear()
                last_seq, sync_wanted, closing = self._last_seq, self._sync_wanted, self._closing
                self._sync_wanted = False
            try:
                while buffer:
                    num_bytes = os.write(self._file, buffer)
                    buffer = buffer[num_bytes:]
                    written = (written[0], written[1] + num_bytes)
                written = (last_seq, written[1])
                if written != self._durable and (sync_wanted or closing or time.monotonic() >= next_sync_s):
                    self._storage.extended(self.path, written[1])
                    next_sync_s = time.monotonic() + self._sync_interval_s
                    with self._changed:
                        self._durable = written
                        self._changed.notify_all()
                    self.on_durable()
                if failing:
                    _log.warning("%s: can be written again", self.path)
                failing = False
            except OSError as error:
                if not failing:
                    _log.warning("%s: cannot be written (%s); events wait in memory", self.path, error)
                failing = True
                with self._changed:
                    self._sync_wanted = self._sync_wanted or sync_wanted
            if closing:
                os.close(self._file)
                return


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
