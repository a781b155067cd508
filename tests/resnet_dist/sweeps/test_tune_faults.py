"""What a sweep makes of Ray's faults: a lost process is a lost trial, what an actor forgot is told again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.air.execution._internal import RayActorManager
from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError

from data_prep.runtime.ray_errors import explain
from resnet_dist.errors import Fault
from resnet_dist.launch.control import StopSignal
from resnet_dist.sweeps import ray_tune, trial
from resnet_dist.sweeps.ray_tune import Conductor, as_actor_error, every_death_of_an_actor
from resnet_dist.sweeps.trial import SweepControl, TrialObserver

LOW = "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: 6) was \
22.70GB used / 23.54GB limit (0.96)"


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
    with every_death_of_an_actor():
        (told,) = failed_by(error)
        at_start: list[Exception] = []
        actor = SimpleNamespace(actor_id=1, _on_error=lambda _, exception: at_start.append(exception))
        manager = SimpleNamespace(_failed_actor_ids=set(), _cleanup_actor=lambda tracked_actor: None)
        RayActorManager._actor_start_failed(cast(Any, manager), tracked_actor=cast(Any, actor), exception=error)
    assert isinstance(told, RayActorError)
    assert isinstance(at_start[0], RayActorError)
    assert explain(told).passes
    with pytest.raises(RuntimeError, match="unexpected exception"):
        failed_by(OutOfMemoryError(LOW))  # Tune by itself, outside


def test_out_of_memory_keeps_its_words() -> None:
    told = explain(as_actor_error(OutOfMemoryError(LOW)))
    assert told.kind == "memory"
    assert told.sentence.startswith("node 10.0.0.7 ran out of memory (22.7 of 23.5 GB); fewer workers")
    task_error = RayTaskError("f", "Traceback", KeyError("x"), "p", 1, "1.2.3.4")
    assert as_actor_error(task_error) is task_error


class Actor:
    """`SweepControl` behind `method.remote(...)`; `forget` is what a restart does."""

    def __init__(self) -> None:
        self.body = SweepControl()

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.body, name))

    def forget(self) -> None:
        self.body = SweepControl()


def test_a_verdict_that_is_lost_with_its_actor_is_told_again_and_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.get", lambda reference, timeout: reference)
    control, judged, said = Actor(), [], []

    def report(trial: str, epoch: float, step: int, metrics: Any) -> str:
        judged.append((trial, step))
        return "stop" if step == 20 else "go on"

    sweep = SimpleNamespace(report=report)
    conductor = Conductor(cast(Any, None), cast(Any, sweep), cast(Any, None), control, StopSignal())

    def say(message: Any) -> None:
        conductor.reported("t0000", message)
        said.append(message["step"])
        if len(said) == 2:
            control.forget()

    monkeypatch.setattr(trial, "say", say)
    observer = TrialObserver(control, "t0000", steps_per_epoch=10)
    observer.evaluated(10, {"val/top1": 1.0})
    assert (observer.verdict, observer.stop_requested()) == ("go on", False)
    observer.evaluated(20, {"val/top1": 1.0})
    assert (observer.verdict, observer.stop_requested()) == ("stop", True)
    assert said == [10, 20, 20]
    assert judged == [("t0000", 10), ("t0000", 20)]


def test_a_driver_that_is_silent_ends_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.get", lambda reference, timeout: reference)
    monkeypatch.setattr(trial, "say", lambda message: None)
    with pytest.raises(Fault, match="has not judged step 10"):
        TrialObserver(Actor(), "t0000", steps_per_epoch=10).evaluated(10, {})


def test_an_actor_that_stays_away_ends_the_sweep_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(reference: Any, timeout: float) -> None:
        raise OutOfMemoryError(LOW)

    monkeypatch.setattr(ray_tune.ray, "get", lost)
    sweep = SimpleNamespace(report=lambda *_: "go on")
    conductor = Conductor(cast(Any, None), cast(Any, sweep), cast(Any, None), Actor(), StopSignal())
    conductor.reported("t0000", {"epoch": 1.0, "step": 10, "metrics": {}})
    assert "node 10.0.0.7 ran out of memory (22.7 of 23.5 GB)" in str(conductor.fatal)
