"""A spool on disk, as its readers see it: a folder of segments `0001.jsonl`, `0002.jsonl`, ...

There is one segment for each process that ever wrote the spool, and the newest one's writer owns it. Nobody writes into
another's file, so a worker that was given up for dead but still runs on a cut-off node can spoil nothing: the first
line of a segment fixes how many bytes of the older ones count.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.tracking.events import Event, Opened, decode

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
