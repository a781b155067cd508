"""Ray Tune runs the trials: it places their processes by CPUs and GPUs, keeps each for the next trial, and sees them
die. Its searcher and its scheduler here ask the `TrialRunner`, and so the ledger, what to start and what to answer.

Why an adapter, and not Tune's own stopping and restoring (ray 2.60): a trial that Tune stops or pauses is left as it is
or killed; a worker group of Ray Train in it would live on unless a dashboard runs, its MLflow run would have no end and
its last steps would be lost. So the scheduler never returns STOP or PAUSE: it sends the verdict to the `TrialActor`,
which saves a checkpoint and ends by itself. `Tuner.restore` needs snapshots that are not written atomically, know
nothing of Ray Train's checkpoints and refuse a sweep with more trials. So a new driver starts a new `Tuner` from the
ledger, and a trial that resumes is a new one to Tune.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.error import TuneError
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from data_prep.runtime.ray_errors import explain, explain_text
from resnet_dist.config.space import Space
from resnet_dist.errors import Fault
from resnet_dist.launch.ray_internals import every_lost_actor_is_a_dead_one, trial_actor
from resnet_dist.sweeps.runner import TrialRunner
from resnet_dist.sweeps.trial import EPOCH, MESSAGE, TrialActor, TrialResult, TrialSetup

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
    """Starts what is due by the ledger."""

    def __init__(self, runner: TrialRunner) -> None:
        super().__init__(metric=None, mode=None)
        self._runner = runner

    def suggest(self, trial_id: str) -> Any:
        if not self._runner.running():
            self._runner.check_time(num_up=0)  # with nothing to run Tune asks for minutes, and does nothing else
        if self._runner.is_over():
            return Searcher.FINISHED
        return self._runner.next_config()

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        pass  # the scheduler sees it too

    def save(self, checkpoint_path: str) -> None:
        pass  # the ledger is the memory


class LedgerScheduler(FIFOScheduler):
    """Writes to the ledger what trials report, and sends them the verdicts."""

    def __init__(self, runner: TrialRunner) -> None:
        super().__init__()
        self._runner = runner

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        message = result.get(MESSAGE)
        if isinstance(message, TrialResult):
            self._runner.ended(trial.config["trial"], message)
        elif (actor := trial_actor(trial)) is not None:
            verdict = self._runner.answer(trial.config["trial"], message)
            if EPOCH in result:
                self._runner.progress.epochs[trial.config["trial"]] = result[EPOCH]
            if message is not None or verdict != "go on":
                actor.receive.remote(verdict)  # arrives before the next `step`
        return TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: TuneController, trial: Trial) -> None:
        self._runner.died(trial.config["trial"], f"its process died: {_why(trial)}")

    def choose_trial_to_run(self, tune_controller: TuneController) -> Trial | None:
        trials = tune_controller.get_live_trials()
        self._runner.check_time(num_up=sum(trial.status == Trial.RUNNING for trial in trials))
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
        with every_lost_actor_is_a_dead_one():
            _beside_the_main_thread(tuner.fit)
    except Exception as error:
        if runner.fatal is None:
            why = explain_text(str(error), "error") if isinstance(error, TuneError) else explain(error)
            raise Fault(f"Ray Tune ended the sweep: {why.sentence}; the same command resumes it") from error
    finally:
        shutil.rmtree(sweep_dir / _FOLDER, ignore_errors=True)
    if runner.fatal is not None:
        raise runner.fatal


def _beside_the_main_thread(work: Callable[[], object]) -> None:
    """The main thread must be free for signals: Tune would replace their handlers there."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            raised.append(error)

    thread = threading.Thread(target=run, name="ray-tune", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
    if raised:
        raise raised[0]


def _name(trial: Trial) -> str:
    """In Ray's dashboard."""
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
    return explain_text(newest).sentence if newest.strip() else "Ray gives no reason"
