"""`train`: one run from the command to a published model. Read this file first.

It can be killed at any moment and called again with the same arguments: finished work is not repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from resnet_dist.config.profile import Profile, absolute_paths
from resnet_dist.config.recipe import Recipe
from resnet_dist.errors import Fault
from resnet_dist.launch.cluster import ray_session, require_capacity_here, wait_for_capacity
from resnet_dist.launch.control import stop_signals
from resnet_dist.launch.execute import execute
from resnet_dist.launch.preflight import prepare
from resnet_dist.launch.progress import ProgressReporter, Startup
from resnet_dist.launch.publish import RunResult, complete, publish_model, read_result, trained_before, write_result
from resnet_dist.launch.ray_group import ray_group
from resnet_dist.launch.run import Run


@dataclass(frozen=True)
class Stopped:
    """The user stopped the run; there is a checkpoint of `step`, from which the same command resumes."""

    exit_code: int
    step: int
    run_dir: str
    """Path or URL."""


def train(recipe: Recipe, profile: Profile, name: str) -> RunResult | Stopped:
    """Trains `recipe` on `profile`'s hardware under `name`, or resumes the run of that name.

    Raises UserError before any worker starts, Fault when there is no result.
    """
    profile = absolute_paths(profile, Path.cwd())
    startup = Startup()
    startup.passed("imports")

    # A user's mistakes are reported before anything is started.
    prepared = prepare(recipe, profile, name)
    storage = prepared.storage
    startup.passed("checks")

    # Work of an earlier command is not repeated: all of it, or everything except what MLflow did not accept.
    if (done := read_result(storage)) is not None:
        return done
    if (trained := trained_before(prepared)) is not None:
        log = ProgressReporter(prepared.plan).log
        return complete(trained, storage, profile.tracking_uri, log, driver_timeout_s=profile.failure.driver_timeout_s)
    require_capacity_here(profile)

    # From here on only this driver holds the run. However the block is left, MLflow learns how the run ended.
    with Run.open(prepared, startup=startup) as run:
        with ray_session(profile):
            nodes = wait_for_capacity(profile, run.log)
            startup.passed("Ray")
            with stop_signals() as stop:
                run.begin(nodes)
                result = execute(run, on=ray_group, observer=stop)
        if result.outcome == "stopped":
            return Stopped(stop.exit_code, result.step, storage.location)
        if result.outcome == "diverged":
            raise Fault(
                f"training diverged: {result.reason} ({storage.location}); lower optim.lr or lengthen "
                "schedule.warmup, and use a new --name"
            )
        published = publish_model(run, result)

    write_result(storage, published)
    return published
