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
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data_prep.beton.files import append
from data_prep.redaction import redacted
from resnet_dist.errors import Fault, UserError
from resnet_dist.storage.base import RunStorage
from resnet_dist.storage.folder import as_storage
from resnet_dist.tracking.connection import connect, first_line, root_reason, sqlite_file
from resnet_dist.tracking.mlflow_run import (
    newest_steps,
    recorded_run,
    require_run,
    run_file,
    send_end_status,
)
from resnet_dist.tracking.spool import Metrics, SpoolReader, Tags, spool_files, spool_folders

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)
REJECTED_NAME = "rejected.jsonl"
# MLflow takes 1000 entities of a run per call, at most 100 of them tags.
MAX_POINTS = 900
MAX_TAGS = 100
_ATTEMPTS = 5
_FIRST_BACKOFF_S = 0.5
_SAY_EVERY_S = 5.0


class MetricPoint(NamedTuple):
    key: str
    value: float
    time_ms: int
    step: int


class Tag(NamedTuple):
    key: str
    value: str


class Unavailable(Exception):
    """The request failed now; the same one may succeed later."""


class Rejected(Exception):
    """The server responded and the run is fine, but the content itself is not acceptable, and never will be."""


class Superseded(Exception):
    """Another process has opened the spool and sends it now."""


def backoff_s(num_failures: int, draw: float, max_backoff_s: float) -> float:
    """Pause after so many failures in a row: doubles up to a limit, spread by `draw` in [0, 1) to between half and all
    of it, so that the jobs of a cluster do not all return to a server in the same second.
    """
    whole = min(max_backoff_s, _FIRST_BACKOFF_S * 2.0 ** min(num_failures - 1, 30))
    return whole * (0.5 + 0.5 * draw)


