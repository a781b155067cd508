"""From events to requests: what fits into one call, in order, without what the server has already. Pure."""

from __future__ import annotations

import json
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from data_prep.beton.files import append
from data_prep.redaction import redacted
from resnet_dist.errors import Fault, UserError
from resnet_dist.storage.base import RunStorage, read_json, write_json
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.tracking.connection import connect, first_line, root_reason, sqlite_file
from resnet_dist.tracking.mlflow_run import (
    EndStatus,
    RunHandle,
    end_run,
    log_details,
    open_run,
    recorded_run,
    require_run,
    run_file,
    send_end_status,
)
from resnet_dist.tracking.spool import Event, Metrics, SpoolReader, Tags, Text, segment_paths, spool_folders, unseen

# MLflow takes 1000 entities of a run per call, at most 100 of them tags.
MAX_POINTS = 900
MAX_TAGS = 100


@dataclass(frozen=True)
class Point:
    key: str
    value: float
    time_ms: int
    step: int


@dataclass(frozen=True)
class Batch:
    """One call: points and tags together, or one text."""

    points: tuple[Point, ...] = ()
    tags: tuple[tuple[str, str], ...] = ()
    text: Text | None = None

    def __bool__(self) -> bool:
        return bool(self.points or self.tags or self.text)


def next_points(events: Sequence[Event], server_steps: Mapping[str, int]) -> tuple[Batch, int]:
    """The points and tags that start `events`, and how many events that covers (at least one, if there are any).

    Texts are passed over; points that `server_steps` knows already (`unseen`) are left out. A single event that is
    larger than a call makes a batch larger than a call: `halves` cuts it.
    """
    points: list[Point] = []
    tags: dict[str, str] = {}
    num_events = 0
    for event in events:
        num_points = len(points) + (len(event.values) if isinstance(event, Metrics) else 0)
        num_tags = len(tags) + (len(event.values) if isinstance(event, Tags) else 0)
        if num_events and (num_points > MAX_POINTS or num_tags > MAX_TAGS):
            break
        if isinstance(event, Metrics):
            values = unseen(event.values, event.step, server_steps)
            points += [Point(key, value, event.time_ms, event.step) for key, value in values.items()]
        elif isinstance(event, Tags):
            tags |= event.values
        num_events += 1
    return Batch(tuple(points), tuple(tags.items())), num_events


def next_text(events: Sequence[Event]) -> tuple[Batch, int]:
    """The first text of `events`, and how many events that covers; points and tags are passed over."""
    for num_before, event in enumerate(events):
        if isinstance(event, Text):
            return Batch(text=event), num_before + 1
    return Batch(), len(events)


def too_large(batch: Batch) -> bool:
    return len(batch.points) > MAX_POINTS or len(batch.tags) > MAX_TAGS


def halves(batch: Batch) -> tuple[Batch, Batch] | None:
    """The batch in two parts, in order; None if it holds a single thing."""
    if batch.points and batch.tags:
        return Batch(points=batch.points), Batch(tags=batch.tags)
    if len(batch.points) > 1:
        middle = len(batch.points) // 2
        return Batch(points=batch.points[:middle]), Batch(points=batch.points[middle:])
    if len(batch.tags) > 1:
        middle = len(batch.tags) // 2
        return Batch(tags=batch.tags[:middle]), Batch(tags=batch.tags[middle:])
    return None


# MLflow as the sender of a spool sees it: two calls, and two ways in which they fail.


if TYPE_CHECKING:
    from mlflow import MlflowClient


class Unavailable(Exception):
    """The batch was not taken now; the same batch may be taken later."""


class Refused(Exception):
    """The server answered, the run is in order, and the content itself is not acceptable: it never will be."""


class Transport(Protocol):
    def newest_steps(self) -> dict[str, int]:
        """Newest step of every metric of the run at the server. Raises Unavailable."""

    def send(self, batch: Batch) -> None:
        """Returns once the server has the batch; sending it twice changes nothing. Raises Unavailable, Refused."""


