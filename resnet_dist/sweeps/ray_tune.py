"""What the driver of a sweep does when Ray Tune asks or tells it something: the ledger first, then MLflow, then a line.

One thread, Tune's, calls everything here; the main thread only waits.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.air.execution._internal import RayActorManager
from ray.air.execution._internal.tracked_actor import TrackedActor
from ray.air.execution._internal.tracked_actor_task import TrackedActorTask
from ray.exceptions import RayActorError, RayError
from ray.tune.error import TuneError
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from data_prep.runtime.ray_errors import explain, explain_text, is_lost_process
from resnet_dist.config.space import Space
from resnet_dist.errors import Fault
from resnet_dist.launch.cluster import alive_nodes
from resnet_dist.launch.control import StopSignal
from resnet_dist.storage.base import RunStorage
from resnet_dist.sweeps.ledger import Outcome, TrialState, Verdict, summary
from resnet_dist.sweeps.points import describe
from resnet_dist.sweeps.prepare import PreparedSweep, trials_at_once
from resnet_dist.sweeps.ranking import rank
from resnet_dist.sweeps.record import SweepRecord
from resnet_dist.sweeps.sweep import Sweep, stopped_at
from resnet_dist.sweeps.trial import SAID, TrialEnd, TrialSetup, run_trial
from resnet_dist.tracking.sync import end_trial
from resnet_dist.training.checkpoint import prune

_LOOK_EVERY_S = 2.0
_THE_SAME = "the same command resumes the sweep"
_HOPELESS = 3
"""The sweep ends if its first trials all fail: it is not the points' fault."""


