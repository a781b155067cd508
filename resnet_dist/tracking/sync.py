"""Sends a spool to MLflow: each point once, whichever process sends it and however often the server fails.

Before the first point, the server is asked for the newest step of each key of the run. The points of a key are sent in
the order of their steps, so the server always has a prefix of the spool, and only the rest is sent. MLflow
identifies a point by (run, key, time, step, value), which are all in the spool: a batch whose response was lost, or
that two processes send at once, is stored once.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from data_prep.beton.files import append
from data_prep.redaction import redacted
from resnet_dist.errors import Fault, UserError
from resnet_dist.storage.base import RunStorage
from resnet_dist.storage.folder import as_storage
from resnet_dist.tracking.connection import connect, first_line, root_reason
from resnet_dist.tracking.mlflow_run import newest_steps, recorded_run, require_run, run_file, send_end_status
from resnet_dist.tracking.spool import BadLine, Event, Metrics, Tags, Text, follow, spool_files, spool_folders

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)
T = TypeVar("T")
REJECTED_NAME = "rejected.jsonl"
MAX_POINTS = 900
"""Of one request; MLflow takes 1000."""
_ATTEMPTS = 5
_MAX_FAILED_SPOOLS = 3
"""Then it is the server, and the others are not tried."""
_FIRST_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 5.0
_LOG_EVERY_S = 5.0


class MetricPoint(NamedTuple):
    key: str
    value: float
    time_ms: int
    step: int


class Unavailable(Exception):
    """The request failed now; the same one may succeed later."""


class Rejected(Exception):
    """The server responded and the run is fine, but the content itself is not acceptable, and never will be."""


def backoff_s(num_failures: int) -> float:
    """Pause after so many failures in a row: doubles up to a limit, spread at random between half and all of it, so
    that the jobs of a cluster do not all return to a server in the same second.
    """
    return min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(num_failures - 1, 30)) * random.uniform(0.5, 1.0)


class MlflowTransport:
    """Sends to one MLflow run. Sending anything twice changes nothing. Each method raises Unavailable or Rejected."""

    def __init__(self, tracking_uri: str, run_id: str) -> None:
        self._tracking_uri = tracking_uri
        self._run_id = run_id
        self._client: MlflowClient | None = None

    def newest_steps(self) -> dict[str, int]:
        """Newest step of every metric of the run at the server."""
        return self._request(lambda client: newest_steps(client, self._run_id))

    def send(self, points: Sequence[MetricPoint]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(*point) for point in points]
        self._request(lambda client: client.log_batch(self._run_id, metrics=metrics, synchronous=True))

    def send_tag(self, key: str, value: str) -> None:
        self._request(lambda client: client.set_tag(self._run_id, key, value))

    def send_text(self, path: str, content: str) -> None:
        """Replaces what is at `path` in the run's artifacts."""
        self._request(lambda client: client.log_text(self._run_id, content, path))

    def _request(self, request: Callable[[MlflowClient], T]) -> T:
        try:
            # mlflow, which takes seconds to import, is needed from the first request on, not before.
            self._client = self._client or connect(self._tracking_uri)
            return request(self._client)
        except Exception as error:
            if self._is_final(error):
                raise Rejected(first_line(error)) from error
            raise Unavailable(root_reason(error)) from error

    def _is_final(self, error: Exception) -> bool:
        """Whether the server will never accept this request."""
        if getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE" and self._client is not None:
            # Also what the server says of a run that somebody deleted; restored, it accepts everything.
            try:
                return bool(self._client.get_run(self._run_id).info.lifecycle_stage == "active")
            except Exception:  # noqa: BLE001 - of many kinds: the server cannot be asked now
                return False
        return getattr(getattr(error, "response", None), "status_code", None) == 400  # the artifact service