class MlflowTransport:
    """Sends to one MLflow run. Imports mlflow (seconds) at the first call, not before."""

    def __init__(self, tracking_uri: str, run_id: str) -> None:
        self._tracking_uri = tracking_uri
        self._run_id = run_id
        self._client: MlflowClient | None = None

    def newest_steps(self) -> dict[str, int]:
        try:
            # RunData.metrics has values without steps; its protobuf form carries the latest point of each key whole.
            proto = self._connected().get_run(self._run_id).data.to_proto()
            return {metric.key: metric.step for metric in proto.metrics}
        except Exception as error:
            raise Unavailable(root_reason(error)) from error

    def send(self, batch: Batch) -> None:
        from mlflow.entities import Metric, RunTag
        from mlflow.exceptions import MlflowException

        try:
            client = self._connected()
            if batch.text is not None:
                client.log_text(self._run_id, batch.text.content, batch.text.path)
            else:
                client.log_batch(
                    self._run_id,
                    metrics=[Metric(p.key, p.value, p.time_ms, p.step) for p in batch.points],
                    tags=[RunTag(key, value) for key, value in batch.tags],
                    synchronous=True,
                )
        except MlflowException as error:
            if error.error_code == "INVALID_PARAMETER_VALUE" and self._run_is_active():
                raise Refused(first_line(error)) from error
            raise Unavailable(root_reason(error)) from error
        except Exception as error:
            if getattr(getattr(error, "response", None), "status_code", None) == 400:  # the artifact service
                raise Refused(first_line(error)) from error
            raise Unavailable(root_reason(error)) from error

    def _run_is_active(self) -> bool:
        """A deleted run answers with the code of invalid content; it can be restored, and then takes everything."""
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


# Brings a spool's events to the server, in order, each once: one batch at a time, no thread, no waiting.


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


# Sends what a spool still holds: after an outage that outlived the run, from any machine that sees the storage.


_ATTEMPTS = 5
_SAY_EVERY_S = 5.0


@dataclass(frozen=True)
class SyncReport:
    num_points: int
    """Points of curves that were waiting and have now arrived."""
    num_texts: int
    """Text artifacts that were waiting and have now arrived."""
    num_rejected: int
    """Things that MLflow refused for ever, listed in `rejected.jsonl` beside the spool."""
    num_bad_lines: int
    """Lines that no spool wrote, passed over."""
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
    """Brings everything of the run to the server, each point once; harmless while the run is still going on.

    Only into the run that the folder belongs to: the one that `mlflow_run.json` names and that has its key in a tag.
    `with_end`: also the end that waits in `mlflow_run.json`. `say` hears every few seconds how far it is.

    Raises UserError if nothing was tracked in the run, Fault if the server does not answer, or not for long enough.
    """
    storage = FolderStorage(storage) if isinstance(storage, Path) else storage
    if not storage.names():
        raise UserError(f"{storage.location}: holds no tracked run; give the folder of one, for example runs/NAME")
    storage.pull()
    run_dir = storage.folder
    handle = recorded_run(run_dir, tracking_uri)
    if handle is None:
        raise UserError(f"{storage.location}: no tracked run here (no {run_file(run_dir).name} that names one)")
    require_run(handle)
    folders = spool_folders(run_dir)
    mine = [folder for folder in folders if folder.name == handle.run_id]
    progress = _Progress(mine, say)
    deadline_s = time.monotonic() + limit_s
    deliveries: list[Delivery] = []
    faults: list[Fault] = []
    # One that MLflow does not take any more must not hold up the others.
    for folder in mine:
        try:
            deliveries += [_send_all(folder, lane, tracking_uri, deadline_s, progress) for lane in LANES]
        except Fault as fault:
            faults.append(fault)
        finally:
            publish_lanes(storage, folder)
    end_status_sent = False
    try:
        end_status_sent = with_end and send_end_status(run_dir, tracking_uri, publish=storage.publish)
    except Fault as fault:
        faults.append(fault)
    if faults:
        raise faults[0]
    readers = deliveries[:: len(LANES)]  # both lanes read the same lines
    return SyncReport(
        num_points=sum(delivery.num_points for delivery in deliveries),
        num_texts=sum(delivery.num_texts for delivery in deliveries),
        num_rejected=sum(delivery.num_rejected for delivery in deliveries),
        num_bad_lines=sum(delivery.num_bad_lines for delivery in readers),
        num_unreadable_bytes=sum(delivery.num_unread_bytes() for delivery in readers),
        strangers=tuple(str(folder.relative_to(run_dir)) for folder in folders if folder not in mine),
        end_status_sent=end_status_sent,
    )


class _Progress:
    """Says once what is to be read, then every few seconds what has arrived."""

    def __init__(self, folders: Sequence[Path], say: Callable[[str], object]) -> None:
        self._say = say
        self._num_points = self._num_texts = 0
        self._next_s = time.monotonic() + _SAY_EVERY_S
        num_bytes = sum(path.stat().st_size for folder in folders for path in segment_paths(folder))
        say(f"reading {num_bytes / 1e6:,.1f} MB of metrics and sending what MLflow does not have")

    def sent(self, num_points: int, num_texts: int) -> None:
        self._num_points += num_points
        self._num_texts += num_texts
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _SAY_EVERY_S
            self._say(f"{self._num_points:,} points and {self._num_texts:,} texts sent so far")


