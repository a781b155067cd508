"""A sweep in MLflow: one parent run, and below it one run for each trial.

    sweep = open_sweep(uri, experiment, "lr-sweep", sweep_dir, description="...", tags={...}, params={...})
    # a trial, wherever it runs: the driver of every run, with one tag more
    open_run(uri, experiment, "lr-sweep-007", sweep_dir / "007", tags, params, parent_run_id=sweep.run_id)
    # a trial whose driver cannot say its own end, because Tune or the kernel killed it
    end_trial(sweep_dir / "007", uri, "KILLED", stopped_early(rung=2))
    log_folder(sweep, folder_of_plots, "plots")          # details.py: PNG, HTML, whatever lies in the folder
    end_sweep(sweep, trials, "FINISHED")

A sweep's folder has an `mlflow_run.json` like a training run's, so a sweep that is started again goes on in its run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from resnet_dist.errors import Fault, UserError
from resnet_dist.storage.base import RunStorage
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.tracking.details import log_details
from resnet_dist.tracking.mlflow_run import EndStatus, RunHandle, end_run, open_run, recorded_run, run_file
from resnet_dist.tracking.sync import sync

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
