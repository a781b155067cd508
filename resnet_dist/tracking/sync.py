"""Sends what a spool still holds: after an outage that outlived the run, from any machine that sees the storage."""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass
from pathlib import Path

from data_prep.redaction import redacted
from resnet_dist.errors import Fault, UserError
from resnet_dist.storage.base import RunStorage
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.tracking.delivery import LANES, Delivery, Lane
from resnet_dist.tracking.mlflow_run import run_file, send_end_status
from resnet_dist.tracking.mlflow_tracker import publish_lanes
from resnet_dist.tracking.segments import spool_folders
from resnet_dist.tracking.sender import backoff_s
from resnet_dist.tracking.server import require_answer
from resnet_dist.tracking.transport import MlflowTransport, Unavailable

_log = logging.getLogger(__name__)
_ATTEMPTS = 5


@dataclass(frozen=True)
class SyncReport:
    num_points: int
    """Points of curves that were waiting and have now arrived."""
    num_texts: int
    """Text artifacts that were waiting and have now arrived."""
    num_rejected: int
    """Things that MLflow refused for ever, listed in `rejected.jsonl` beside the spool."""
    num_unreadable_bytes: int
    """Torn or damaged end of the spool, which cannot be sent."""
    end_status_sent: bool
    """Whether the run's end (FINISHED, FAILED, KILLED) was waiting too and has arrived."""


def sync(storage: RunStorage | Path, tracking_uri: str, *, limit_s: float = 3600.0) -> SyncReport:
    """Brings everything of the run to the server, each point once; harmless while the run is still going on.

    Raises UserError if nothing was tracked in the run, Fault if the server does not answer, or not for long enough.
    """
    storage = FolderStorage(storage) if isinstance(storage, Path) else storage
    if not storage.names():
        raise UserError(f"{storage.location}: no tracked run here: there is no such run")
    storage.pull()
    run_dir = storage.folder
    folders = spool_folders(run_dir)
    if not folders and not run_file(run_dir).exists():
        raise UserError(f"{storage.location}: no tracked run here (no {run_file(run_dir).name}, no tracking/ folder)")
    require_answer(tracking_uri)
    deadline_s = time.monotonic() + limit_s
    deliveries: list[Delivery] = []
    faults: list[Fault] = []
    # One that MLflow does not take any more, for its run was deleted there, must not hold up the others.
    for folder in folders:
        try:
            deliveries += [_send_all(folder, lane, tracking_uri, deadline_s) for lane in LANES]
        except Fault as fault:
            faults.append(fault)
        finally:
            publish_lanes(storage, folder)
    end_status_sent = False
    try:
        end_status_sent = send_end_status(run_dir, tracking_uri, publish=storage.publish)
    except Fault as fault:
        faults.append(fault)
    if faults:
        raise faults[0]
    return SyncReport(
        num_points=sum(delivery.num_points for delivery in deliveries),
        num_texts=sum(delivery.num_texts for delivery in deliveries),
        num_rejected=sum(delivery.num_rejected for delivery in deliveries),
        num_unreadable_bytes=sum(delivery.num_unread_bytes() for delivery in deliveries[:: len(LANES)]),
        end_status_sent=end_status_sent,
    )


def _send_all(folder: Path, lane: Lane, tracking_uri: str, deadline_s: float) -> Delivery:
    delivery = Delivery(folder, lane, MlflowTransport(tracking_uri, run_id=folder.name))
    num_failures = 0
    while True:
        if time.monotonic() > deadline_s:
            raise Fault(f"{folder}: not everything could be sent in the time given; run the same command again")
        try:
            if not delivery.send_next():
                return delivery
            num_failures = 0
        except Unavailable as error:
            num_failures += 1
            if num_failures == _ATTEMPTS:
                raise Fault(
                    f"MLflow at {redacted(tracking_uri)} did not take the run {folder.name}: {error}; "
                    "what is left stays in storage: run the same command again"
                ) from error
            time.sleep(backoff_s(num_failures, random.random(), max_backoff_s=5.0))
