"""The spool of a run: every number, tag and text is a line of JSON in the run's folder before anything is sent.

    runs/demo/tracking/<id of the MLflow run>/00003-00001.jsonl
    {"kind":"opened","time_ms":1790000000000,"host":"node-1","pid":4242,"kept_bytes":{"00002-00001":18230}}
    {"kind":"metrics","time_ms":1790000000450,"step":120,"values":{"train/loss":0.41,"train/lr":0.1}}

There is one file for each process that ever wrote the spool, named by the driver's lease and a number in it. Only that
process appends to it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from resnet_dist.errors import Fault
from resnet_dist.storage.base import RunStorage
from resnet_dist.storage.folder import FolderStorage

_log = logging.getLogger(__name__)
MAX_LINE_BYTES = 64 << 20
"""Longest line that is read."""
_CHUNK_BYTES = 1 << 18
_RETRY_WRITE_S = 1.0
_INT64 = 2**63
_MAX_PATH_CHARS = 500
_FILE_NAME = re.compile(r"(?:([0-9]{1,9})-)?([0-9]{1,9})\.jsonl")


# Lines.


@dataclass(frozen=True, slots=True)
class Opened:
    """The first line of a file: who writes it, and how many bytes of each older file count."""

    time_ms: int
    host: str
    pid: int
    kept_bytes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Metrics:
    time_ms: int
    """Unix time of the call. Part of MLflow's key of a point, so a point that is sent twice is one point."""
    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Tags:
    time_ms: int
    values: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Text:
    time_ms: int
    path: str
    content: str


Event = Metrics | Tags | Text


def encode(record: Opened | Event) -> bytes:
    """One line with its newline, pure ASCII. NaN and infinities become strings because JSON has none."""
    fields: dict[str, Any] = {"kind": type(record).__name__.lower()}
    fields.update({name: getattr(record, name) for name in record.__slots__})
    if isinstance(record, Metrics):
        fields["values"] = {key: v if math.isfinite(v) else str(v) for key, v in record.values.items()}
    return json.dumps(fields, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Opened | Event:
    """The inverse of `encode`, with or without the newline; floats are restored exactly. Raises ValueError for anything
    that `encode` did not write: others may write to storage too, and the result is sent to a server.
    """
    try:
        fields = json.loads(line)
        kind, time_ms = fields["kind"], _whole(fields["time_ms"])
        if kind == "metrics":
            return Metrics(time_ms, _whole(fields["step"], least=-_INT64), _numbers(fields["values"]))
        if kind == "tags":
            return Tags(time_ms, {_text(key): _text(value) for key, value in fields["values"].items()})
        if kind == "text":
            return Text(time_ms, artifact_path(_text(fields["path"])), _text(fields["content"]))
        if kind == "opened":
            kept = {_text(stem): _whole(num_bytes) for stem, num_bytes in fields["kept_bytes"].items()}
            return Opened(time_ms, _text(fields["host"]), _whole(fields["pid"]), kept)
        raise ValueError(f"kind {kind!r}")
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError, OverflowError) as error:
        raise ValueError(f"not a line of a spool: {line[:80]!r}") from error


def artifact_path(path: str) -> str:
    """Raises ValueError for a path that is not inside the run's artifacts: MLflow would never accept it."""
    parts = PurePosixPath(path).parts
    if not parts or parts[0] == "/" or ".." in parts or {"\\", "\0"} & set(path) or len(path) > _MAX_PATH_CHARS:
        raise ValueError(f"artifact_path: expected a relative path like notes/recipe.yaml, got {path[:200]!r}")
    return path


