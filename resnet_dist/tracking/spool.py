"""The events of a spool and their lines: pure, exact (floats survive the round trip), one JSON object per line."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from resnet_dist.storage.base import RunStorage
from resnet_dist.storage.folder import FolderStorage


@dataclass(frozen=True, slots=True)
class Opened:
    """The first line of a segment: who writes it, and how many bytes of each older segment count."""

    time_ms: int
    host: str
    pid: int
    kept_bytes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Metrics:
    seq: int
    time_ms: int
    """Unix time of the call. Part of MLflow's key of a point, so a point that is sent twice is one point."""
    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Tags:
    seq: int
    time_ms: int
    values: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Text:
    seq: int
    time_ms: int
    path: str
    content: str


Event = Metrics | Tags | Text
_INT64 = 2**63
_MAX_PATH_CHARS = 500


def encode(record: Opened | Event) -> bytes:
    """One line with its newline, pure ASCII. NaN and infinities are written as strings, as JSON has none."""
    fields: dict[str, Any] = {"kind": type(record).__name__.lower()}
    fields.update({name: getattr(record, name) for name in record.__slots__})
    if isinstance(record, Metrics):
        fields["values"] = {key: v if math.isfinite(v) else str(v) for key, v in record.values.items()}
    return json.dumps(fields, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Opened | Event:
    """The inverse of `encode`, newline or not. Raises ValueError for anything that `encode` did not write: a spool lies
    in storage, where others may write too, and what comes out of here is sent to a server.
    """
    try:
        fields = json.loads(line)
        kind = fields.pop("kind")
        if kind == "metrics":
            return Metrics(**_numbered(fields), step=_whole(fields["step"], -_INT64), values=_values(fields["values"]))
        if kind == "tags":
            return Tags(**_numbered(fields), values={_text(k): _text(v) for k, v in fields["values"].items()})
        if kind == "text":
            return Text(
                **_numbered(fields), path=artifact_path(_text(fields["path"])), content=_text(fields["content"])
            )
        if kind == "opened":
            kept = {_text(stem): _whole(num_bytes) for stem, num_bytes in fields["kept_bytes"].items()}
            return Opened(_whole(fields["time_ms"]), _text(fields["host"]), _whole(fields["pid"]), kept)
        raise ValueError(f"kind {kind!r}")
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError, OverflowError) as error:
        raise ValueError(f"not a line of a spool: {line[:80]!r}") from error


def artifact_path(path: str) -> str:
    """Raises ValueError for a path that is not inside the run's artifacts: MLflow would refuse it for ever."""
    parts = PurePosixPath(path).parts
    if not parts or parts[0] == "/" or ".." in parts or {"\\", "\0"} & set(path) or len(path) > _MAX_PATH_CHARS:
        raise ValueError(f"artifact_path: expected a relative path like notes/recipe.yaml, got {path[:200]!r}")
    return path