class Delivery:
    """Sends the events of one spool to the server. No thread, no waiting; after a failure, call `send_all` again."""

    def __init__(
        self,
        folder: Path,
        transport: MlflowTransport,
        limit: Callable[[], int] = lambda: sys.maxsize,
        known_steps: Callable[[], Mapping[str, int]] | None = None,
    ) -> None:
        """Reads nothing yet, and asks no server.

        Args:
            limit: as in `follow`.
            known_steps: newest step of each key that the server has. None: asks it.
        """
        self._folder = folder
        self._transport = transport
        self._limit = limit
        self._known_steps = known_steps or transport.newest_steps
        self._events: Iterator[Event | BadLine | None] | None = None
        self._points: list[MetricPoint] = []
        self._latest: dict[tuple[str, str], str] = {}
        """The last value of each ("tag", key) and ("text", path) that was read and not sent."""
        self.num_points = 0
        """Points that the server did not have."""
        self.num_rejected = 0
        """Points, tags and texts that it refused; they are in `rejected.jsonl` beside the spool."""
        self.num_bad_lines = 0

    def send_all(self, proceed: Callable[[], bool] = lambda: True) -> bool:
        """Sends everything that the server does not have, and the last value of each tag and text. False if `proceed`,
        which is asked before every request, said no.

        Texts are last: they go to the artifact store, often another machine with its own credentials, and when that is
        broken, points do not wait for it. Raises Unavailable or OSError.
        """
        while batch := self._next_points():
            if not proceed():
                return False
            self._send(batch)
            del self._points[: len(batch)]
            self.num_points += len(batch)
        while self._latest:
            if not proceed():
                return False
            kind, name = min(self._latest)  # tags before texts
            send = self._transport.send_tag if kind == "tag" else self._transport.send_text
            try:
                send(name, self._latest[kind, name])
            except Rejected as error:
                self._keep_rejected(f"{kind} {name}", str(error))
            del self._latest[kind, name]
        return True

    def _next_points(self) -> list[MetricPoint]:
        """Reads on until there are points for a request, or no more."""
        if self._events is None:
            self._events = follow(self._folder, self._known_steps(), self._limit)
        try:
            while len(self._points) < MAX_POINTS and (event := next(self._events, None)) is not None:
                if isinstance(event, Metrics):
                    self._points += [MetricPoint(k, v, event.time_ms, event.step) for k, v in event.values.items()]
                elif isinstance(event, Tags):
                    self._latest |= {("tag", key): value for key, value in event.values.items()}
                elif isinstance(event, Text):
                    self._latest["text", event.path] = event.content
                else:
                    self.num_bad_lines += 1
        except OSError:  # which ended the generator: the next one begins with what the server does not have
            self._events, self._points = None, []
            raise
        return self._points[:MAX_POINTS]

    def _send(self, batch: Sequence[MetricPoint]) -> None:
        """Sends the batch. If the server refuses it, halves it until the refused point is alone, so that one bad name
        does not hold up the rest.
        """
        try:
            self._transport.send(batch)
        except Rejected as error:
            if len(batch) == 1:
                self._keep_rejected(f"metric {batch[0].key} at step {batch[0].step} = {batch[0].value}", str(error))
                return
            self._send(batch[: len(batch) // 2])
            self._send(batch[len(batch) // 2 :])

    def _keep_rejected(self, what: str, reason: str) -> None:
        _log.warning("MLflow refused %s: %s", what, reason)
        append(self._folder / REJECTED_NAME, json.dumps({"what": what, "reason": reason}) + "\n")
        self.num_rejected += 1


def upload_rejected(storage: RunStorage, folder: Path) -> None:
    """Copies the list of what MLflow refused from the spool in `folder` to storage, if there is one."""
    if (path := folder / REJECTED_NAME).exists():
        storage.upload(path)


# `resnet-dist tracking sync`: after an outage that outlived the run, from any machine that sees the storage.


@dataclass(frozen=True)
class SyncReport:
    num_points: int
    """Points of curves that the server did not have."""
    num_rejected: int
    """Things that MLflow will never accept, listed in `rejected.jsonl` beside the spool."""
    num_bad_lines: int
    """Lines that no spool wrote, skipped."""
    other_runs: tuple[str, ...]
    """Spools of other runs than the folder's own, left alone."""
    end_status_sent: bool
    """Whether the run's end (FINISHED, FAILED, KILLED) was waiting too and has arrived."""


def sync(
    storage: RunStorage | Path,
    tracking_uri: str,
    *,
    limit_s: float = 3600.0,
    with_end: bool = True,
    log: Callable[[str], object] = lambda line: None,
) -> SyncReport:
    """Sends everything in the run to the server, each point once; harmless while the run is in progress.

    Only into the run that the folder belongs to: the one that `mlflow_run.json` names and that has its key in a tag.

    Args:
        with_end: also the end that waits in `mlflow_run.json`.
        log: called every few seconds with how far it is.

    Raises UserError if nothing was tracked in the run, Fault if the server does not respond, or stops responding.
    """
    deadline_s = time.monotonic() + limit_s
    storage = as_storage(storage)
    if storage.names():  # else `pull` would make the folder
        storage.pull()
    handle = recorded_run(storage, tracking_uri)
    if handle is None:
        name = run_file(storage.folder).name
        raise UserError(f"{storage.location}: no tracked run here (no {name} that names one); give the folder of one")
    require_run(handle)
    folders = spool_folders(storage.folder)
    mine = [folder for folder in folders if folder.name == handle.run_id]
    num_bytes = sum(path.stat().st_size for folder in mine for path, _ in spool_files(folder))
    log(f"reading {num_bytes / 1e6:,.1f} MB of metrics and sending what MLflow does not have")
    # Asked once for all spools: there is one for each node, the answer names every key of the run, and no two spools
    # have a key in common.
    transport = MlflowTransport(tracking_uri, handle.run_id)
    known_steps = cache(transport.newest_steps)
    deliveries = [Delivery(folder, transport, known_steps=known_steps) for folder in mine]
    doing = f"sending {storage.location} to MLflow at {redacted(tracking_uri)}"
    faults: list[Fault] = []
    num_in_a_row = 0
    for folder, delivery in zip(mine, deliveries, strict=True):
        if num_in_a_row == _MAX_FAILED_SPOOLS:  # the server is away, so the rest would only wait for it
            break
        try:
            _deliver(delivery, deadline_s, doing, log, attempts=1 if num_in_a_row else _ATTEMPTS)
            num_in_a_row = 0
        except Fault as fault:  # of one spool alone: the others are sent
            faults.append(fault)
            num_in_a_row += 1
        finally:
            upload_rejected(storage, folder)
    end_status_sent = False
    try:
        end_status_sent = with_end and send_end_status(handle)
    except Fault as fault:
        faults.append(fault)
    if faults:
        raise faults[0]
    return SyncReport(
        num_points=sum(delivery.num_points for delivery in deliveries),
        num_rejected=sum(delivery.num_rejected for delivery in deliveries),
        num_bad_lines=sum(delivery.num_bad_lines for delivery in deliveries),
        other_runs=tuple(str(folder.relative_to(storage.folder)) for folder in folders if folder not in mine),
        end_status_sent=end_status_sent,
    )


def _deliver(delivery: Delivery, deadline_s: float, doing: str, log: Callable[[str], object], *, attempts: int) -> None:
    """Sends all, and says every few seconds how much. Raises Fault after `attempts` failures in a row, or at the
    deadline."""
    num_failures = 0
    while time.monotonic() < deadline_s:
        before, until_s = delivery.num_points, min(deadline_s, time.monotonic() + _LOG_EVERY_S)
        try:
            if delivery.send_all(lambda: time.monotonic() < until_s):  # noqa: B023 - called before the next round
                return
            log(f"{delivery.num_points:,} points sent so far")
        except Unavailable as error:
            num_failures = num_failures + 1 if delivery.num_points == before else 1
            if num_failures == attempts:
                raise Fault(
                    f"{doing} failed: {error}; the rest stays in storage: run the same command again"
                ) from error
            time.sleep(backoff_s(num_failures))
    raise Fault(f"{doing}: the time given was too short for everything; run the same command again")
