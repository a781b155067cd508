"""The messages between a trial and the sweep's driver, and what a sweep makes of Ray's faults."""

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
EVALUATION = TrialEvaluation(epoch=1, step=10, metrics={})
SETUP = TrialSetup(profile=cast(Any, None), parent_run_id="parent", is_light=True, environment={})


def an_actor(monkeypatch: pytest.MonkeyPatch, train: Any) -> TrialActor:
    """An actor in this process, in which `train` takes the place of a training."""
    monkeypatch.setattr(trial_module, "train_trial", train)
    monkeypatch.setattr(trial_module, "configure_environment", lambda environment: None)
    actor = TrialActor.__new__(TrialActor)
    actor.setup({"trial": "t0000"}, SETUP)
    return actor


def next_message(actor: TrialActor) -> TrialEvaluation | TrialResult:
    while not (result := actor.step()):
        continue
    message: TrialEvaluation | TrialResult = result[MESSAGE]
    return message


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
    assert next_message(actor) == TrialEvaluation(epoch=1.0, step=10, metrics={"val/top1": 60.0})
    assert trained == [10]
    actor.receive("go on")
    assert next_message(actor) == TrialEvaluation(epoch=2.0, step=20, metrics={"val/top1": 70.0})
    actor.receive("stop")
    assert next_message(actor) == TrialResult("stopped", epoch=2.0, step=20)
    assert actor.step() == {DONE: True}
    assert trained == [10, 20]


def test_a_trial_is_stopped_between_evaluations_and_the_next_one_starts_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(config: Any, setup: TrialSetup, observer: TrialObserver) -> TrialResult:
        while not observer.stop_requested():
            threading.Event().wait(0.01)
        return TrialResult("stopped", error=config["trial"])

    monkeypatch.setattr(trial_module, "_STEP_S", 0.05)
    actor = an_actor(monkeypatch, train)
    for name in ("t0000", "t0001"):
        assert actor.step() == {}
        actor.receive("wait")
        assert next_message(actor) == TrialResult("stopped", error=name)
        assert actor.reset_config({"trial": "t0001"})


@pytest.mark.parametrize(
    ("error", "result"),
    [
        (UserError("no such data"), TrialResult("mistake", error="no such data")),
        (Fault("the disk is full"), TrialResult("fault", error="the disk is full")),
        (SystemExit(3), TrialResult("fault", error="SystemExit: 3")),
    ],
)
def test_whatever_fails_in_a_trial_comes_back_in_words(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, result: TrialResult
) -> None:
    def train(config: Any, setup: TrialSetup, observer: TrialObserver) -> TrialResult:
        raise error

    assert next_message(an_actor(monkeypatch, train)) == result


def test_a_silent_driver_ends_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_module, "_VERDICT_LIMIT_S", 0.01)
    with pytest.raises(Fault, match="has not judged step 10 within"):
        TrialObserver().evaluated(10, {})


@pytest.mark.parametrize(
    ("message", "verdict", "received"),
    [
        (EVALUATION, "go on", ["go on"]),
        (EVALUATION, "stop", ["stop"]),
        (None, "go on", []),
        (None, "wait", ["wait"]),
        (TrialResult("stopped"), "go on", []),
    ],
)
def test_the_scheduler_sends_the_verdict_and_lets_the_trial_end_by_itself(
    message: TrialEvaluation | TrialResult | None, verdict: Verdict, received: list[Verdict]
) -> None:
    verdicts, results = list[Verdict](), list[TrialResult]()
    actor = SimpleNamespace(receive=SimpleNamespace(remote=verdicts.append))
    trial = SimpleNamespace(config={"trial": "t0000"}, temporary_state=SimpleNamespace(ray_actor=actor))
    runner = SimpleNamespace(answer=lambda *_: verdict, ended=lambda _, result: results.append(result))
    decision = LedgerScheduler(cast(Any, runner)).on_trial_result(cast(Any, None), cast(Any, trial), {MESSAGE: message})
    assert (decision, verdicts) == (TrialScheduler.CONTINUE, received)
    assert results == ([message] if isinstance(message, TrialResult) else [])


def test_a_sweep_that_is_to_stop_has_its_trials_wait() -> None:
    verdicts = iter(["go on", "stop", "go on"])
    sweep = SimpleNamespace(report=lambda *_: next(verdicts), budget_spent=lambda: None)
    stop = StopFlag()
    runner = TrialRunner(cast(Any, None), cast(Any, sweep), cast(Any, None), stop, cast(Any, None))
    assert [runner.answer("t0000", message) for message in (None, EVALUATION)] == ["go on", "go on"]
    stop.number = 2
    assert [runner.answer("t0000", message) for message in (None, EVALUATION, EVALUATION)] == ["wait", "stop", "wait"]


def test_a_trial_that_dies_after_its_verdict_to_stop_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
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
    runner, ends = TrialRunner(cast(Any, None), sweep, cast(Any, None), StopFlag(), cast(Any, None)), []
    monkeypatch.setattr(runner, "_end", lambda trial, outcome, result, reason: ends.append((trial, outcome, reason)))
    for top1 in (50.0, 40.0):
        trial = sweep.next_trial()
        assert trial is not None
        sweep.start(trial)
        verdict = runner.answer(trial.name, TrialEvaluation(epoch=1, step=10, metrics={"val/top1": top1}))
    assert verdict == "stop"
    runner.died("t0001", "its process died")
    assert ends == [("t0001", "stopped", "stopped early at epoch 1")]


def tunes_error(callback: str, error: Exception) -> Exception:
    """What Tune makes of an actor whose task, or whose start, ended with `error`."""
    errors: list[Exception] = []
    on_error = SimpleNamespace(actor_id=1, _on_error=lambda _, exception: errors.append(exception))
    task = SimpleNamespace(_tracked_actor=SimpleNamespace(actor_id=1, _on_error=None), _on_error=on_error._on_error)
    manager = SimpleNamespace(_failed_actor_ids=set(), _cleanup_actor=lambda tracked_actor: None)
    failed = task if callback == "_actor_task_failed" else on_error
    getattr(RayActorManager, callback)(cast(Any, manager), cast(Any, failed), exception=error)
    return errors[0]


@pytest.mark.parametrize("callback", ["_actor_task_failed", "_actor_start_failed"])
@pytest.mark.parametrize("error", [OutOfMemoryError(LOW), NodeDiedError("gone"), ActorDiedError()])
def test_every_lost_process_is_a_dead_actor_to_tune(callback: str, error: Exception) -> None:
    with every_lost_actor_is_a_dead_one():
        seen = tunes_error(callback, error)
    assert isinstance(seen, RayActorError)
    assert explain(seen).is_transient


def test_tune_by_itself_would_end_the_sweep_and_so_would_another_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.__version__", "2.99.0")
    with every_lost_actor_is_a_dead_one(), pytest.raises(RuntimeError, match="unexpected exception"):
        tunes_error("_actor_task_failed", OutOfMemoryError(LOW))


def test_out_of_memory_keeps_its_words() -> None:
    explained = explain(as_actor_error(OutOfMemoryError(LOW)))
    assert explained.kind == "memory"
    assert explained.sentence.startswith("node 10.0.0.7 ran out of memory (22.7 of 23.5 GB); fewer workers")
    task_error = RayTaskError("f", "Traceback", KeyError("x"), "p", 1, "1.2.3.4")
    assert as_actor_error(task_error) is task_error
