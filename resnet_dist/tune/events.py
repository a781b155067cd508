"""What can happen in a sweep: the lines of its ledger. Plain data; times are Unix seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from data_prep.strict_json import parse
from resnet_dist.config.records import MAX_RECORD_BYTES, read_record

Outcome = Literal["finished", "stopped", "diverged", "failed"]
"""stopped: early, by the scheduler. failed: its retries are used up."""
Verdict = Literal["go on", "stop", "wait"]


@dataclass(frozen=True)
class Began:
    """The sweep is new: what it is. The first line."""

    name: str
    sweep_hash: str
    space: Mapping[str, Any]
    base: Mapping[str, Any]
    """The base recipe's file as read."""
    num_proxy_samples: int
    num_base_samples: int | None
    data_digest: str
    first_points: Sequence[Mapping[str, Any]]
    """Tried before all others: the space's, and what a warm start brought."""
    known: Sequence[tuple[Mapping[str, Any], float]]
    """Points and scores of earlier sweeps over the same proxy, which the search begins with."""
    time_s: float
    class_names: Sequence[str] = ()
    """Of the data, by label; empty in ledgers of versions that did not keep them."""


@dataclass(frozen=True)
class DriverStarted:
    """Someone ran the command: from here on, what was running before is not."""

    time_s: float


@dataclass(frozen=True)
class TrialAdded:
    trial: str
    number: int
    """Of the point."""
    seed_number: int
    point: Mapping[str, Any]
    time_s: float


@dataclass(frozen=True)
class TrialStarted:
    trial: str
    time_s: float


@dataclass(frozen=True)
class TrialReported:
    """One evaluation, and what the scheduler said to it."""

    trial: str
    epoch: float
    step: int
    metrics: Mapping[str, float]
    verdict: Verdict
    time_s: float


@dataclass(frozen=True)
class TrialLeft:
    """The trial stopped computing but is not over: it goes on from its checkpoint."""

    trial: str
    why: str
    time_s: float
    is_fault: bool = False
    """Whether it counts as one of the trial's failures."""


@dataclass(frozen=True)
class TrialEnded:
    trial: str
    outcome: Outcome
    epoch: float
    step: int
    metrics: Mapping[str, float]
    reason: str
    time_s: float
    run_id: str = field(default="")
    """MLflow's."""


Event = Began | DriverStarted | TrialAdded | TrialStarted | TrialReported | TrialLeft | TrialEnded
_KINDS: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (Began, DriverStarted, TrialAdded, TrialStarted, TrialReported, TrialLeft, TrialEnded)
}


def encode(event: Event) -> bytes:
    return json.dumps({"event": type(event).__name__, **asdict(event)}, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Event:
    """Raises ValueError for a line that is no event."""
    fields = parse(line, max_bytes=MAX_RECORD_BYTES, allow_nan=True)
    kind = _KINDS.get(str(fields.get("event"))) if isinstance(fields, dict) else None
    if kind is None:
        raise ValueError("is no event of a sweep")
    return read_record(kind, line)
