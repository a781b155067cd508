"""A sweep in MLflow: its run, and the ends of the trials' runs below it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data_prep.redaction import redacted
from resnet_dist.code_version import read_code_version
from resnet_dist.config.loading import flatten, to_yaml, tree_to_yaml
from resnet_dist.config.space import MAY_CHANGE
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.cluster import ClusterNode
from resnet_dist.launch.mlflow_description import Log, hardware_summary
from resnet_dist.storage.base import RunStorage
from resnet_dist.sweeps.analysis.page import parameter_in_words, scheduler_in_words
from resnet_dist.sweeps.analysis.ranking import Ranking
from resnet_dist.sweeps.prepare import PreparedSweep
from resnet_dist.sweeps.sweep import Sweep
from resnet_dist.tracking.mlflow_run import (
    Ending,
    EndStatus,
    RunHandle,
    end_run,
    end_status,
    log_details,
    log_folder,
    open_run,
    recorded_end,
    recorded_run,
    run_file,
)
from resnet_dist.tracking.sync import sync
from resnet_dist.tracking.tracker import SpoolTracker

_log = logging.getLogger(__name__)
_SYNC_LIMIT_S = 120.0
_NOT_LOGGED = (*MAY_CHANGE, "first_points", "warm_start")
"""Keys of a space that may change when the sweep resumes, as MLflow's parameters never do."""


@dataclass(frozen=True)
class SweepRecord:
    """The sweep's MLflow run while it is open."""

    handle: RunHandle
    tracker: SpoolTracker
    log: Log
    ending: Ending

    def trial_ended(self, ranking: Ranking, num_ended: int, numbers: dict[str, float]) -> None:
        """Points of the sweep's curves; the x-axis counts trials that have ended."""
        best = {} if ranking.best is None else {f"best/{ranking.metric}": ranking.best.score}
        self.tracker.metrics({**best, **{f"sweep/{key}": value for key, value in numbers.items()}}, num_ended)


def log_report(handle: RunHandle, folder: Path, log: Log) -> None:
    try:
        log_folder(handle, folder, "report")
    except (Fault, UserError, OSError) as error:
        log(f"warning: the report is not in MLflow: {redacted(str(error))}")


@contextmanager
def open_record(prepared: PreparedSweep, sweep: Sweep, nodes: list[ClusterNode], log: Log) -> Iterator[SweepRecord]:
    """Opens the sweep's MLflow run, or continues it. Leaving the block ends it, after all trials that still run there.

    Raises Fault if MLflow does not answer: nothing has been started yet.
    """
    handle = _open_run(prepared, nodes)
    tracker = SpoolTracker(prepared.sweep_dir, handle.run_id, prepared.profile.tracking_uri)

    def end(status: EndStatus, reason: str) -> None:
        end_sweep(handle, [prepared.trial_storage(trial) for trial in sweep.state.trials], status, reason)

    with end_status(end) as ending, closing(tracker):
        yield SweepRecord(handle, tracker, log, ending)


def _open_run(prepared: PreparedSweep, nodes: list[ClusterNode]) -> RunHandle:
    space, profile = prepared.space, prepared.profile
    code = read_code_version(Path(__file__).parents[2])
    handle = open_run(
        profile.tracking_uri,
        profile.experiment,
        prepared.name,
        prepared.sweep_dir,
        tags={
            "kind": "sweep",
            "sweep_hash": prepared.began.sweep_hash,
            "data_digest": prepared.began.data_digest,
            "hardware": hardware_summary(nodes),
            "mlflow.source.name": "resnet-dist tune",
            "mlflow.source.type": "JOB",
            **({"mlflow.source.git.commit": code.commit} if code else {}),
        },
        params={key: value[:500] for key, value in flatten(space).items() if key.partition(".")[0] not in _NOT_LOGGED},
    )
    texts = {
        "config/space.yaml": to_yaml(space),
        "config/base_recipe.yaml": tree_to_yaml(prepared.began.base),
        "config/profile.yaml": redacted(to_yaml(profile)),
    }
    log_details(handle, description=_description(prepared), texts=texts)
    return handle


def _description(prepared: PreparedSweep) -> str:
    space, folder = prepared.space, prepared.sweep_dir
    searched = "".join(f"| {key} | {parameter_in_words(parameter)} |\n" for key, parameter in space.space.items())
    return (
        f"A sweep over {Path(space.base).name} for {space.metric}. "
        f"Its report, once it ends: artifact `report/index.html`.\n\n| key | values |\n|---|---|\n{searched}\n"
        f"Search: {space.search.kind}. Early stopping: {scheduler_in_words(space.scheduler)}.\n\n"
        f"    resnet-dist tune report {folder}\n"
        f"    resnet-dist train {folder}/best_recipe.yaml --on PROFILE\n"
    )


def end_trial(
    storage: RunStorage, tracking_uri: str, status: EndStatus, reason: str, *, limit_s: float = 120.0
) -> None:
    """Ends the MLflow run of a trial whose own process can no longer do it; replaces the status of an earlier end.

    What the trial left unsent is sent first. If the server is unreachable, everything waits in the trial's storage for
    `resnet-dist tracking sync`. A trial that never opened its run has nothing to end. Never raises because of the
    server.
    """
    try:
        if storage.names():
            storage.pull()
        handle = recorded_run(storage, tracking_uri)
    except OSError as error:
        _log.warning("%s: cannot be read, so the trial's run is not ended: %s", storage.location, error)
        return
    if handle is None:
        return
    try:
        sync(storage, tracking_uri, limit_s=limit_s)
    except (Fault, UserError) as error:
        _log.warning("%s: the trial's unsent data waits there: %s", storage.location, error)
    end_run(handle, status, reason, limit_s=min(limit_s, 10.0))


def end_sweep(sweep: RunHandle, trials: Iterable[RunStorage], status: EndStatus, reason: str = "") -> None:
    """Ends the sweep's run, and before it, as KILLED, every trial that still counts as running: no driver is left.

    Args:
        trials: where every trial's run is.
    """
    for storage in trials:
        if end_reason(storage) is None:
            end_trial(storage, sweep.tracking_uri, "KILLED", "orphaned")
    end_run(sweep, status, reason)


def complete_record(prepared: PreparedSweep, sweep: Sweep, report: Path, why: str, log: Log) -> None:
    """Ends the MLflow run of a sweep that is over, with its report, if the driver was killed before it did."""
    handle, end = recorded_run(prepared.sweep_dir, prepared.profile.tracking_uri), recorded_end(prepared.sweep_dir)
    if handle is None or (end is not None and end.status == "FINISHED"):
        return
    log_report(handle, report, log)
    with suppress(Fault, UserError):  # what was not sent waits in the sweep's folder for `tracking sync`
        sync(handle.storage, handle.tracking_uri, limit_s=_SYNC_LIMIT_S)
    end_sweep(handle, [prepared.trial_storage(trial) for trial in sweep.state.trials], "FINISHED", why)


def end_reason(storage: RunStorage) -> str | None:
    """Why a trial's run ended, from what is in storage; None if it has not ended, or if that cannot be read."""
    try:
        content = storage.read(run_file(Path()).name)
        return None if content is None else str(json.loads(content)["end"]["reason"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