class MlflowTransport:
    """Sends to one MLflow run. Imports mlflow (seconds) at the first call, not before."""

    def __init__(self, tracking_uri: str, run_id: str) -> None:
        self._tracking_uri = tracking_uri
        self._run_id = run_id
        self._client: MlflowClient | None = None

    def newest_steps(self) -> dict[str, int]:
        """Newest step of every metric of the run at the server. Raises Unavailable."""
        try:
            return newest_steps(self._connected(), self._run_id)
        except Exception as error:
            raise Unavailable(root_reason(error)) from error

    def send(self, batch: Sequence[MetricPoint | Tag]) -> None:
        """Returns once the server has the batch; sending it twice changes nothing. Raises Unavailable, Rejected."""
        from mlflow.entities import Metric, RunTag

        self._request(
            lambda client: client.log_batch(
                self._run_id,
                metrics=[Metric(*item) for item in batch if isinstance(item, MetricPoint)],
                tags=[RunTag(*item) for item in batch if isinstance(item, Tag)],
                synchronous=True,
            )
        )

    def send_text(self, path: str, content: str) -> None:
        """Replaces what is at `path` in the run's artifacts. Raises Unavailable, Rejected."""
        self._request(lambda client: client.log_text(self._run_id, content, path))

    def has_text(self, path: str, content: str) -> bool:
        """Whether this content is at `path` in the run's artifacts; False too if they cannot be read now."""
        try:
            with tempfile.TemporaryDirectory(prefix="resnet-dist-text-") as folder:
                local = self._connected().download_artifacts(self._run_id, path, folder)
                return Path(local).read_text(encoding="utf-8") == content
        except Exception:  # noqa: BLE001 - of many kinds, one for each artifact store; then the text is sent
            return False

    def _request(self, request: Callable[[MlflowClient], object]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            request(self._connected())
        except MlflowException as error:
            if error.error_code == "INVALID_PARAMETER_VALUE" and self._run_is_active():
                raise Rejected(first_line(error)) from error
            raise Unavailable(root_reason(error)) from error
        except Exception as error:
            if getattr(getattr(error, "response", None), "status_code", None) == 400:  # the artifact service
                raise Rejected(first_line(error)) from error
            raise Unavailable(root_reason(error)) from error

    def _run_is_active(self) -> bool:
        """For a deleted run the server reports invalid content; the run can be restored, and then accepts
        everything."""
        try:
            return self._connected().get_run(self._run_id).info.lifecycle_stage == "active"
        except Exception as error:
            raise Unavailable(root_reason(error)) from error

    def _connected(self) -> MlflowClient:
        if self._client is None:
            database = sqlite_file(self._tracking_uri)
            if database and not database.exists():  # mlflow would make a new, empty one
                raise Unavailable(f"{database} is not on this node")
            self._client = connect(self._tracking_uri)
        return self._client


class Delivery:
    """Sends the events of one spool to the server. No thread, no waiting; after a failure, call `send_all` again.

    Texts go to the artifact store, often another machine with its own credentials: when it is broken, points do not
    wait for it.
    """

    def __init__(
        self,
        folder: Path,
        transport: MlflowTransport,
        may_send: Callable[[], bool] = lambda: True,
        *,
        compare_texts: bool = False,
    ) -> None:
        """Reads nothing yet, and asks no server.

        Args:
            may_send: asked before every request.
            compare_texts: leave out a text that the server has already, at the price of reading it there.
        """
        self._folder = folder
        self._transport = transport
        self._may_send = may_send
        self._compare_texts = compare_texts
        self._reader = SpoolReader(folder)
        self._points: deque[MetricPoint] = deque()
        self._tags: dict[str, str] = {}
        self._texts: dict[str, str] = {}
        self._server_steps: dict[str, int] | None = None
        """Newest step of each key that the server had before the first batch of this process."""
        self.num_points = 0
        self.num_texts = 0
        self.num_rejected = 0

    @property
    def num_bad_lines(self) -> int:
        return self._reader.num_bad_lines

    def num_unread_bytes(self) -> int:
        return self._reader.num_unread_bytes()

    def send_all(self, newest_limit_bytes: int | None = None, proceed: Callable[[], bool] = lambda: True) -> None:
        """Sends everything that the server does not have, batch after batch while `proceed` says so.

        `newest_limit_bytes` as in `SpoolReader.read`. Raises Unavailable or OSError after sending as many points and
        texts as possible, Superseded at once.
        """
        failure: Unavailable | OSError | None = None
        for send_next in (self._send_points, self._send_text):
            try:
                while proceed() and send_next(newest_limit_bytes):
                    pass
            except (Unavailable, OSError) as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _send_points(self, newest_limit_bytes: int | None) -> bool:
        """Sends the next points and tags; False if there are none."""
        self._read(newest_limit_bytes)
        if not self._points and not self._tags:
            return False
        if self._server_steps is None:
            self._server_steps = self._transport.newest_steps()
        points = list(islice(self._points, MAX_POINTS))
        tags = [Tag(key, value) for key, value in islice(self._tags.items(), MAX_TAGS)]
        new = [point for point in points if point.step > self._server_steps.get(point.key, point.step - 1)]
        self._require_newest()
        self._send([*new, *tags])
        for _ in points:
            self._points.popleft()
        for tag in tags:
            del self._tags[tag.key]
        self.num_points += len(new)
        return True

    def _send_text(self, newest_limit_bytes: int | None) -> bool:
        """Sends the next text; False if there is none."""
        self._read(newest_limit_bytes)
        if not self._texts:
            return False
        path, content = next(iter(self._texts.items()))
        self._require_newest()
        try:
            if not (self._compare_texts and self._transport.has_text(path, content)):
                self._transport.send_text(path, content)
                self.num_texts += 1
        except Rejected as error:
            self._keep_rejected(f"text {path}", str(error))
        del self._texts[path]
        return True

    def _read(self, newest_limit_bytes: int | None) -> None:
        """Reads on until there are points for a request. Of a tag or text, only the last value is kept."""
        while len(self._points) < MAX_POINTS and (events := self._reader.read(newest_limit_bytes)):
            for event in events:
                if isinstance(event, Metrics):
                    self._points.extend(MetricPoint(k, v, event.time_ms, event.step) for k, v in event.values.items())
                elif isinstance(event, Tags):
                    self._tags |= event.values
                else:
                    self._texts[event.path] = event.content

    def _require_newest(self) -> None:
        # Checked after reading: what was read was in storage before a successor could measure this file.
        if not self._may_send():
            raise Superseded(str(self._folder))

    def _send(self, batch: Sequence[MetricPoint | Tag]) -> None:
        """Sends the batch. If the server refuses it, halves it until the refused item is alone, so that one bad name
        does not hold up the rest.
        """
        if not batch:
            return
        try:
            self._transport.send(batch)
        except Rejected as error:
            if len(batch) == 1:
                (item,) = batch
                what = f" at step {item.step} = {item.value}" if isinstance(item, MetricPoint) else ""
                self._keep_rejected(f"{'metric' if what else 'tag'} {item.key}{what}", str(error))
                return
            middle = len(batch) // 2
            self._send(batch[:middle])
            self._send(batch[middle:])

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
    num_texts: int
    """Text artifacts that the server did not have."""
    num_rejected: int
    """Things that MLflow will never accept, listed in `rejected.jsonl` beside the spool."""
    num_bad_lines: int
    """Lines that no spool wrote, skipped."""
    num_unreadable_bytes: int
    """Torn end of the spool, which cannot be sent."""
    strangers: tuple[str, ...]
    """Spools of other runs than the folder's own, left alone."""
    end_status_sent: bool
    """Whether the run's end (FINISHED, FAILED, KILLED) was waiting too and has arrived."""


def sync(
    storage: RunStorage | Path,
    tracking_uri: str,
    *,
    limit_s: float = 3600.0,
    with_end: bool = True,
    say: Callable[[str], object] = lambda line: None,
) -> SyncReport:
    """Sends everything in the run to the server, each point once; harmless while the run is in progress.

    Only into the run that the folder belongs to: the one that `mlflow_run.json` names and that has its key in a tag.

    Args:
        with_end: also the end that waits in `mlflow_run.json`.
        say: called every few seconds with how far it is.

    Raises UserError if nothing was tracked in the run, Fault if the server does not respond, or stops responding.
    """
    storage = as_storage(storage)
    if not storage.names():
        raise UserError(f"{storage.location}: holds no tracked run; give the folder of one, for example runs/NAME")
    storage.pull()
    run_dir = storage.folder
    handle = recorded_run(storage, tracking_uri)
    if handle is None:
        raise UserError(f"{storage.location}: no tracked run here (no {run_file(run_dir).name} that names one)")
    require_run(handle)
    folders = spool_folders(run_dir)
    mine = [folder for folder in folders if folder.name == handle.run_id]
    num_bytes = sum(file.path.stat().st_size for folder in mine for file in spool_files(folder))
    say(f"reading {num_bytes / 1e6:,.1f} MB of metrics and sending what MLflow does not have")
    deliveries = [Delivery(folder, MlflowTransport(tracking_uri, folder.name), compare_texts=True) for folder in mine]
    proceed = _limited(deliveries, time.monotonic() + limit_s, storage.location, say)
    faults: list[Fault] = []
    for folder, delivery in zip(mine, deliveries, strict=True):
        try:
            _deliver(delivery, proceed, f"MLflow at {redacted(tracking_uri)} did not take the run {handle.run_id}")
        except Fault as fault:  # a spool that MLflow refuses must not hold up the rest
            faults.append(fault)
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
        num_texts=sum(delivery.num_texts for delivery in deliveries),
        num_rejected=sum(delivery.num_rejected for delivery in deliveries),
        num_bad_lines=sum(delivery.num_bad_lines for delivery in deliveries),
        num_unreadable_bytes=sum(delivery.num_unread_bytes() for delivery in deliveries),
        strangers=tuple(str(folder.relative_to(run_dir)) for folder in folders if folder not in mine),
        end_status_sent=end_status_sent,
    )