def sendable(text: str) -> str:
    """The text with lone surrogates and NUL, which UTF-8 and databases cannot hold, escaped."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def _whole(value: Any, least: int = 0) -> int:
    if type(value) is not int or not least <= value < _INT64:
        raise ValueError(f"expected a whole number, got {value!r:.40}")
    return value


def _numbers(values: Any) -> dict[str, float]:
    if any(type(value) not in (int, float, str) for value in values.values()):
        raise ValueError("expected numbers")
    return {_text(key): float(value) for key, value in values.items()}


def _text(value: Any) -> str:
    if not isinstance(value, str) or sendable(value) != value:
        raise ValueError("expected text")
    return value


# Reading.


def spool_folder(run_dir: Path, run_id: str, writer: str = "") -> Path:
    """The spool of an MLflow run: beside the checkpoints, so it outlives the node that wrote it.

    `writer`: empty for rank 0; a name like `node-1` for the spool of another node's system metrics.
    """
    return run_dir / ("tracking" + (f"-{writer}" if writer else "")) / run_id


def spool_folders(run_dir: Path) -> list[Path]:
    """Every spool in a run's folder, rank 0's first."""
    return sorted(path for path in run_dir.glob("tracking*/*") if path.is_dir() and not path.is_symlink())


def file_number(name: str) -> tuple[int, int] | None:
    """`00003-00001.jsonl` -> (3, 1), its position in the order of files. None for the name of any other file.

    Version 1 named files without a lease: `0002.jsonl` -> (0, 2).
    """
    found = _FILE_NAME.fullmatch(name)
    return (int(found[1] or 0), int(found[2])) if found else None


def newest_lease(run_dir: Path) -> int:
    """The newest lease that a file of the run's spools was written for; 0 if there is none."""
    numbers = [file_number(path.name) for path in run_dir.glob("tracking*/*/*.jsonl")]
    return max((number[0] for number in numbers if number is not None), default=0)


@dataclass(frozen=True)
class SpoolFile:
    path: Path
    num_bytes: int | None
    """How many bytes count; None for the newest file: all complete lines."""


def spool_files(folder: Path) -> list[SpoolFile]:
    """The files that count, oldest first. Empty if there is no spool."""
    numbered = [(number, path) for path in folder.glob("*.jsonl") if (number := file_number(path.name)) is not None]
    paths = [path for _, path in sorted(numbered) if path.is_file() and not path.is_symlink()]
    for last in reversed(range(len(paths))):
        _, first_record = next(_lines(paths[last], 0, MAX_LINE_BYTES), (0, None))
        if isinstance(first_record, Opened):  # else its writer was killed before the first line was written
            kept = first_record.kept_bytes
            return [*(SpoolFile(path, kept.get(path.stem, 0)) for path in paths[:last]), SpoolFile(paths[last], None)]
    return []


class SpoolReader:
    """Reads the events of a spool in order; called again, it continues where it stopped."""

    def __init__(self, folder: Path) -> None:
        self._files = spool_files(folder)
        self._index = 0
        self._offset = 0
        self.num_bad_lines = 0
        """Lines skipped so far because no spool wrote them."""

    def read(self, newest_limit_bytes: int | None = None, chunk_bytes: int = _CHUNK_BYTES) -> list[Event]:
        """The next events, from about `chunk_bytes` of lines; empty when there are no more now.

        `newest_limit_bytes`: nothing after this many bytes of the newest file is read yet.
        """
        events: list[Event] = []
        while self._index < len(self._files):
            file, is_newest = self._files[self._index], self._index == len(self._files) - 1
            limit = newest_limit_bytes if is_newest else file.num_bytes
            began = self._offset
            for self._offset, record in _lines(file.path, began, limit):
                if record is None:
                    self.num_bad_lines += 1
                elif not isinstance(record, Opened):
                    events.append(record)
                if self._offset - began >= chunk_bytes and events:
                    return events
            if events or is_newest:
                return events
            self._index, self._offset = self._index + 1, 0
        return events

    def num_unread_bytes(self) -> int:
        """Bytes after the last line that was read: a torn line."""
        return self._files[self._index].path.stat().st_size - self._offset if self._files else 0


def _lines(path: Path, start: int, limit: int | None) -> Iterator[tuple[int, Opened | Event | None]]:
    """For every complete line between two offsets: the offset after it, and its record, None if no spool wrote it."""
    with path.open("rb") as file:
        file.seek(start)
        while line := file.readline(MAX_LINE_BYTES if limit is None else max(0, min(MAX_LINE_BYTES, limit - start))):
            if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
                return
            start += len(line)
            try:
                yield start, decode(line)
            except ValueError:
                yield start, None


