"""Brings a spool's events to the server, in order, each once: one batch at a time, no thread, no waiting."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from data_prep.beton.files import append
from resnet_dist.errors import UserError
from resnet_dist.storage.base import RunStorage
from resnet_dist.tracking.batches import Batch, halves, next_points, next_text, too_large
from resnet_dist.tracking.events import Event
from resnet_dist.tracking.segments import SpoolReader
from resnet_dist.tracking.small_files import read_json, write_json
from resnet_dist.tracking.transport import Refused, Transport

_log = logging.getLogger(__name__)
_FIRST_BACKOFF_S = 0.5
REJECTED_NAME = "rejected.jsonl"

Lane = Literal["points", "texts"]
LANES: tuple[Lane, ...] = ("points", "texts")
"""Points and tags; texts."""


def cursor_file(folder: Path, lane: Lane) -> Path:
    return folder / f"{lane}.cursor.json"


def lane_files(folder: Path) -> list[Path]:
    """The small files beside the segments, as far as they are there."""
    files = [*(cursor_file(folder, lane) for lane in LANES), folder / REJECTED_NAME]
    return [path for path in files if path.exists()]


def publish_lanes(storage: RunStorage, folder: Path) -> None:
    """What the server has acknowledged and refused of the spool in `folder`, for the next machine that sends it."""
    for path in lane_files(folder):
        storage.publish(path)


def backoff_s(num_failures: int, draw: float, max_backoff_s: float) -> float:
    """Pause after so many failures in a row: doubles up to a limit, spread by `draw` in [0, 1) to between half and
    the whole, so that the jobs of a cluster do not all return to a server in the same second.
    """
    whole = min(max_backoff_s, _FIRST_BACKOFF_S * 2.0 ** min(num_failures - 1, 30))
    return whole * (0.5 + 0.5 * draw)


class Superseded(Exception):
    """Another process has opened the spool and sends it now."""


@dataclass(frozen=True)
class Cursor:
    """What the server has acknowledged of a lane; kept beside the segments."""

    seq: int
    server_steps: dict[str, int]
    """Newest step of each key that the server had before this spool's first batch; of a new run: none."""


class Delivery:
    """`send_next` until it returns 0. A batch that fails is sent again as it was: MLflow's key of a point is
    (run, key, timestamp, step, value) and the timestamp stands in the spool, so the second sending changes nothing.

    A spool has two lanes, each with its own order and cursor: the artifact store, where texts go, is often another
    machine with its own credentials, and if it is out of order the points must not wait for it.
    """

    def __init__(
        self, folder: Path, lane: Lane, transport: Transport, may_send: Callable[[], bool] = lambda: True
    ) -> None:
        self._folder = folder
        self._lane = lane
        self._transport = transport
        self._may_send = may_send
        self._reader = SpoolReader(folder)
        self._events: deque[Event] = deque()
        self._cursor = _read_cursor(cursor_file(folder, lane))
        self.num_points = 0
        self.num_texts = 0
        self.num_rejected = 0

    @property
    def acknowledged_seq(self) -> int:
        return self._cursor.seq if self._cursor else 0

    @property
    def num_bad_lines(self) -> int:
        return self._reader.num_bad_lines

    def num_unread_bytes(self) -> int:
        return self._reader.num_unread_bytes()

    def send_next(self, newest_limit_bytes: int | None = None) -> int:
        """Sends the next batch; how many events of the spool are done with, 0 if none is left.

        `newest_limit_bytes` as in `SpoolReader.read`. Raises Unavailable, Superseded; then nothing is acknowledged.
        """
        if self._cursor is None:
            # Asked before the first batch only: later the server's newest steps would be this spool's own.
            self._acknowledge(Cursor(0, self._transport.newest_steps() if self._lane == "points" else {}))
        cursor = self._cursor
        assert cursor is not None
        while len(self._events) < 100 and (events := self._reader.read(newest_limit_bytes)):
            self._events.extend(event for event in events if event.seq > cursor.seq)
        if not self._events:
            return 0
        waiting = list(islice(self._events, 1000))
        batch, num_events = next_text(waiting) if self._lane == "texts" else next_points(waiting, cursor.server_steps)
        if not self._may_send():  # after reading: what was read stood in the spool before another could open it
            raise Superseded(str(self._folder))
        rejected: list[tuple[Batch, str]] = []
        self._send(batch, rejected)
        self._keep_rejected(rejected)
        last = [self._events.popleft() for _ in range(num_events)][-1]
        self._acknowledge(Cursor(last.seq, cursor.server_steps))
        self.num_texts += batch.text is not None
        self.num_points += len(batch.points)
        return num_events

    def _send(self, batch: Batch, rejected: list[tuple[Batch, str]]) -> None:
        """Sends the batch; cuts out what the server refuses, so that one bad name does not hold up the rest."""
        if not batch:
            return
        parts = halves(batch)
        if not (parts and too_large(batch)):
            try:
                self._transport.send(batch)
                return
            except Refused as error:
                if parts is None:
                    rejected.append((batch, str(error)))
                    return
        assert parts is not None
        for part in parts:
            self._send(part, rejected)

    def _keep_rejected(self, rejected: list[tuple[Batch, str]]) -> None:
        for batch, reason in rejected:
            what = [f"metric {p.key} at step {p.step} = {p.value}" for p in batch.points]
            what += [f"tag {key}" for key, _ in batch.tags] + ([f"text {batch.text.path}"] if batch.text else [])
            _log.warning("MLflow refused %s: %s", what[0], reason)
            append(self._folder / REJECTED_NAME, json.dumps({"what": what[0], "reason": reason}) + "\n")
        self.num_rejected += len(rejected)

    def _acknowledge(self, cursor: Cursor) -> None:
        # Not synced to disk: a cursor that is lost or old only means that points are sent twice.
        tree = {"seq": cursor.seq, "server_steps": cursor.server_steps}
        write_json(cursor_file(self._folder, self._lane), tree, durable=False)
        self._cursor = cursor


def _read_cursor(path: Path) -> Cursor | None:
    """None if there is no readable cursor. Then everything is sent again, which changes nothing at the server."""
    try:
        tree = read_json(path)
        if not tree:
            return None
        steps = {str(key): int(step) for key, step in tree["server_steps"].items()}
        return Cursor(int(tree["seq"]), steps)
    except (UserError, KeyError, TypeError, ValueError, AttributeError, OverflowError):
        _log.warning("%s: damaged; starting over with what the server has", path)
        return None