def sendable(text: str) -> str:
    """The text with what UTF-8 and databases have no place for written out: lone surrogates and NUL."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def _numbered(fields: Mapping[str, Any]) -> dict[str, int]:
    return {"seq": _whole(fields["seq"]), "time_ms": _whole(fields["time_ms"])}


def _whole(value: Any, least: int = 0) -> int:
    if type(value) is not int or not least <= value < _INT64:
        raise ValueError(f"expected a whole number, got {value!r:.40}")
    return value


def _values(values: Any) -> dict[str, float]:
    if any(type(value) not in (int, float, str) for value in values.values()):
        raise ValueError("expected numbers")
    return {_text(key): float(value) for key, value in values.items()}


def _text(value: Any) -> str:
    if not isinstance(value, str) or sendable(value) != value:
        raise ValueError("expected text")
    return value


def unseen(values: Mapping[str, float], step: int, newest_steps: Mapping[str, int]) -> dict[str, float]:
    """The values whose (key, step) was not logged yet: THE RULE OF REPLAYS.

    After a restart, training resumes at its last checkpoint and computes again steps whose points were logged before
    the fault. The steps of a key only grow, so a point is new exactly if its step is greater than the newest step of
    its key; every other one is left out, and the first value stands. Two things can know that newest step:

    - the spool, which holds every point of the run: asked here by the caller, from memory (`Spool.newest_steps`);
    - the server, when the spool itself was lost or begins on another disk: asked once, by the background thread,
      before a new spool's first batch (`Delivery`), and kept beside the spool; until then the points wait in the
      spool, and what the server already has is left out when they are sent.
    """
    return {key: v for key, v in values.items() if key not in newest_steps or step > newest_steps[key]}


# A spool on disk, as its readers see it: a folder of segments `0001.jsonl`, `0002.jsonl`, ...


MAX_LINE_BYTES = 64 << 20
"""Of a line that is read."""


def spool_folder(run_dir: Path, run_id: str, writer: str = "") -> Path:
    """Where the spool of an MLflow run lies: with the checkpoints, so it outlives the node that wrote it.

    `writer`: empty for rank 0; a name like `node-1` for the spool of another node's system metrics.
    """
    return run_dir / ("tracking" + (f"-{writer}" if writer else "")) / run_id


def spool_folders(run_dir: Path) -> list[Path]:
    """Every spool in a run's folder, rank 0's first."""
    return sorted(path for path in run_dir.glob("tracking*/*") if path.is_dir() and not path.is_symlink())


@dataclass(frozen=True)
class Segment:
    path: Path
    num_bytes: int | None
    """How many bytes count; None for the newest segment: as many whole lines as there are."""


def segments(folder: Path) -> list[Segment]:
    """The segments that count, oldest first. Empty if there is no spool."""
    paths = segment_paths(folder)
    for last in reversed(range(len(paths))):
        opened = _opening(paths[last])
        if opened is not None:  # None: its writer was killed before the first line stood
            old = [Segment(path, opened.kept_bytes.get(path.stem, 0)) for path in paths[:last]]
            return [*old, Segment(paths[last], None)]
    return []


@dataclass(frozen=True)
class Parsed:
    records: list[Opened | Event]
    """Of every readable line."""
    num_bytes: int
    """Of the whole lines."""
    num_bad: int
    """Whole lines that no spool wrote."""
    num_before_bad: int
    """Records before the first bad line."""
    bytes_before_bad: int


def parse(data: bytes) -> Parsed:
    """The whole lines at the start of `data`."""
    records: list[Opened | Event] = []
    num_bytes = num_bad = 0
    before_bad: tuple[int, int] | None = None
    while (end := data.find(b"\n", num_bytes)) >= 0:
        try:
            records.append(decode(data[num_bytes:end]))
        except ValueError:
            before_bad = before_bad or (len(records), num_bytes)
            num_bad += 1
        num_bytes = end + 1
    return Parsed(records, num_bytes, num_bad, *(before_bad or (len(records), num_bytes)))


class SpoolReader:
    """Reads the events of a spool in order, and goes on where it stopped when there are more."""

    def __init__(self, folder: Path) -> None:
        self._segments = segments(folder)
        self._index = 0
        self._offset = 0
        self.num_bad_lines = 0
        """Lines that no spool wrote, passed over so far."""

    def read(self, newest_limit_bytes: int | None = None, chunk_bytes: int = 1 << 18) -> list[Event]:
        """The next events, about `chunk_bytes` of them; empty when there are no more now.

        `newest_limit_bytes`: nothing after this many bytes of the newest segment is read yet.
        """
        while self._index < len(self._segments):
            segment = self._segments[self._index]
            newest = self._index == len(self._segments) - 1
            limit = newest_limit_bytes if newest else segment.num_bytes
            records = self._read_lines(segment.path, limit, chunk_bytes)
            events = [record for record in records if not isinstance(record, Opened)]
            if events:
                return events
            if not records:
                if newest:
                    return []
                self._index, self._offset = self._index + 1, 0
        return []

    def num_unread_bytes(self) -> int:
        """Bytes after the last line read in the segment being read: a torn line."""
        if self._index >= len(self._segments):
            return 0
        return self._segments[self._index].path.stat().st_size - self._offset

    def _read_lines(self, path: Path, limit: int | None, chunk_bytes: int) -> list[Opened | Event]:
        num_bytes = path.stat().st_size
        available = (num_bytes if limit is None else min(limit, num_bytes)) - self._offset
        while available > 0:
            with path.open("rb") as file:
                file.seek(self._offset)
                parsed = parse(file.read(min(chunk_bytes, available)))
            if parsed.num_bytes or chunk_bytes >= available:
                self._offset += parsed.num_bytes
                self.num_bad_lines += parsed.num_bad
                if parsed.records or not parsed.num_bytes:
                    return parsed.records
                available -= parsed.num_bytes  # bad lines only: go on behind them
            elif chunk_bytes >= MAX_LINE_BYTES:
                available -= self._pass_over(path, available)
            else:
                chunk_bytes *= 2  # a line longer than the chunk: a text artifact
        return []

    def _pass_over(self, path: Path, available: int) -> int:
        """A line longer than any of a spool: how many bytes it takes."""
        self.num_bad_lines += 1
        began = self._offset
        with path.open("rb") as file:
            file.seek(began)
            while self._offset < began + available and (data := file.read(MAX_LINE_BYTES)):
                end = data.find(b"\n")
                self._offset += end + 1 if end >= 0 else len(data)
                if end >= 0:
                    break
        return self._offset - began


def segment_paths(folder: Path) -> list[Path]:
    """Every segment's file, oldest first."""
    found = [(number, path) for path in folder.glob("*.jsonl") if (number := segment_number(path.name)) is not None]
    return [path for _, path in sorted(found) if path.is_file() and not path.is_symlink()]


def segment_number(name: str) -> int | None:
    """`0007.jsonl` -> 7; None for files that are no segments."""
    return int(name[:-6]) if re.fullmatch(r"[0-9]{1,9}\.jsonl", name) else None


def _opening(path: Path) -> Opened | None:
    with contextlib.suppress(ValueError), path.open("rb") as file:
        line = file.readline(MAX_LINE_BYTES)
        record = decode(line)
        if line.endswith(b"\n") and isinstance(record, Opened):
            return record
    return None


# The writer of a spool: every event of a run becomes a line of JSON in the run's folder before anything is sent.


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


# What a run has logged, read back from its spool: complete also when the server never saw it.


@dataclass(frozen=True)
class History:
    points: Mapping[str, list[tuple[int, float]]] = field(default_factory=dict)
    """(step, value) of every metric, in the order of steps."""
    texts: Mapping[str, str] = field(default_factory=dict)
    times_ms: Mapping[tuple[str, int], int] = field(default_factory=dict)
    """Unix time of every (metric, step)."""


def read_history(run_dir: Path, run_id: str) -> History:
    """Everything in the spool of rank 0; empty if there is none."""
    folder = spool_folder(run_dir, run_id)
    points: dict[str, list[tuple[int, float]]] = {}
    texts: dict[str, str] = {}
    times_ms: dict[tuple[str, int], int] = {}
    reader = SpoolReader(folder)
    while events := reader.read():
        for event in events:
            if isinstance(event, Metrics):
                for key, value in event.values.items():
                    points.setdefault(key, []).append((event.step, value))
                    times_ms[key, event.step] = event.time_ms
            elif isinstance(event, Text):
                texts[event.path] = event.content
    return History(points, texts, times_ms)
