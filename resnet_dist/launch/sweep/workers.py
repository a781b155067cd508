"""A trial on a Ray Train worker group: the way a single run goes, without the hand-over of a model."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

from resnet_dist.config.recipe import Recipe
from resnet_dist.launch.cluster import alive_nodes
from resnet_dist.launch.control import Status, StopSignal
from resnet_dist.launch.lease import HeldLease, held
from resnet_dist.launch.preflight import Prepared
from resnet_dist.launch.progress import Screen
from resnet_dist.launch.record import begin_record
from resnet_dist.launch.sweep.trial_exchange import TRIAL_ANSWER_LIMIT_S, TrialEnd, TrialSetup, Wishes, mlflow_end
from resnet_dist.launch.train import train_and_record
from resnet_dist.tracking.mlflow_run import EndStatus
from resnet_dist.tune.events import Verdict


def train_with_workers(
    recipe: Recipe, setup: TrialSetup, config: Mapping[str, Any], prepared: Prepared, wishes: Wishes
) -> TrialEnd:
    """Trains the trial from where it stands to its end or to a stop. Raises UserError, Fault.

    Workers go on while the driver judges: an evaluation's answer is there about a second later.
    """
    with held(prepared.storage, setup.profile.failure.driver_timeout_s, print) as lease:
        return _train(recipe, setup, config, prepared, wishes, lease)


def _train(
    recipe: Recipe,
    setup: TrialSetup,
    config: Mapping[str, Any],
    prepared: Prepared,
    wishes: Wishes,
    lease: HeldLease,
) -> TrialEnd:
    per_epoch = prepared.plan.steps_per_epoch
    screen = Screen(prepared.plan)
    record = begin_record(
        recipe,
        setup.profile,
        config["run"],
        prepared,
        alive_nodes(),
        screen.say,
        parent_run_id=setup.parent_run_id,
        answer_limit_s=TRIAL_ANSWER_LIMIT_S,
    )
    asked = StopSignal()
    verdict: Verdict = "go on"
    judged_step = 0

    def observe(status: Status) -> None:
        nonlocal verdict, judged_step
        if status.evaluated_step > judged_step and verdict == "go on":
            judged_step = status.evaluated_step
            verdict = wishes.judge(judged_step / per_epoch, judged_step, status.metrics)
        if wishes.stop.is_set():
            asked.number = signal.SIGTERM

    end: tuple[EndStatus, str] = ("FAILED", "an unexpected error")
    try:
        result = train_and_record(recipe, setup.profile, record, screen, asked, lease, observe)
        epoch = result.step / per_epoch
        end = mlflow_end(result.outcome, verdict, epoch)
    except BaseException as error:
        end = ("FAILED", f"failed: {error}")
        raise
    finally:
        if lease.is_ours():
            record.close(*end)
    return TrialEnd(result.outcome, verdict, epoch, result.step, result.metrics, record.handle.run_id)