@dataclass(frozen=True)
class History:
    """Everything that a run has logged, read from its spool: complete even if the server never received it."""

    points: Mapping[str, list[tuple[int, float]]] = field(default_factory=dict)
    """(step, value) of every metric, in the order of steps."""
    texts: Mapping[str, str] = field(default_factory=dict)
    times_ms: Mapping[tuple[str, int], int] = field(default_factory=dict)
    """Unix time of every (metric, step)."""


def read_history(run_dir: Path, run_id: str) -> History:
    """Everything in the spool of rank 0; empty if there is none."""
    points: dict[str, list[tuple[int, float]]] = {}
    texts: dict[str, str] = {}
    times_ms: dict[tuple[str, int], int] = {}
    reader = SpoolReader(spool_folder(run_dir, run_id))
    while events := reader.read():
        for event in events:
            if isinstance(event, Metrics):
                for key, value in event.values.items():
                    points.setdefault(key, []).append((event.step, value))
                    times_ms[key, event.step] = event.time_ms
            elif isinstance(event, Text):
                texts[event.path] = event.content
    return History(points, texts, times_ms)


# Writing.


def unseen(values: Mapping[str, float], step: int, newest_steps: Mapping[str, int]) -> dict[str, float]:
    """The values whose (key, step) was not logged yet: the rule for replayed steps.

    After a restart, training resumes at its last checkpoint and computes again steps that were logged before the fault.
    The steps of a key only grow, so a point is new exactly if its step is greater than the newest step of its key;
    all others are left out, and the first value is kept.
    """
    return {key: v for key, v in values.items() if key not in newest_steps or step > newest_steps[key]}


