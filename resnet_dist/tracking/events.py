"""The events of a spool and their lines: pure, exact (floats survive the round trip), one JSON object per line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any


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