def _limited(
    deliveries: Sequence[Delivery], deadline_s: float, location: str, say: Callable[[str], object]
) -> Callable[[], bool]:
    """For `Delivery.send_all`: says every few seconds what has arrived, and raises Fault after the deadline."""
    next_s = time.monotonic() + _SAY_EVERY_S

    def proceed() -> bool:
        nonlocal next_s
        now_s = time.monotonic()
        if now_s > deadline_s:
            raise Fault(f"{location}: not everything could be sent in the time given; run the same command again")
        if now_s >= next_s:
            next_s = now_s + _SAY_EVERY_S
            num_points, num_texts = sum(d.num_points for d in deliveries), sum(d.num_texts for d in deliveries)
            say(f"{num_points:,} points and {num_texts:,} texts sent so far")
        return True

    return proceed


def _deliver(delivery: Delivery, proceed: Callable[[], bool], failed: str) -> None:
    """Raises Fault after `_ATTEMPTS` failures in a row."""
    num_failures = 0
    while True:
        before = delivery.num_points + delivery.num_texts
        try:
            delivery.send_all(proceed=proceed)
            return
        except Unavailable as error:
            num_failures = num_failures + 1 if delivery.num_points + delivery.num_texts == before else 1
            if num_failures == _ATTEMPTS:
                raise Fault(f"{failed}: {error}; the rest stays in storage: run the same command again") from error
            time.sleep(backoff_s(num_failures, random.random(), max_backoff_s=5.0))
