"""`train`: one run from the command to a published model. Read this file first.

It can be killed at any moment and called again with the same arguments: finished work is not repeated.
"""

from __future__ import annotations

from pathlib import Path

from data_prep.runtime.stop import StopFlag
from resnet_dist.config.profile import Profile, absolute_paths
from resnet_dist.config.recipe import Recipe
from resnet_dist.launch.cluster import ray_session, require_capacity_here, wait_for_capacity
from resnet_dist.launch.execute import execute
from resnet_dist.launch.preflight import prepare
from resnet_dist.launch.progress import Startup
from resnet_dist.launch.publish import RunResult, publish_model, resume_publishing, unfinished, write_result
from resnet_dist.launch.ray_group import ray_group
from resnet_dist.launch.run import Run
from resnet_dist.training.context import Observer


class StopSignal(StopFlag, Observer):
    """Asks the run to stop after the first SIGINT or SIGTERM."""


def train(recipe: Recipe, profile: Profile, name: str) -> RunResult:
    """Trains `recipe` on `profile`'s hardware under `name`, or resumes the run of that name.

    SIGINT and SIGTERM stop the run after its next step, with a checkpoint. Raises UserError before any worker starts,
    Fault if something breaks.
    """
    profile = absolute_paths(profile, Path.cwd())
    startup = Startup()
    startup.passed("imports")

    # A user's mistakes are reported before anything is started.
    prepared = prepare(recipe, profile, name)
    startup.passed("checks")

    # If an earlier command has trained to the end, only what MLflow did not accept is left to do.
    if (done := resume_publishing(prepared)) is not None:
        return done
    require_capacity_here(profile)

    # From here on only this driver holds the run. However the block is left, MLflow learns how the run ended.
    with Run.open(prepared, startup=startup) as run:
        # Ray ends before the model is published: that needs no cluster, and survives one that is lost meanwhile.
        with ray_session(profile):
            wait_for_capacity(profile, run.log)
            startup.passed("Ray")
            # After `ray.init`, which installs its own SIGTERM handler.
            with StopSignal("steps since the last checkpoint are trained again") as stop:
                result = execute(run, on=ray_group, observer=stop)
        if result.outcome != "finished":
            return unfinished(run, result, stop.number)
        published = publish_model(run, result)

    # Written last: its presence means that MLflow has everything, the run's end too.
    write_result(prepared.storage, published)
    return published