def _send_all(folder: Path, lane: Lane, tracking_uri: str, deadline_s: float, progress: _Progress) -> Delivery:
    delivery = Delivery(folder, lane, MlflowTransport(tracking_uri, run_id=folder.name))
    num_failures = 0
    while True:
        if time.monotonic() > deadline_s:
            raise Fault(f"{folder}: not everything could be sent in the time given; run the same command again")
        before = delivery.num_points, delivery.num_texts
        try:
            if not delivery.send_next():
                return delivery
            progress.sent(delivery.num_points - before[0], delivery.num_texts - before[1])
            num_failures = 0
        except Unavailable as error:
            num_failures += 1
            if num_failures == _ATTEMPTS:
                raise Fault(
                    f"MLflow at {redacted(tracking_uri)} did not take the run {folder.name}: {error}; "
                    "what is left stays in storage: run the same command again"
                ) from error
            time.sleep(backoff_s(num_failures, random.random(), max_backoff_s=5.0))


# A sweep in MLflow: one parent run, and below it one run for each trial.


KIND_TAG = "kind"
SWEEP = "sweep"
"""Value of the tag `kind` of a parent run: it has no curves of its own."""


def open_sweep(
    tracking_uri: str,
    experiment: str,
    name: str,
    sweep_dir: Path,
    *,
    description: str = "",
    tags: Mapping[str, str],
    params: Mapping[str, str],
    texts: Mapping[str, str],
) -> RunHandle:
    """Begins the parent run of `sweep_dir`, or continues it; its status is RUNNING afterwards.

    `description`: Markdown, kept as it is if the run has one. `texts`: small artifacts by path, such as the search
    space's YAML. Its `run_id` is the `parent_run_id` of the trials. Raises Fault, UserError as `open_run` does.
    """
    handle = open_run(tracking_uri, experiment, name, sweep_dir, {**tags, KIND_TAG: SWEEP}, params)
    log_details(handle, description=description, texts=texts)
    return handle


def stopped_early(rung: int) -> str:
    """The reason of a trial that was not worth more epochs: `ended: stopped early at rung 2` on its page."""
    return f"stopped early at rung {rung}"


def end_trial(trial: RunStorage | Path, tracking_uri: str, status: EndStatus, reason: str) -> bool:
    """Ends the run of a trial from outside: for one whose own driver was stopped or killed.

    What the trial's workers left unsent arrives first. True if the server has the status; if it is away, everything
    waits in `trial` for `resnet-dist tracking sync`. A trial that never opened its run has nothing to end: True.
    Never raises because of the server. The status of a trial that has ended before is replaced.
    """
    storage = _storage(trial)
    try:
        handle = _pulled_run(storage, tracking_uri)
    except OSError as error:
        _log.warning("%s: cannot be read, so the trial's run is not ended: %s", storage.location, error)
        return False
    if handle is None:
        return True
    try:
        sync(storage, tracking_uri, limit_s=120.0)
    except (Fault, UserError) as error:
        _log.warning("%s: what the trial left unsent waits there: %s", storage.location, error)
    return end_run(handle, status, reason)


def end_sweep(
    sweep: RunHandle,
    trials: Iterable[RunStorage | Path],
    status: EndStatus,
    reason: str = "",
    *,
    orphans: str = "orphaned",
) -> bool:
    """Ends the sweep's run, and before it every trial that still counts as running: no driver of it is left.

    `trials`: where every trial's run lies. `orphans`: the reason given for those trials; their status is KILLED.
    True if the server has all of it; else `sync` of the trials completes it.
    """
    storages = [_storage(trial) for trial in trials]
    ended = [end_trial(s, sweep.tracking_uri, "KILLED", orphans) for s in storages if not _has_ended(s)]
    return all([*ended, end_run(sweep, status, reason)])


def _storage(trial: RunStorage | Path) -> RunStorage:
    return FolderStorage(trial) if isinstance(trial, Path) else trial


def _pulled_run(storage: RunStorage, tracking_uri: str) -> RunHandle | None:
    if not storage.names():
        return None
    storage.pull()
    handle = recorded_run(storage.folder, tracking_uri)
    return handle and replace(handle, publish=storage.publish)


def _has_ended(storage: RunStorage) -> bool:
    """From what is in storage; False if that cannot be read."""
    try:
        content = storage.read(run_file(Path()).name)
        return content is not None and "end" in json.loads(content)
    except (OSError, ValueError):
        return False
