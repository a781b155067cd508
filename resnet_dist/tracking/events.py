"""The events of a spool and their lines: pure, exact (floats survive the round trip), one JSON object per line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
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
_KINDS: dict[str, type[Opened] | type[Metrics] | type[Tags] | type[Text]] = {
    "opened": Opened,
    "metrics": Metrics,
    "tags": Tags,
    "text": Text,
}


def encode(record: Opened | Event) -> bytes:
    """One line with its newline, pure ASCII. NaN and infinities are written as strings, as JSON has none."""
    fields: dict[str, Any] = {"kind": type(record).__name__.lower()}
    fields.update({name: getattr(record, name) for name in record.__slots__})
    if isinstance(record, Metrics):
        fields["values"] = {key: v if math.isfinite(v) else str(v) for key, v in record.values.items()}
    return json.dumps(fields, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Opened | Event:
    """The inverse of `encode`, newline or not. Raises ValueError for anything that `encode` did not write."""
    try:
        fields = json.loads(line)
        record = _KINDS[fields.pop("kind")](**fields)
        if isinstance(record, Metrics):
            return Metrics(record.seq, record.time_ms, record.step, {k: float(v) for k, v in record.values.items()})
        return record
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a line of a spool: {line[:80]!r}") from error


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