class Spool:
    """The writer. `append_*` puts a line in memory (microseconds); a thread writes and syncs it.

    The thread writes a line at once, so a SIGKILL loses at most the lines of the last milliseconds; a lost machine at
    most those of the storage's `sync_every_s`: a second in a folder, five in an object store. When storage is full or
    unreachable, lines stay in memory and the thread tries again.
    """

    def __init__(
        self,
        folder: Path,
        storage: RunStorage | None = None,
        *,
        lease: int | None = None,
        on_durable: Callable[[], None] = lambda: None,
    ) -> None:
        """Opens a new file of the spool, and continues where the older ones end.

        Args:
            folder: the spool, inside `storage.folder`; without `storage`, it is the storage.
            lease: number of the driver's lease. None: that of the newest file.
            on_durable: called by the writing thread whenever `durable_bytes` has grown.

        Raises Fault if a driver with a newer lease has opened the spool, OSError if storage cannot be written.
        """
        self._storage = storage or FolderStorage(folder)
        self._on_durable = on_durable
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        # Create first, then measure: lines that an older writer appends after its successor exists do not count.
        self.path = self._create_file(lease)
        self._storage.pull()
        kept_bytes, newest_steps = self._measure_older_files()
        self.newest_steps = newest_steps
        """Newest step of every key in the spool."""
        opening = encode(Opened(_now_ms(), socket.gethostname(), os.getpid(), kept_bytes))
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        os.write(self._file, opening)
        self._storage.extended(self.path, len(opening))
        self.durable_bytes = len(opening)
        """Bytes of this file in storage, in complete lines."""
        self._appended_bytes = len(opening)
        self._changed = threading.Condition()
        self._lines: list[bytes] = []
        self._sync_wanted = False
        self._closing = False
        self._thread = threading.Thread(target=self._write_until_closed, name="spool-writer", daemon=True)
        self._thread.start()

    def append_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Leaves out what is in the spool already (`unseen`)."""
        with self._changed:
            new = unseen(values, step, self.newest_steps)
            if new:
                self._append(Metrics(_now_ms(), step, new))
                self.newest_steps.update(dict.fromkeys(new, step))

    def append_tags(self, values: Mapping[str, str]) -> None:
        with self._changed:
            self._append(Tags(_now_ms(), values))

    def append_text(self, path: str, content: str) -> None:
        with self._changed:
            self._append(Text(_now_ms(), path, content))

    def persist(self, timeout_s: float) -> bool:
        """Waits until everything appended so far is in storage. False if that took longer than `timeout_s`."""
        with self._changed:
            num_bytes = self._appended_bytes
            self._sync_wanted = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self.durable_bytes >= num_bytes, timeout_s)

    def is_newest(self) -> bool:
        """False once another writer has opened the spool: from then on this one must send nothing."""
        return self._newest_number() == file_number(self.path.name)

    def close(self, timeout_s: float) -> bool:
        """Writes and syncs what is left. False if storage did not accept it within `timeout_s`."""
        done = self.persist(timeout_s)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s if done else 0.0)
        if not done:
            _log.error("%s: storage did not accept the last lines of this run within %.0f s", self.path, timeout_s)
        return done

    def _append(self, event: Event) -> None:
        if self._closing:
            raise RuntimeError(f"{self.path}: the spool is closed")
        line = encode(event)
        self._lines.append(line)
        self._appended_bytes += len(line)
        self._changed.notify_all()

    def _create_file(self, lease: int | None) -> Path:
        """A new file after all others, created exclusively by this process."""
        while True:
            newest_lease, newest = self._newest_number()
            if lease is not None and lease < newest_lease:
                raise Fault(f"{self._folder}: another driver has taken over this run; this one ends")
            number = newest + 1 if lease in (None, newest_lease) else 1
            path = self._folder / f"{newest_lease if lease is None else lease:05d}-{number:05d}.jsonl"
            if self._storage.create_exclusive(path):
                return path

    def _newest_number(self) -> tuple[int, int]:
        """Of all files in storage, including those of other machines."""
        names = self._storage.names(str(self._folder.relative_to(self._storage.folder)))
        return max((number for name in names if (number := file_number(name)) is not None), default=(0, 0))

    def _measure_older_files(self) -> tuple[dict[str, int], dict[str, int]]:
        """How many bytes of each older file count from now on, and the newest step of every key in them.

        A file counts up to the first damaged line: what was logged after it is computed and logged again.
        """
        kept_bytes: dict[str, int] = {}
        newest_steps: dict[str, int] = {}
        for file in spool_files(self._folder):
            good = 0
            for offset, record in _lines(file.path, 0, file.num_bytes):
                if record is None:
                    break
                good = offset
                if isinstance(record, Metrics):
                    newest_steps.update(dict.fromkeys(record.values, record.step))
            kept_bytes[file.path.stem] = good
            size = file.path.stat().st_size if file.num_bytes is None else file.num_bytes
            if good < size:
                _log.warning("%s: %d torn or unreadable bytes at its end are left out", file.path, size - good)
        return kept_bytes, newest_steps

    def _write_until_closed(self) -> None:
        unwritten = b""
        num_written = self.durable_bytes  # handed to the kernel
        next_sync_s = time.monotonic()
        failing = False
        while True:
            with self._changed:
                if failing:
                    self._changed.wait_for(lambda: self._closing, _RETRY_WRITE_S)
                else:
                    is_idle = num_written == self.durable_bytes
                    timeout_s = None if is_idle else max(0.0, next_sync_s - time.monotonic())
                    self._changed.wait_for(lambda: self._lines or self._sync_wanted or self._closing, timeout_s)
                unwritten += b"".join(self._lines)
                self._lines.clear()
                closing, sync_now = self._closing, self._sync_wanted or self._closing
                self._sync_wanted = False
            try:
                while unwritten:
                    num_bytes = os.write(self._file, unwritten)
                    unwritten, num_written = unwritten[num_bytes:], num_written + num_bytes
                if num_written > self.durable_bytes and (sync_now or time.monotonic() >= next_sync_s):
                    self._storage.extended(self.path, num_written)
                    next_sync_s = time.monotonic() + self._storage.sync_every_s
                    with self._changed:
                        self.durable_bytes = num_written
                        self._changed.notify_all()
                    self._on_durable()
                if failing:
                    _log.warning("%s: can be written again", self.path)
                failing = False
            except OSError as error:
                if not failing:
                    _log.warning("%s: cannot be written (%s); lines wait in memory", self.path, error)
                failing = True
                with self._changed:
                    self._sync_wanted |= sync_now
            if closing:
                os.close(self._file)
                return


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
