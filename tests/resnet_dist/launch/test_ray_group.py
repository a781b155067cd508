"""What a lost controller, a node that leaves and a stop do to a run on a worker group: no Ray started."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from resnet_dist.config.profile import FailureConfig
from resnet_dist.errors import Fault
from resnet_dist.launch import ray_group as module
from resnet_dist.launch.ray_group import ControllerLost, Preempted, ray_group
from resnet_dist.training.context import Observer, WorkerResult

LOST, LEFT = ControllerLost("Ray Train's controller died: killed"), Preempted(step=7)
DONE = WorkerResult("finished", step=10)


def run_group(monkeypatch: pytest.MonkeyPatch, *ends: Any, **limits: int) -> tuple[WorkerResult, list[str]]:
    """The result and the events of a run whose Ray trainers end like this, one after another."""
    events, left = list[str](), iter(ends)
    monkeypatch.setattr(module, "RayTrainers", lambda run, observer: SimpleNamespace(run_once=lambda: next(left)))
    for name in ("alive_nodes", "release_request", "wait_for_remaining_capacity"):
        monkeypatch.setattr(module, name, lambda *_: None)
    profile = SimpleNamespace(failure=FailureConfig(**limits))
    run = SimpleNamespace(
        prepared=SimpleNamespace(profile=profile),
        lease=SimpleNamespace(left_request=""),
        events=SimpleNamespace(note=events.append),
        log=events.append,
        starts_on=lambda nodes: None,
    )
    result = ray_group(cast(Any, run), Observer())
    return result, events[::2]


def test_another_ray_trainer_follows_a_lost_controller_and_a_node_that_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_group(monkeypatch, LOST, LEFT, LEFT, DONE) == (
        DONE,
        [
            "Ray Train's controller died: killed; another is started, from the last checkpoint",
            *["a node leaves: the workers saved a checkpoint after step 7 and start elsewhere"] * 2,
        ],
    )


def test_a_run_ends_when_a_budget_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Fault, match=r"nodes left the run 2 times \(failure.max_preemptions\)"):
        run_group(monkeypatch, LEFT, LEFT, DONE, max_preemptions=1)
    with pytest.raises(Fault, match=r"controller died: killed \(2 times; failure.max_controller_failures allows 1\)"):
        run_group(monkeypatch, LOST, LOST, DONE, max_controller_failures=1)
