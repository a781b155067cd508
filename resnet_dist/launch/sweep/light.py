"""A small trial in the actor it is in: no worker group, no placement group of its own, no further process.

A worker group of one costs some twenty seconds of start-up (four processes that import ray and torch); a trial on
digits trains for two. Checkpoints, resume, metrics and the MLflow run are those of any other run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from data_prep.beton.files import write_text_atomically
from resnet_dist.config.loading import to_yaml
from resnet_dist.config.recipe import Recipe
from resnet_dist.launch.preflight import Prepared
from resnet_dist.launch.record import run_params
from resnet_dist.launch.sweep.trial_exchange import TRIAL_ANSWER_LIMIT_S, TrialEnd, TrialSetup, Wishes, mlflow_end
from resnet_dist.launch.worker import fill, node_cache
from resnet_dist.storage.base import TEMPORARY
from resnet_dist.tracking.mlflow_run import RunHandle, end_run, open_run
from resnet_dist.tracking.tracker import SpoolTracker
from resnet_dist.training.checkpoint import CARD, newest_first
from resnet_dist.training.context import WriteCheckpoint
from resnet_dist.training.watchdog import Watchdog
from resnet_dist.tune.events import Verdict


class LightContext:
    """`RunContext` of one worker that is alone, in a process that outlives the trial."""

    rank, world_size = 0, 1

    def __init__(self, prepared: Prepared, wishes: Wishes, watchdog: Watchdog, keep: int) -> None:
        self.storage = prepared.storage
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.verdict: Verdict = "go on"
        self._steps_per_epoch = prepared.plan.steps_per_epoch
        self._wishes, self._watchdog, self._keep = wishes, watchdog, keep

    def report(self, metrics: Mapping[str, float], write: WriteCheckpoint | None, name: str) -> None:
        if write is None:
            return
        self.storage.commit(name, write, last=CARD)
        for old in newest_first(self.storage.names())[self._keep :]:
            self.storage.remove(old)

    def settle(self) -> None:
        """`report` has done it."""

    def stop_requested(self) -> bool:
        return self._wishes.stop.is_set()

    def save_requested(self) -> bool:
        return False

    def progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """An evaluation goes to the driver, and nothing more is trained before it has answered."""
        if any(key.startswith("val/") for key in metrics):
            self.verdict = self._wishes.judge(step / self._steps_per_epoch, step, metrics)

    def slow(self, rank: int, factor: float) -> None:
        """There are no others."""

    def beat(self) -> None:
        self._watchdog.beat()


def train_light(
    recipe: Recipe, setup: TrialSetup, config: Mapping[str, Any], prepared: Prepared, wishes: Wishes
) -> TrialEnd:
    """Trains the trial from where it stands to its end or to a stop. Raises UserError, Fault."""
    from resnet_dist.training.loop import run_worker  # brings ffcv

    profile, storage = setup.profile, prepared.storage
    storage.pull()
    for name in storage.names():
        if name.startswith(".") and name.endswith(TEMPORARY):
            storage.remove(name)
    if (cache := node_cache(profile, (prepared.train_source, prepared.val_source))) is not None:
        fill(cache)
    write_text_atomically(storage.folder / "recipe.yaml", to_yaml(recipe))
    storage.publish(storage.folder / "recipe.yaml")
    handle = _open_run(recipe, setup, config, prepared)
    stacks = storage.folder / "stacks" / f"rank0-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    watchdog = Watchdog(profile.failure.progress_timeout_s, stacks)
    context = LightContext(prepared, wishes, watchdog, profile.checkpoint.keep)
    tracker = SpoolTracker(storage, handle.run_id, profile.tracking_uri)
    try:
        result = run_worker(prepared.job(recipe, profile), context, tracker)
    except BaseException as error:
        tracker.close()
        end_run(handle, "FAILED", f"failed: {error}")
        raise
    finally:
        watchdog.close()
    tracker.close()
    epoch = result.step / prepared.plan.steps_per_epoch
    end_run(handle, *mlflow_end(result.outcome, context.verdict, epoch))
    return TrialEnd(result.outcome, context.verdict, epoch, result.step, result.metrics, handle.run_id)


def _open_run(recipe: Recipe, setup: TrialSetup, config: Mapping[str, Any], prepared: Prepared) -> RunHandle:
    """The trial's MLflow run below the sweep's, with what it searches by; the sweep's run has the rest."""
    profile, identity = setup.profile, prepared.identity
    return open_run(
        profile.tracking_uri,
        profile.experiment,
        config["run"],
        prepared.storage.folder,
        {"recipe_hash": identity.recipe_hash, "data_digest": identity.data_digest, "trial": config["trial"]},
        run_params(recipe, profile),
        parent_run_id=setup.parent_run_id,
        publish=prepared.storage.publish,
        answer_limit_s=TRIAL_ANSWER_LIMIT_S,
    )