class Conductor:
    def __init__(
        self, prepared: PreparedSweep, sweep: Sweep, record: SweepRecord, control: Any, stop: StopSignal
    ) -> None:
        self.fatal: Fault | None = None
        """Why the sweep cannot go on; Tune is told to end."""
        self._prepared, self._sweep, self._record, self._control, self._stop = prepared, sweep, record, control, stop
        self._in_flight: set[str] = set()
        self._verdicts: dict[str, tuple[int, Verdict]] = {}
        """Trial -> the step that it reported last, and the answer."""
        self._room = 0
        self._looked_s = -_LOOK_EVERY_S
        self._alive_s = time.monotonic()
        self._asked_s: float | None = None

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        """Tune writes its objects to a file that nobody reads: the ledger is the memory."""
        return object, ()

    def next_config(self) -> dict[str, Any] | None:
        """Tune's config of the trial to start now; None: nothing now."""
        if self.why_no_more() or len(self._in_flight) >= self._room_now():
            return None
        trial = self._sweep.next_trial()
        if trial is None:
            return None
        self._sweep.start(trial)
        self._in_flight.add(trial.name)
        self._verdicts.pop(trial.name, None)  # one that resumes may evaluate a step again
        recipe = self._prepared.builder.proxy(trial.point, trial.seed_number)
        run = self._prepared.trial_run(trial.name)
        return {"trial": trial.name, "run": run, "recipe": recipe.model_dump(mode="json")}

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def is_over(self) -> bool:
        """Nothing will be started any more."""
        return self.fatal is not None or self.why_no_more() is not None or self._sweep.is_over()

    def why_no_more(self) -> str | None:
        """Why no trial may start or go on, although there are some; None if they may."""
        if self._stop.number is not None:
            return "stopped: the same command goes on"
        return self._sweep.budget_spent()

    def reported(self, trial: str, result: Mapping[str, Any]) -> None:
        """An evaluation, answered before Tune lets the trial go on; or the trial's end."""
        if "end" in result:
            self._ended(trial, TrialEnd(**result["end"]))
            return
        step = int(result["step"])
        if self._verdicts.get(trial, (None, None))[0] != step:  # else told before, and lost on its way
            self._verdicts[trial] = (step, self._sweep.report(trial, result["epoch"], step, result["metrics"]))
        try:
            ray.get(self._control.tell.remote(trial, step, self._verdicts[trial][1]), timeout=60.0)
        except RayError as error:
            self.fatal = Fault(f"the sweep's own actor does not answer ({explain(error).sentence}); {_THE_SAME}")

    def died(self, trial: str, why: str) -> None:
        """The trial's process is gone; it goes on from its checkpoint, unless it failed too often."""
        if trial not in self._in_flight:
            return
        self._in_flight.discard(trial)
        self._sweep.leave(trial, why, is_fault=True)
        known = self._sweep.state.trials[trial]
        if known.num_faults > self._prepared.profile.failure.max_failures:
            end = TrialEnd("fault", epoch=known.epoch, metrics=known.metrics)
            self._over(trial, "failed", end, why)
        else:
            self._record.say(f"{trial} failed ({why}); it goes on from its last checkpoint")

    def tick(self, num_running: int) -> None:
        """Called several times a second. `num_running`: trials whose process is up."""
        now_s = time.monotonic()
        failure = self._prepared.profile.failure
        # A process that is asked for needs its resources and then its start-up, which Ray does not tell apart.
        limit_s = failure.wait_for_resources_s + (failure.progress_timeout_s if self._in_flight else 0.0)
        if num_running or (not self._in_flight and self._room):
            self._alive_s = now_s
        elif now_s - self._alive_s > limit_s:
            self.fatal = Fault(
                f"no trial's process came up within {limit_s:g} s (failure.wait_for_resources_s, and "
                "failure.progress_timeout_s for its start); the same command goes on when the cluster has room"
            )
        if (why := self.why_no_more()) is None or not self._in_flight:
            return
        if self._asked_s is None:
            self._asked_s = now_s
            self._record.say(f"{why}; {len(self._in_flight)} trials in flight save a checkpoint first")
            self._control.request_stop.remote()
        elif now_s - self._asked_s <= failure.stop_grace_s:
            self._control.request_stop.remote()  # again and again: the actor may have been killed and come back
        else:
            self.fatal = Fault(
                f"trials did not stop within {failure.stop_grace_s:g} s (failure.stop_grace_s): "
                f"{', '.join(sorted(self._in_flight))}; the same command goes on from their last checkpoints"
            )

    def _room_now(self) -> int:
        now_s = time.monotonic()
        if now_s - self._looked_s >= _LOOK_EVERY_S:
            self._looked_s = now_s
            self._room = trials_at_once(self._prepared.space, self._prepared.trial_profile, alive_nodes())
        return self._room

    def _ended(self, trial: str, end: TrialEnd) -> None:
        if end.outcome == "fault":
            self.died(trial, end.error)
            return
        self._in_flight.discard(trial)
        if end.outcome == "mistake":
            self._over(trial, "failed", end, end.error)
        elif end.outcome == "stopped" and end.verdict != "stop":
            self._sweep.leave(trial, "waits" if end.verdict == "wait" else "stopped with the sweep")
        else:
            known = self._sweep.state.trials[trial]
            self._over(trial, end.outcome, end, stopped_at(known) if end.outcome == "stopped" else end.outcome)

    def _over(self, trial: str, outcome: Outcome, end: TrialEnd, reason: str) -> None:
        """Written down, told, and cleaned up after."""
        storage = self._prepared.trial_storage(trial)
        self._sweep.end(
            trial, outcome, epoch=end.epoch, step=end.step, metrics=end.metrics, reason=reason, run_id=end.run_id
        )
        if outcome == "failed":
            end_trial(storage, self._prepared.profile.tracking_uri, "FAILED", f"failed: {reason}")
        with suppress(OSError):  # what is left over costs room, and no trial
            thin(storage, outcome)
        state = self._sweep.state
        ended = [known for known in state.trials.values() if known.end is not None]
        ranking = rank(self._prepared.space, state)
        best = ranking.best.score if ranking.best else None
        numbers = summary(state, self._prepared.total_epochs(state.trials[trial].point))
        self._record.ended(ranking, len(ended), numbers)
        self._record.say(self._line(state.trials[trial], len(ended), best))
        if len(ended) >= _HOPELESS and all(known.status == "failed" for known in ended):
            self.fatal = Fault(
                f"the first {len(ended)} trials failed, so the sweep ends: {reason}; the last is {storage.location}"
            )

    def _line(self, trial: TrialState, num_ended: int, best: float | None) -> str:
        metric = self._prepared.space.metric
        score = f" {metric} {trial.metrics[metric]:.4g}" if metric in trial.metrics else ""
        so_far = f"; best so far {best:.4g}" if best is not None else ""
        reason = trial.end.reason if trial.end else ""
        count = f"[{num_ended} of {num_ended + self.num_open()}]"
        return f"{count} {trial.name} {reason}{score} ({describe(trial.point)}){so_far}"

    def num_open(self) -> int:
        """Trials that are not over, as far as is known."""
        trials = self._sweep.state.trials.values()
        points = {trial.number for trial in trials}
        to_come = max(self._sweep.num_points - len(points), 0)
        return sum(trial.end is None for trial in trials) + to_come


def thin(storage: RunStorage, outcome: Outcome) -> None:
    """A trial that is over needs no checkpoint to go on from; one that reached its end keeps its weights."""
    prune(storage, keep=1 if outcome == "finished" else 0)
    if outcome != "finished":
        storage.remove("best")


# Ray Tune at work: `Tuner` places the trials' actors, keeps them, sees them die; what it asks goes to the conductor.


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
        self._conductor.died(trial.config["trial"], f"its process died: {_why(trial)}")

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
        with every_death_of_an_actor():
            tuner.fit()
    except Exception as error:
        if conductor.fatal is None:
            why = explain_text(str(error), "error") if isinstance(error, TuneError) else explain(error)
            raise Fault(f"Ray Tune ended the sweep: {why.sentence}; the same command resumes it") from error
    finally:
        shutil.rmtree(sweep_dir / _FOLDER, ignore_errors=True)
    if conductor.fatal is not None:
        raise conductor.fatal


def _name(trial: Trial) -> str:
    """Tune's, in Ray's dashboard; a trial that goes on is another one to Tune."""
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
