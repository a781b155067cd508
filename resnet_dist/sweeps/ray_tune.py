"""Ray Tune runs the trials: it places their actors by CPUs and GPUs, keeps each for the next trial, and sees them die.

Its searcher and scheduler are views of the ledger, through the `TrialRunner`: what to start next, what to answer a
trial. Three things Tune cannot do, and what is here instead:

- End a trial in order. Tune would leave the actor as it is, or kill it: a worker group of Ray Train in it lives on
  unless a dashboard runs (ray 2.60), its MLflow run has no end and its last steps are lost. So the scheduler never
  returns STOP or PAUSE: it calls `TrialActor.tell`, and the trial saves a checkpoint and ends itself.
- Resume. `Tuner.restore` needs snapshots that are not written atomically, know nothing of Train's checkpoints and
  refuse a sweep with more trials. A new driver starts a new `Tuner` from the ledger; a trial that resumes is a new one
  to Tune.
- Take every lost process for a lost process: `every_death_of_an_actor`.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import tune
from ray.air.execution._internal import RayActorManager
from ray.air.execution._internal.tracked_actor import TrackedActor
from ray.air.execution._internal.tracked_actor_task import TrackedActorTask
from ray.exceptions import RayActorError
from ray.tune.error import TuneError
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from data_prep.runtime.ray_errors import explain, explain_text, is_lost_process
from resnet_dist.config.space import Space
from resnet_dist.errors import Fault
from resnet_dist.sweeps.runner import TrialRunner
from resnet_dist.sweeps.trial import SAID, TrialActor, TrialEnd, TrialSetup

_FOLDER = ".ray_tune"
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # CSV, JSON and TensorBoard files of every trial
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_MAX_PENDING_TRIALS_PG": "16",  # processes that start at a time; one by one if left to Tune
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "3600",  # `failure.wait_for_resources_s` has its own words
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}


class LedgerSearcher(Searcher):
    """What the ledger has to be trained next."""

    def __init__(self, runner: TrialRunner) -> None:
        super().__init__(metric=None, mode=None)
        self._runner = runner

    def suggest(self, trial_id: str) -> Any:
        if not self._runner.running():
            self._runner.tick(num_up=0)  # with nothing to run Tune asks for minutes, and does nothing else
        if self._runner.is_over():
            return Searcher.FINISHED
        return self._runner.next_config()

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """The scheduler has heard of it."""

    def save(self, checkpoint_path: str) -> None:
        """The ledger has it."""


class LedgerScheduler(FIFOScheduler):
    """Writes to the ledger what trials report, and tells them what follows from it."""

    def __init__(self, runner: TrialRunner) -> None:
        super().__init__()
        self._runner = runner

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        said = result.get(SAID)
        if isinstance(said, TrialEnd):
            self._runner.ended(trial.config["trial"], said)
        elif trial.temporary_state.ray_actor is not None:
            verdict = self._runner.answer(trial.config["trial"], said)
            if said is not None or verdict != "go on":
                trial.temporary_state.ray_actor.tell.remote(verdict)  # arrives before the next `step`
        return TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: TuneController, trial: Trial) -> None:
        self._runner.died(trial.config["trial"], f"its process died: {_why(trial)}")

    def choose_trial_to_run(self, tune_controller: TuneController) -> Trial | None:
        trials = tune_controller.get_live_trials()
        self._runner.tick(num_up=sum(trial.status == Trial.RUNNING for trial in trials))
        return super().choose_trial_to_run(tune_controller)


class FatalStopper(tune.Stopper):
    """Ends everything at once when the sweep cannot be continued."""

    def __init__(self, runner: TrialRunner) -> None:
        self._runner = runner

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._runner.fatal is not None


def run_trials(runner: TrialRunner, setup: TrialSetup, space: Space, sweep_dir: Path) -> None:
    """Lets Tune run trials until the runner has no more. Raises Fault."""
    os.environ.update({**_ENVIRONMENT, **{key: os.environ[key] for key in _ENVIRONMENT if key in os.environ}})
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    shutil.rmtree(sweep_dir / _FOLDER, ignore_errors=True)
    resources = space.resources
    # The driver of a worker group needs next to nothing, and no CPU of those that the workers are waiting for.
    needs = {"cpu": resources.cpus, "gpu": resources.gpus} if setup.is_light else {"node:__internal_head__": 0.001}
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(TrialActor, setup=setup), needs),
        tune_config=tune.TuneConfig(
            search_alg=LedgerSearcher(runner),
            scheduler=LedgerScheduler(runner),
            num_samples=-1,
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=_FOLDER,
            storage_path=str(sweep_dir),
            stop=FatalStopper(runner),
            failure_config=tune.FailureConfig(max_failures=0),
            # Trials write their own; one that Tune asks for fails, and with it goes the process.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )
    try:
        with every_death_of_an_actor():
            tuner.fit()
    except Exception as error:
        if runner.fatal is None:
            why = explain_text(str(error), "error") if isinstance(error, TuneError) else explain(error)
            raise Fault(f"Ray Tune ended the sweep: {why.sentence}; the same command resumes it") from error
    finally:
        shutil.rmtree(sweep_dir / _FOLDER, ignore_errors=True)
    if runner.fatal is not None:
        raise runner.fatal


def _name(trial: Trial) -> str:
    """Tune's, in Ray's dashboard; a trial that resumes is another one to Tune."""
    return f"{trial.config['trial']}-{trial.trial_id}"


def _why(trial: Trial) -> str:
    """Tune writes each failure's text into a file beside the trial. The pickle beside it is not opened: the folder is
    on storage that others may write to.
    """
    try:
        text = Path(trial.error_file or os.devnull).read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    newest = text.rpartition("Failure # ")[2].partition("\n")[2]
    return explain_text(newest).sentence if newest.strip() else "Ray does not say why"


@contextmanager
def every_death_of_an_actor() -> Iterator[None]:
    """Inside, Tune takes whatever Ray says of a lost actor for its death: out of memory or with its node, it would end
    the sweep (ray 2.60: `RayActorManager` knows RayActorError alone).
    """
    of_task, of_start = RayActorManager._actor_task_failed, RayActorManager._actor_start_failed

    def task_failed(self: RayActorManager, tracked_actor_task: TrackedActorTask, exception: Exception) -> None:
        of_task(self, tracked_actor_task, as_actor_error(exception))

    def start_failed(self: RayActorManager, tracked_actor: TrackedActor, exception: Exception) -> None:
        of_start(self, tracked_actor, as_actor_error(exception))

    RayActorManager._actor_task_failed, RayActorManager._actor_start_failed = task_failed, start_failed
    try:
        yield
    finally:
        RayActorManager._actor_task_failed, RayActorManager._actor_start_failed = of_task, of_start


def as_actor_error(error: Exception) -> Exception:
    """The same death, as the one class of them that Tune knows."""
    if not is_lost_process(error) or isinstance(error, RayActorError):
        return error
    return RayActorError(None, str(error))
