"""The spool of a run: every number, tag and text is a line of JSON in the run's folder before anything is sent.

    runs/demo/tracking/<id of the MLflow run>/00003-00001.jsonl
    {"kind":"opened","time_ms":1790000000000,"host":"node-1","pid":4242,"kept_bytes":{"00002-00001":18230}}
    {"kind":"metrics","time_ms":1790000000450,"step":120,"values":{"train/loss":0.41,"train/lr":0.1}}

There is one file for each process that ever wrote the spool, named by the driver's lease and a number in it. Only that
process appends to it (`tracker.Spool`).
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

MAX_LINE_BYTES = 64 << 20
"""Longest line that is read."""
_INT64 = 2**63
_MAX_PATH_CHARS = 500
_FILE_NAME = re.compile(r"(?:([0-9]{1,9})-)?([0-9]{1,9})\.jsonl")


# Lines.


class Opened(NamedTuple):
    """The first line of a file: who writes it, and how many bytes of each older file count."""

    time_ms: int
    host: str
    pid: int
    kept_bytes: Mapping[str, int]


class Metrics(NamedTuple):
    time_ms: int
    """Unix time of the call. Part of MLflow's key of a point, so a point that is sent twice is one point."""
    step: int
    values: Mapping[str, float]


class Tags(NamedTuple):
    time_ms: int
    values: Mapping[str, str]


class Text(NamedTuple):
    time_ms: int
    path: str
    content: str


Event = Metrics | Tags | Text


def encode(record: Opened | Event) -> bytes:
    """One line with its newline, pure ASCII. NaN and infinities become strings because JSON has none."""
    fields: dict[str, Any] = {"kind": type(record).__name__.lower(), **record._asdict()}
    if isinstance(record, Metrics):
        fields["values"] = {key: v if math.isfinite(v) else str(v) for key, v in record.values.items()}
    return json.dumps(fields, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Opened | Event:
    """The inverse of `encode`, with or without the newline; floats are restored exactly. Raises ValueError for anything
    that `encode` did not write: others may write to storage too, and the result is sent to a server.
    """
    try:
        fields = json.loads(line)
        record, checks = _KINDS[fields["kind"]]
        return record(*(check(fields[name]) for name, check in checks.items()))
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


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _INT64:
        raise ValueError(f"expected a whole number, got {value!r:.40}")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float, str):
        raise ValueError("expected a number")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or sendable(value) != value:
        raise ValueError("expected text")
    return value


def _by_name(check: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    return lambda values: {_text(name): check(value) for name, value in values.items()}


_KINDS: Mapping[str, tuple[Callable[..., Opened | Event], Mapping[str, Callable[[Any], Any]]]] = {
    "opened": (Opened, {"time_ms": _whole, "host": _text, "pid": _whole, "kept_bytes": _by_name(_whole)}),
    "metrics": (Metrics, {"time_ms": _whole, "step": _whole, "values": _by_name(_number)}),
    "tags": (Tags, {"time_ms": _whole, "values": _by_name(_text)}),
    "text": (Text, {"time_ms": _whole, "path": lambda path: artifact_path(_text(path)), "content": _text}),
}


# Files.


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


def spool_files(folder: Path) -> list[tuple[Path, int | None]]:
    """The files that count, oldest first, and how many bytes of each; None of the newest, which may grow."""
    numbered = [(number, path) for path in folder.glob("*.jsonl") if (number := file_number(path.name)) is not None]
    paths = [path for _, path in sorted(numbered) if path.is_file() and not path.is_symlink()]
    for last in reversed(range(len(paths))):
        with paths[last].open("rb") as file:
            try:
                opened = decode(file.readline(MAX_LINE_BYTES))
            except ValueError:
                continue  # its writer was killed before the first line was written
        if isinstance(opened, Opened):
            return [*((path, opened.kept_bytes.get(path.stem, 0)) for path in paths[:last]), (paths[last], None)]
    return []


# Reading.


class BadLine(NamedTuple):
    """A line that no spool wrote."""


def follow(
    folder: Path, known_steps: Mapping[str, int], limit: Callable[[], int] = lambda: sys.maxsize
) -> Iterator[Event | BadLine | None]:
    """Every event of a spool, each (key, step) once; None where there are no more by now: `next` may be called later.

    After a restart, training resumes at its last checkpoint and logs again steps that it logged before the fault. The
    steps of a key only grow, so a point is new exactly if its step is greater than the newest step of its key; all
    others are left out, and the first value counts. What a server already has is left out by the same rule.

    Args:
        known_steps: newest step of each key that is not wanted.
        limit: how many bytes of the newest file may be read by now.
    """
    newest_steps = dict(known_steps)
    for path, num_bytes in spool_files(folder):
        for line in _complete_lines(path, num_bytes, limit):
            try:
                record = decode(line) if line else None
            except ValueError:
                if num_bytes is not None:  # A power cut damaged the end of this file; its successor logged it again.
                    break
                yield BadLine()
                continue
            if isinstance(record, Metrics):
                new = {key: v for key, v in record.values.items() if record.step > newest_steps.get(key, -1)}
                if not new:
                    continue
                newest_steps.update(dict.fromkeys(new, record.step))
                record = record._replace(values=new)
            if not isinstance(record, Opened):
                yield record


def _complete_lines(path: Path, num_bytes: int | None, limit: Callable[[], int]) -> Iterator[bytes]:
    """The complete lines in the first `num_bytes`. None: in as many as `limit` says, then empty ones without end."""
    with path.open("rb") as file:
        while True:
            position = file.tell()
            end = limit() if num_bytes is None else num_bytes
            line = file.readline(max(0, min(MAX_LINE_BYTES, end - position)))
            if line.endswith(b"\n") or len(line) == MAX_LINE_BYTES:
                yield line
            elif num_bytes is not None:
                return
            else:
                file.seek(position)
                yield b""


def read_events(folder: Path) -> Iterator[Event]:
    """Everything in a spool, in order, without what no spool wrote."""
    for event in follow(folder, {}):
        if event is None:
            return
        if not isinstance(event, BadLine):
            yield event


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
    for event in read_events(spool_folder(run_dir, run_id)):
        if isinstance(event, Metrics):
            for key, value in event.values.items():
                points.setdefault(key, []).append((event.step, value))
                times_ms[key, event.step] = event.time_ms
        elif isinstance(event, Text):
            texts[event.path] = event.content
    return History(points, texts, times_ms)
