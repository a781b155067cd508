"""A run in this process alone, without Ray: for studies, whose nets are small and whose runs are many.

The same loop, data, checkpoints and MLflow record as `launch.train`, with one worker; no model is handed over.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from resnet_dist.config.profile import Profile
from resnet_dist.config.recipe import Recipe
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.cluster import Node
from resnet_dist.launch.preflight import Prepared, prepare, require_none_written
from resnet_dist.launch.record import Record, begin_record
from resnet_dist.tracking.mlflow_run import EndStatus, recorded_end, recorded_run
from resnet_dist.tracking.spool import History, read_history
from resnet_dist.tracking.tracker import SpoolTracker
from resnet_dist.training.context import LocalContext, Outcome, WorkerResult

_DIVERGED = "diverged"


@dataclass(frozen=True)
class Trained:
    prepared: Prepared
    outcome: Outcome
    history: History
    """Every number of the run, from its spool."""


def train_in_process(recipe: Recipe, profile: Profile, name: str, parent_run_id: str | None = None) -> Trained:
    """Trains `recipe` to its end under `name`, or goes on where that name stands; what is done is not done again.

    A diverged run is a result too. The profile's workers are not looked at. Raises UserError, Fault.
    """
    prepared = prepare(recipe, profile, name)
    done = _finished(prepared, profile)
    if done is not None:
        return done
    if prepared.none_whole:
        require_none_written(prepared.storage, prepared.damaged)
    for warning in prepared.warnings:
        _say(f"warning: {warning}")
    nodes = [Node("localhost", os.cpu_count() or 1, 0)]
    record = begin_record(recipe, profile, name, prepared, nodes, _say, parent_run_id=parent_run_id)
    status: EndStatus = "FAILED"
    reason = "an unexpected error"
    try:
        result = _train(recipe, profile, record)
        status, reason = ("FAILED", _DIVERGED) if result.outcome == "diverged" else ("FINISHED", "finished")
        record.events.note(f"{result.outcome} after step {result.step}")
    except KeyboardInterrupt:
        status, reason = "KILLED", "interrupted"
        raise
    except (UserError, Fault) as error:
        reason = f"failed: {error}"
        raise
    finally:
        record.close(status, reason)
    return Trained(prepared, result.outcome, read_history(prepared.run_dir, record.handle.run_id))


def _train(recipe: Recipe, profile: Profile, record: Record) -> WorkerResult:
    from resnet_dist.training.loop import run_worker  # brings ffcv and numba

    prepared = record.prepared
    for name in prepared.damaged:  # they would be kept, as the newest
        prepared.storage.remove(name)
    context = LocalContext(prepared.storage, keep=profile.checkpoint.keep)
    tracker = SpoolTracker(prepared.storage, record.handle.run_id, profile.tracking_uri)
    try:
        return run_worker(prepared.job(recipe, profile), context, tracker)
    finally:
        tracker.flush(timeout_s=30.0)
        tracker.close()


def _finished(prepared: Prepared, profile: Profile) -> Trained | None:
    """What an earlier command brought to its end; None if there is something left to do."""
    handle = recorded_run(prepared.run_dir, profile.tracking_uri)
    end = recorded_end(prepared.run_dir)
    if handle is None or end is None or not (end.status == "FINISHED" or end.reason == _DIVERGED):
        return None
    outcome: Outcome = "diverged" if end.reason == _DIVERGED else "finished"
    return Trained(prepared, outcome, read_history(prepared.run_dir, handle.run_id))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
