"""Ray Tune at work: `Tuner` places the trials' actors, keeps them, sees them die; what it asks goes to the conductor.

Tune's searchers and schedulers decide too, one layer below (`tune_search.py`, `tune_scheduler.py`): there they can be
led through a ledger again. Tune's own restore is not used: its snapshots are not atomic, know nothing of Train's
checkpoints, and refuse a sweep that was given more trials.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.error import TuneError
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from resnet_dist.config.space import Space
from resnet_dist.errors import Fault
from resnet_dist.launch.sweep.conductor import Conductor
from resnet_dist.launch.sweep.trial import run_trial
from resnet_dist.launch.sweep.trial_exchange import SAID, TrialSetup

_FOLDER = ".ray_tune"
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # CSV, JSON and TensorBoard files of every trial
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_MAX_PENDING_TRIALS_PG": "16",  # processes that start at a time; one by one if left to Tune
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "3600",  # `failure.wait_for_resources_s` has its own words
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "10",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}


class _Searcher(Searcher):
    """Tune asks: what next?"""

    def __init__(self, conductor: Conductor) -> None:
        super().__init__(metric=None, mode=None)
        self._conductor = conductor

    def suggest(self, trial_id: str) -> Any:
        if not self._conductor.num_in_flight:
            self._conductor.tick(0)  # with nothing to run Tune asks for minutes, and does nothing else
        if self._conductor.is_over():
            return Searcher.FINISHED
        return self._conductor.next_config()

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """The scheduler has heard of it."""

    def save(self, checkpoint_path: str) -> None:
        """The ledger has it."""


class _Scheduler(FIFOScheduler):
    """Tune tells: a report, a death. Never says STOP: the trial ends itself."""

    def __init__(self, conductor: Conductor) -> None:
        super().__init__()
        self._conductor = conductor

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        if SAID in result:
            self._conductor.reported(trial.config["trial"], json.loads(result[SAID]))
        return TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: TuneController, trial: Trial) -> None:
        self._conductor.died(trial.config["trial"], f"its process died: {_first_line(trial.get_error())}")

    def choose_trial_to_run(self, tune_controller: TuneController) -> Trial | None:
        trials = tune_controller.get_live_trials()
        self._conductor.tick(sum(trial.status == Trial.RUNNING for trial in trials))
        return super().choose_trial_to_run(tune_controller)


class _Stopper(tune.Stopper):
    """Ends everything at once when the conductor cannot go on."""

    def __init__(self, conductor: Conductor) -> None:
        self._conductor = conductor

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._conductor.fatal is not None


def run_trials(conductor: Conductor, setup: TrialSetup, space: Space, sweep_dir: Path) -> None:
    """Lets Tune run trials until the conductor has no more. Raises Fault."""
    os.environ.update({**_ENVIRONMENT, **{key: os.environ[key] for key in _ENVIRONMENT if key in os.environ}})
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    shutil.rmtree(sweep_dir / _FOLDER, ignore_errors=True)
    resources = space.resources
    # The driver of a worker group needs next to nothing, and no CPU of those that the workers are waiting for.
    needs = {"cpu": resources.cpus, "gpu": resources.gpus} if setup.is_light else {"node:__internal_head__": 0.001}
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, setup=setup), needs),
        tune_config=tune.TuneConfig(
            search_alg=_Searcher(conductor),
            scheduler=_Scheduler(conductor),
            num_samples=-1,
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=_FOLDER,
            storage_path=str(sweep_dir),
            stop=_Stopper(conductor),
            failure_config=tune.FailureConfig(max_failures=0),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except TuneError as error:
        if conductor.fatal is None:
            raise Fault(f"Ray Tune ended the sweep: {_last_line(error)}") from error
    finally:
        shutil.rmtree(sweep_dir / _FOLDER, ignore_errors=True)
    if conductor.fatal is not None:
        raise conductor.fatal


def _name(trial: Trial) -> str:
    """Tune's, in Ray's dashboard; a trial that goes on is another one to Tune."""
    return f"{trial.config['trial']}-{trial.trial_id}"


def _first_line(error: BaseException | None) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _last_line(error: BaseException) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
