"""The driver of a sweep. It can be killed at any moment and started again with the same arguments: what is in the
ledger is not done again, and trials that were running resume from their checkpoints.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from data_prep.runtime.stop import StopFlag
from resnet_dist.config.profile import Profile
from resnet_dist.launch.cluster import (
    alive_nodes,
    cluster_of,
    nodes_requested,
    ray_session,
    ray_settings,
    wait_for_nodes,
)
from resnet_dist.launch.mlflow_description import Log
from resnet_dist.launch.progress_bar import ProgressBar
from resnet_dist.sweeps.analysis.report import write_report
from resnet_dist.sweeps.ledger import open_ledger
from resnet_dist.sweeps.prepare import PreparedSweep, require_trial_fits, trial_bundles, trials_at_once
from resnet_dist.sweeps.progress import SweepProgress
from resnet_dist.sweeps.ray_tune import run_trials
from resnet_dist.sweeps.record import SweepRecord, complete_record, log_report, open_record
from resnet_dist.sweeps.runner import TrialRunner, thin_ended
from resnet_dist.sweeps.searcher import OptunaSearcher
from resnet_dist.sweeps.sweep import Sweep
from resnet_dist.sweeps.trial import TrialSetup
from resnet_dist.tracking.connection import client_environment, driver_environment, server_credentials
from resnet_dist.tracking.mlflow_run import RunEnd


@dataclass(frozen=True)
class SweepEnd:
    sweep_dir: Path
    report_dir: Path
    why: str
    """`all trials ended`, or which limit of the budget was reached, or that it was stopped."""
    exit_code: int = 0
    best_recipe: Path | None = None


def run_sweep(prepared: PreparedSweep, bar: ProgressBar) -> SweepEnd:
    """Runs the sweep to its end, to the end of its budget, or to a stop. Raises UserError, Fault."""
    with bar.live("reading the ledger"):
        return _run_sweep(prepared, bar)


def _run_sweep(prepared: PreparedSweep, bar: ProgressBar) -> SweepEnd:
    log = bar.log
    for warning in prepared.warnings:
        log(f"warning: {warning}")
    space, profile, trial_profile = prepared.space, prepared.profile, prepared.trial_profile
    with open_ledger(prepared.sweep_dir) as ledger:
        if not ledger.events:
            ledger.append(prepared.began)
        sweep = Sweep(
            space,
            ledger,
            planned=prepared.planned,
            total_epochs=prepared.total_epochs,
            searcher=OptunaSearcher(space) if prepared.planned is None else None,
            now_s=time.time,
            key=prepared.builder.key,
        )
        sweep.begin(prepared.is_saved)
        if sweep.is_over():
            return _complete(prepared, sweep, log)
        # At most: if every point reaches its end, and so gets all its seeds. Or a round of a race, which has fewer.
        num_open = sum(trial.end is None for trial in sweep.state.trials.values())
        most = max(sweep.num_points * space.seeds - (len(sweep.state.trials) - num_open), num_open)
        bar.phase("starting Ray on this machine" if _is_local(profile) else "connecting to Ray")
        with (
            ray_session(profile, dashboard=space.resources.path == "train"),
            # An autoscaler has to see what all trials at once need, all the time: Tune requests for running ones only.
            nodes_requested(profile, trial_bundles(space, trial_profile, most)),
        ):
            nodes = wait_for_nodes(profile, lambda nodes: trials_at_once(space, trial_profile, nodes) > 0, log)
            require_trial_fits(space, trial_profile, nodes)
            bar.phase(f"opening MLflow at {profile.tracking_uri}")
            with (
                StopFlag("steps since the last checkpoint are trained again") as stop,
                open_record(prepared, sweep, nodes, log) as record,
            ):
                runner = TrialRunner(prepared, sweep, record, stop, SweepProgress(prepared, sweep, bar))
                at_once = trials_at_once(space, trial_profile, alive_nodes())
                log(f"{runner.num_open()} trials to go, {at_once} at once")
                bar.phase("waiting for the first trial's process")
                run_trials(runner, _trial_setup(prepared, record), space, prepared.sweep_dir)
                why = runner.why_no_more() or "all trials ended"
                bar.phase("writing the report")
                end = _finish(prepared, why, stop.exit_code if stop.number is not None else 0)
                log_report(record.handle, end.report_dir, log)
                record.ending.end = RunEnd("FINISHED" if sweep.is_over() else "KILLED", why)
                return end


def _trial_setup(prepared: PreparedSweep, record: SweepRecord) -> TrialSetup:
    profile, light = prepared.profile, prepared.space.resources.path == "light"
    return TrialSetup(
        profile=prepared.trial_profile,
        parent_run_id=record.handle.run_id,
        is_light=light,
        environment={
            **ray_settings(profile, local=_is_local(profile)),
            **driver_environment(),
            # A trial with workers is a driver; its workers get theirs from Ray Train.
            **(client_environment() if light and profile.tracking_uri.startswith("http") else {}),
            **server_credentials(os.environ),
        },
    )


def _complete(prepared: PreparedSweep, sweep: Sweep, log: Log) -> SweepEnd:
    """Draws the report again, and does what a driver that was killed after its last trial's end has left undone."""
    thin_ended(prepared, sweep.state.trials.values(), set())
    end = _finish(prepared, "all trials ended")
    complete_record(prepared, sweep, end.report_dir, end.why, log)
    return end


def _is_local(profile: Profile) -> bool:
    return cluster_of(profile, os.environ) is None


def _finish(prepared: PreparedSweep, why: str, exit_code: int = 0) -> SweepEnd:
    report = write_report(prepared.sweep_dir)
    return SweepEnd(prepared.sweep_dir, report.folder, why, exit_code, report.best_recipe)
