"""What a trial and the driver say to each other, and what the sweep makes of Ray's faults."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.air.execution._internal import RayActorManager
from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError
from ray.tune.result import DONE
from ray.tune.schedulers import TrialScheduler

from data_prep.runtime.ray_errors import explain
from data_prep.runtime.stop import StopFlag
from resnet_dist.config.space import Space
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.ray_internals import as_actor_error, every_lost_actor_is_a_dead_one
from resnet_dist.sweeps import trial as trial_module
from resnet_dist.sweeps.ledger import Ledger, Verdict
from resnet_dist.sweeps.points import planned_points
from resnet_dist.sweeps.ray_tune import LedgerScheduler
from resnet_dist.sweeps.runner import TrialRunner
from resnet_dist.sweeps.sweep import Sweep
from resnet_dist.sweeps.trial import MESSAGE, TrialActor, TrialEvaluation, TrialObserver, TrialResult, TrialSetup

LOW = "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: 6) was \
22.70GB used / 23.54GB limit (0.96)"
SETUP = TrialSetup(profile=cast(Any, None), parent_run_id="parent", is_light=True, environment={})


def an_actor(monkeypatch: pytest.MonkeyPatch, train: Any) -> TrialActor:
    """An actor in this process, in which `train` takes the place of a training."""
    monkeypatch.setattr(trial_module, "train_trial", train)
    monkeypatch.setattr(trial_module, "configure_environment", lambda environment: None)
    actor = TrialActor.__new__(TrialActor)
    actor.setup({"trial": "t0000"}, SETUP)
    return actor


def next_said(actor: TrialActor) -> TrialEvaluation | TrialResult:
    while not (result := actor.step()):
        continue
    said: TrialEvaluation | TrialResult = result[MESSAGE]
    return said


def test_nothing_is_trained_before_the_verdict_and_nothing_after_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[int] = []

    def train(config: Any, setup: TrialSetup, observer: TrialObserver) -> TrialResult:
        observer.steps_per_epoch = 10
        for step in (10, 20, 30):
            trained.append(step)
            observer.evaluated(step, {"val/top1": 50.0 + step, "train/lr": 0.1})
            if observer.stop_requested():
                return TrialResult("stopped", epoch=step / 10, step=step)
        raise AssertionError("it was stopped")

    actor = an_actor(monkeypatch, train)
    assert next_said(actor) == TrialEvaluation(epoch=1.0, step=10, metrics={"val/top1": 60.0})
    assert trained == [10]
    actor.receive("go on")
    assert next_said(actor) == TrialEvaluation(epoch=2.0, step=20, metrics={"val/top1": 70.0})
    actor.receive("stop")
    assert next_said(actor) == TrialResult("stopped", epoch=2.0, step=20)
    assert actor.step() == {DONE: True}
    assert trained == [10, 20]


def test_a_trial_is_stopped_between_evaluations_and_the_next_one_starts_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(config: Any, setup: TrialSetup, observer: TrialObserver) -> TrialResult:
        while not observer.stop_requested():
            threading.Event().wait(0.01)
        return TrialResult("stopped", error=config["trial"])

    monkeypatch.setattr(trial_module, "_STEP_S", 0.05)
    actor = an_actor(monkeypatch, train)
    assert actor.step() == {}
    actor.receive("wait")
    assert next_said(actor) == TrialResult("stopped", error="t0000")
    assert actor.reset_config({"trial": "t0001"})
    assert actor.step() == {}
    actor.receive("wait")
    assert next_said(actor) == TrialResult("stopped", error="t0001")


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (UserError("no such data"), TrialResult("mistake", error="no such data")),
        (Fault("the disk is full"), TrialResult("fault", error="the disk is full")),
        (SystemExit(3), TrialResult("fault", error="SystemExit: 3")),
    ],
)
def test_whatever_goes_wrong_in_a_trial_comes_back_in_words(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, end: TrialResult
) -> None:
    def train(config: Any, setup: TrialSetup, observer: TrialObserver) -> TrialResult:
        raise error

    assert next_said(an_actor(monkeypatch, train)) == end


def test_a_silent_driver_ends_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_module, "_VERDICT_LIMIT_S", 0.01)
    with pytest.raises(Fault, match="has not judged step 10 within"):
        TrialObserver().evaluated(10, {})


class FakeRunner:
    def __init__(self, verdict: Verdict) -> None:
        self.verdict, self.ends = verdict, list[TrialResult]()

    def answer(self, trial: str, evaluation: TrialEvaluation | None) -> Verdict:
        return self.verdict

    def ended(self, trial: str, end: TrialResult) -> None:
        self.ends.append(end)


@pytest.mark.parametrize(
    ("said", "verdict", "told"),
    [
        (TrialEvaluation(epoch=1, step=10, metrics={}), "go on", ["go on"]),
        (TrialEvaluation(epoch=1, step=10, metrics={}), "stop", ["stop"]),
        (None, "go on", []),
        (None, "wait", ["wait"]),
    ],
)
def test_the_scheduler_tells_the_trial_and_lets_it_end_itself(
    said: TrialEvaluation | None, verdict: Verdict, told: list[Verdict]
) -> None:
    heard: list[Verdict] = []
    actor = SimpleNamespace(receive=SimpleNamespace(remote=heard.append))
    trial = SimpleNamespace(config={"trial": "t0000"}, temporary_state=SimpleNamespace(ray_actor=actor))
    runner = FakeRunner(verdict)
    scheduler = LedgerScheduler(cast(TrialRunner, runner))
    decision = scheduler.on_trial_result(cast(Any, None), cast(Any, trial), {MESSAGE: said})
    assert (decision, heard) == (TrialScheduler.CONTINUE, told)
    end = TrialResult("stopped")
    decision = scheduler.on_trial_result(cast(Any, None), cast(Any, trial), {MESSAGE: end})
    assert decision == TrialScheduler.CONTINUE
    assert (runner.ends, heard) == ([end], told)


def test_a_sweep_that_is_to_stop_has_its_trials_wait() -> None:
    verdicts = iter(["go on", "stop", "go on"])
    sweep = SimpleNamespace(report=lambda *_: next(verdicts), budget_spent=lambda: None)
    stop = StopFlag()
    runner = TrialRunner(cast(Any, None), cast(Any, sweep), cast(Any, None), stop)
    evaluation = TrialEvaluation(epoch=1, step=10, metrics={})
    assert [runner.answer("t0000", said) for said in (None, evaluation)] == ["go on", "go on"]
    stop.number = 2
    assert [runner.answer("t0000", said) for said in (None, evaluation, evaluation)] == ["wait", "stop", "wait"]


def test_a_trial_that_dies_after_it_was_told_to_stop_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    space = Space.model_validate(
        {
            "base": "b",
            "space": {"optim.lr": {"kind": "grid", "values": [0.1, 0.2]}},
            "search": {"kind": "grid"},
            "scheduler": {"kind": "asha", "first_rung": 0.5, "rungs": 1, "reduction_factor": 2},
        }
    )
    sweep = Sweep(space, Ledger(), planned=planned_points(space, 2), total_epochs=lambda point: 2.0, now_s=lambda: 0.0)
    sweep.begin()
    runner, over = TrialRunner(cast(Any, None), sweep, cast(Any, None), StopFlag()), []
    monkeypatch.setattr(runner, "_end", lambda trial, outcome, result, reason: over.append((trial, outcome, reason)))
    for top1 in (50.0, 40.0):
        trial = sweep.next_trial()
        assert trial is not None
        sweep.start(trial)
        verdict = runner.answer(trial.name, TrialEvaluation(epoch=1, step=10, metrics={"val/top1": top1}))
    assert verdict == "stop"
    runner.died("t0001", "its process died")
    assert over == [("t0001", "stopped", "stopped early at epoch 1")]


def failed_by(error: Exception) -> list[Exception]:
    """What Tune's callbacks are told of a task that ended with `error`."""
    told: list[Exception] = []
    actor = SimpleNamespace(actor_id=1, _on_error=None)
    task = SimpleNamespace(_tracked_actor=actor, _on_error=lambda _, exception: told.append(exception))
    manager = SimpleNamespace(_failed_actor_ids=set(), _cleanup_actor=lambda tracked_actor: None)
    RayActorManager._actor_task_failed(cast(Any, manager), tracked_actor_task=cast(Any, task), exception=error)
    return told


