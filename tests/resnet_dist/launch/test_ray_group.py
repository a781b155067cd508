"""What a lost controller, a node that leaves and a stop do to a run on a worker group: no Ray started."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
import ray
from ray.train import FailureConfig as RayFailureConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import placement_group_callback as rays
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from resnet_dist.config.profile import FailureConfig
from resnet_dist.errors import Fault
from resnet_dist.launch import ray_group as module
from resnet_dist.launch.control import RunControl
from resnet_dist.launch.ray_group import CheckedTorchConfig, ControllerLost, Preempted, ray_group
from resnet_dist.launch.ray_internals import make_cleanup_ask_own_cluster
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


class StartingWorkers:
    """A worker group of Ray Train whose workers answer like this before their process group is made."""

    def __init__(self, *answers: str) -> None:
        self._answers = answers
        self.is_shut_down = False

    def execute(self, function: Any, *arguments: Any) -> list[str]:
        return list(self._answers)

    def shutdown(self) -> None:
        self.is_shut_down = True


def start_error(monkeypatch: pytest.MonkeyPatch, control: RunControl, workers: StartingWorkers) -> BaseException:
    """What Ray Train's controller gets if these workers start."""
    methods = {name: SimpleNamespace(remote=getattr(control, name)) for name in ("has_begun", "warn")}
    monkeypatch.setattr(module.ray, "get", lambda answer, timeout: answer)
    config = CheckedTorchConfig(backend="nccl", gpus_per_worker=1, control=SimpleNamespace(**methods))
    with pytest.raises(Exception, match="driver") as raised:
        cast(Any, config.backend_cls)().on_start(workers, config)
    # Ray 2.60 would leave the placement group, and the next group would wait for its resources.
    assert workers.is_shut_down
    return raised.value


def test_a_gpu_that_fails_before_the_first_step_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = "node 10.0.0.2: there is no NVIDIA driver"
    error = start_error(monkeypatch, control := RunControl(), StartingWorkers("", bad, bad))
    assert isinstance(error, Fault)
    assert str(error) == bad
    assert control.poll(0, stop=False).lines == ()
    policy = DefaultFailurePolicy(RayFailureConfig(max_failures=1))
    assert policy.make_decision(ControllerError(error)) == FailureDecision.RAISE


def test_a_gpu_that_fails_when_workers_start_again_counts_as_a_failure_of_a_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    control = RunControl()
    control.progressed(7, {})
    answers = ["", *(f"node 10.0.0.{k}: there is no NVIDIA driver" for k in range(1, 6))]
    error = start_error(monkeypatch, control, StartingWorkers(*answers))
    assert isinstance(error, WorkerGroupError)
    assert str(error.worker_failures[1]) == answers[1]
    (line,) = control.poll(0, stop=False).lines
    assert line == f"warning: workers cannot start: {'; '.join(answers[1:4])}; and 2 more"
    policy = DefaultFailurePolicy(RayFailureConfig(max_failures=1))
    assert [policy.make_decision(error) for _ in range(2)] == [FailureDecision.RETRY, FailureDecision.RAISE]


def test_the_cleanup_of_placement_groups_asks_the_cluster_it_runs_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rays, "PlacementGroupCleaner", rays.PlacementGroupCleaner)  # put back at the end
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:1")
    started: list[type] = []
    monkeypatch.setattr(ray, "remote", lambda **_: lambda actor: started.append(actor) or MagicMock())
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="10.0.0.1:6379"))
    monkeypatch.setattr(ray.runtime_context, "get_runtime_context", lambda: MagicMock())

    trainer = TorchTrainer(lambda: None)
    make_cleanup_ask_own_cluster(trainer)
    (callback,) = [c for c in trainer._create_default_callbacks() if isinstance(c, rays.PlacementGroupCleanerCallback)]
    callback.after_controller_start(SimpleNamespace(run_id="r"))
    (cleaner,) = started
    cleaner(controller_actor_id="a", check_interval_s=1.0, get_actor_timeout_s=1, stop_timeout=None)
    assert os.environ["RAY_ADDRESS"] == "10.0.0.1:6379"
