"""Sends what a spool still holds: after an outage that outlived the run, from any machine that sees the storage."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.redaction import redacted
from resnet_dist.errors import Fault, UserError
from resnet_dist.storage.base import RunStorage
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.tracking.delivery import LANES, Delivery, Lane, backoff_s, publish_lanes
from resnet_dist.tracking.mlflow_run import recorded_run, require_run, run_file, send_end_status
from resnet_dist.tracking.segments import segment_paths, spool_folders
from resnet_dist.tracking.transport import MlflowTransport, Unavailable

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