@pytest.mark.parametrize("error", [OutOfMemoryError(LOW), NodeDiedError("gone"), ActorDiedError()])
def test_every_lost_process_is_a_dead_actor_to_tune(error: Exception) -> None:
    with every_lost_actor_is_a_dead_one():
        (told,) = failed_by(error)
        at_start: list[Exception] = []
        actor = SimpleNamespace(actor_id=1, _on_error=lambda _, exception: at_start.append(exception))
        manager = SimpleNamespace(_failed_actor_ids=set(), _cleanup_actor=lambda tracked_actor: None)
        RayActorManager._actor_start_failed(cast(Any, manager), tracked_actor=cast(Any, actor), exception=error)
    assert isinstance(told, RayActorError)
    assert isinstance(at_start[0], RayActorError)
    assert explain(told).is_transient
    with pytest.raises(RuntimeError, match="unexpected exception"):
        failed_by(OutOfMemoryError(LOW))  # Tune by itself, outside


def test_out_of_memory_keeps_its_words() -> None:
    told = explain(as_actor_error(OutOfMemoryError(LOW)))
    assert told.kind == "memory"
    assert told.sentence.startswith("node 10.0.0.7 ran out of memory (22.7 of 23.5 GB); fewer workers")
    task_error = RayTaskError("f", "Traceback", KeyError("x"), "p", 1, "1.2.3.4")
    assert as_actor_error(task_error) is task_error
