"""A trial in its process: it trains, reports its evaluations to the sweep's driver, and waits for the verdicts."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ray import tune
from ray.tune.result import DONE

from data_prep.runtime.ray_errors import explain
from resnet_dist.config.profile import Profile
from resnet_dist.config.recipe import Recipe
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.execute import execute, in_process
from resnet_dist.launch.preflight import prepare
from resnet_dist.launch.ray_group import ray_group
from resnet_dist.launch.run import Run
from resnet_dist.sweeps.ledger import Verdict
from resnet_dist.tracking.connection import configure_environment
from resnet_dist.training.context import Observer

MESSAGE = "message"
"""The key of Tune's results that holds a `TrialEvaluation` or a `TrialResult`."""
EPOCH = "epoch"
"""The key that holds how far the trial is, where there is no message."""
_STEP_S = 1.0
_VERDICT_LIMIT_S = 300.0


@dataclass(frozen=True)
class TrialSetup:
    """What is the same for all trials of a sweep."""

    profile: Profile = field(repr=False)
    parent_run_id: str
    is_light: bool
    environment: Mapping[str, str] = field(repr=False)
    """What the driver set for Ray Train and MLflow."""


@dataclass(frozen=True)
class TrialEvaluation:
    epoch: float
    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class TrialResult:
    """A trial's last message."""

    outcome: Literal["finished", "stopped", "diverged", "mistake", "fault"]
    """stopped: by a verdict. mistake: the user's; trying again would not help."""
    epoch: float = 0.0
    step: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    run_id: str = ""
    """MLflow's."""
    error: str = ""


class TrialObserver(Observer):
    """Brings the evaluations of the thread that trains to the driver, and the driver's verdicts to the thread."""

    def __init__(self) -> None:
        self.verdict: Verdict = "go on"
        self.messages: queue.SimpleQueue[TrialEvaluation | TrialResult] = queue.SimpleQueue()
        self.steps_per_epoch = 1
        self.epoch = 0.0
        """How far the run is, the parent's epochs before a fork included."""
        self._is_answered = threading.Event()

    def progressed(self, step: int) -> None:
        self.epoch = step / self.steps_per_epoch

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Has the driver judge the trial. Raises Fault if it does not."""
        if self.stop_requested():
            return
        self._is_answered.clear()
        self.messages.put(TrialEvaluation(step / self.steps_per_epoch, step, judged(metrics)))
        if not self._is_answered.wait(_VERDICT_LIMIT_S):
            raise Fault(f"the sweep's driver has not judged step {step} within {_VERDICT_LIMIT_S:g} s")

    def stop_requested(self) -> bool:
        return self.verdict != "go on"

    def receive(self, verdict: Verdict) -> None:
        """The driver's verdict on the newest evaluation; anything but "go on" is final."""
        if not self.stop_requested():
            self.verdict = verdict
        self._is_answered.set()


class TrialActor(tune.Trainable):
    """One trial after the other, each in a thread of this process.

    Tune calls `step` again and again. It returns an evaluation, the trial's result, or after a second how far the trial
    is, so that the driver can also stop a trial between evaluations. The only failure that Tune sees is the death of
    the process: every error comes back as a `TrialResult`.
    """

    def setup(self, config: dict[str, Any], setup: TrialSetup) -> None:
        configure_environment(os.environ)  # a node may have settings of its own
        os.environ.update(setup.environment)
        self._setup = setup
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial. `new_config`: `trial` (its name in the ledger), `run` (its name in storage), `recipe`."""
        self._observer, self._is_over = TrialObserver(), False
        threading.Thread(target=_train, args=(new_config, self._setup, self._observer), daemon=True).start()
        return True

    def step(self) -> dict[str, Any]:
        if self._is_over:
            # One step after the result was sent: by then Tune has the next trial, and keeps this process for it.
            return {DONE: True}
        try:
            message = self._observer.messages.get(timeout=_STEP_S)
        except queue.Empty:
            return {EPOCH: self._observer.epoch} if self._observer.epoch else {}
        self._is_over = isinstance(message, TrialResult)
        return {MESSAGE: message}

    def receive(self, verdict: Verdict) -> None:
        """Called by the driver between two steps."""
        self._observer.receive(verdict)


def _train(config: Mapping[str, Any], setup: TrialSetup, observer: TrialObserver) -> None:
    try:
        result = train_trial(config, setup, observer)
    except UserError as error:
        result = TrialResult("mistake", error=str(error))
    except Fault as error:
        result = TrialResult("fault", error=str(error))
    except BaseException as error:  # noqa: BLE001 - a trial that fails must not end the sweep
        result = TrialResult("fault", error=explain(error).sentence)
    observer.messages.put(result)


def train_trial(config: Mapping[str, Any], setup: TrialSetup, observer: TrialObserver) -> TrialResult:
    """Trains the trial from where it is to its end or to a stop, in this process or on workers of its own.

    In this process nothing more is trained before the driver has judged an evaluation; workers continue meanwhile, and
    receive the verdict about a second later. Raises UserError, Fault.
    """
    prepared = prepare(Recipe.model_validate(config["recipe"]), setup.profile, config["run"])
    if observer.stop_requested():
        return TrialResult("stopped")
    per_epoch = observer.steps_per_epoch = prepared.plan.steps_per_epoch
    light, tags = setup.is_light, {"trial": config["trial"]}
    with Run.open(prepared, parent_run_id=setup.parent_run_id, brief=light, tags=tags) as run:
        result = execute(run, on=in_process if light else ray_group, observer=observer)
        epoch = result.step / per_epoch
        match result.outcome:
            case "diverged":
                run.ends(result, f"diverged at epoch {epoch:g}")
            case "stopped":
                run.ends(result, f"{'stopped early' if observer.verdict == 'stop' else 'waits'} at epoch {epoch:g}")
    return TrialResult(result.outcome, epoch, result.step, judged(result.metrics), run.record.handle.run_id)


def judged(metrics: Mapping[str, float]) -> dict[str, float]:
    """What the ledger keeps of a run's metrics; MLflow has all."""
    return {key: float(value) for key, value in metrics.items() if key.startswith("val/") or key == "train/loss"}
