"""Signals, the actor between driver and workers, and the workers' settings: no Ray started."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any, cast

import pytest

from resnet_dist.config.profile import FailureConfig
from resnet_dist.launch import control as control_module
from resnet_dist.launch.control import RunControl, WorkerStatus, ask_every_s
from resnet_dist.launch.ray_internals import Reservation
from resnet_dist.launch.worker import WorkerSetup
from resnet_dist.tracking.connection import server_credentials


def poll(control: RunControl, ray_trainer: int = 0, *, stop: bool = False, **seen: Any) -> WorkerStatus:
    return control.poll(ray_trainer, stop=stop, **seen)


def test_status_counts_attempts_and_keeps_the_newest_numbers() -> None:
    control = RunControl()
    control.workers_started(2, Reservation("ab", "train-1"))
    control.progressed(10, {"train/loss": 1.0})
    control.evaluated(20, {"val/top1": 90.0})
    control.progressed(21, {"train/loss": 0.9})
    second = Reservation("cd", "train-2")
    control.workers_started(1, second)
    expected = WorkerStatus(
        attempt=2,
        world_size=1,
        reservation=second,
        step=21,
        resumed_step=None,
        metrics={"train/loss": 0.9, "val/top1": 90.0},
        evaluations=((20, {"val/top1": 90.0}),),
        has_workers=True,
    )
    assert poll(control) == expected
    control.progressed(15, {})
    assert poll(control) == replace(expected, step=15, resumed_step=15)


def test_no_evaluation_is_lost_between_two_polls() -> None:
    """Nor with an answer that does not arrive: only what the driver has seen is forgotten."""
    control = RunControl()
    for step in (10, 20, 30):
        control.evaluated(step, {"val/top1": step})
    for _ in range(2):
        assert poll(control).evaluations == tuple((step, {"val/top1": step}) for step in (10, 20, 30))
    control.evaluated(40, {"val/top1": 40})
    assert [step for step, _ in poll(control, evaluated_step=30).evaluations] == [40]
    assert poll(control, evaluated_step=40).evaluations == ()


def test_a_line_is_reported_until_the_driver_has_seen_it_and_then_forgotten() -> None:
    control = RunControl()
    assert poll(control).lines == ()
    control.warn("a")
    seen = poll(control).lines
    control.warn("b")
    assert poll(control, seen=()).lines == ("warning: a", "warning: b")  # an answer that did not arrive
    assert poll(control, seen=seen).lines == ("warning: b",)
    assert poll(control, seen=seen).lines == ("warning: b",)
    assert poll(control, seen=("warning: b",)).lines == ()
    restarted = RunControl()
    restarted.warn("c")
    assert poll(restarted, seen=("warning: b",)).lines == ("warning: c",)


def test_a_thousand_slow_workers_are_one_line() -> None:
    control = RunControl()
    for rank in range(8):
        control.should_stop(rank, f"10.0.0.{rank}", f"node-{rank}")
    control.report_stragglers({3: 2.04}, all_have_curves=True)
    control.report_stragglers({rank: 2.0 + rank / 1000 for rank in range(1000)}, all_have_curves=False)
    one, many = poll(control).lines
    assert one == (
        "warning: slower than the other workers for a while: rank 3 on node 10.0.0.3 (2.0 times as slow); "
        "see worker/3/step_s, data_wait_s and all_reduce_wait_s in MLflow"
    )
    assert "rank 999 on node unknown (3.0 times as slow)" in many
    assert many.endswith(" and 996 more; see workers/slowest/* and workers/step_s/* in MLflow")


def test_a_warning_of_a_thousand_workers_is_two_lines_and_one_of_a_single_worker_one() -> None:
    control = RunControl()
    for _ in range(2):
        control.warn_of_rank(5, "no CUDA graphs")
    assert poll(control).lines == ("warning: rank 5: no CUDA graphs",)
    for rank in range(1000):
        control.warn_of_rank(rank, "no CUDA graphs")
    for number in range(1000):
        control.warn_of_rank(7, f"error {number}")
    first, second, *others = poll(control).lines
    assert (first, second) == (
        "warning: rank 5: no CUDA graphs",
        "warning: rank 0 too, and maybe more: no CUDA graphs",
    )
    assert others == [f"warning: rank 7: error {number}" for number in range(15)]
    control.workers_started(2, Reservation("a", "b"))
    control.warn_of_rank(5, "no CUDA graphs")
    assert poll(control).lines[-1] == "warning: rank 5: no CUDA graphs"


@pytest.mark.parametrize("world_size", [1, 3, 100, 101, 1024, 10_000])
def test_the_actor_is_asked_every_second_and_a_hundred_times_a_second_at_most(world_size: int) -> None:
    every_s = ask_every_s(world_size)
    assert every_s >= 1.0
    assert every_s / world_size <= 1.0  # from one worker's call to the next one's
    assert world_size / every_s <= 100.0


def test_a_request_to_stop_holds_for_one_ray_trainer() -> None:
    control = RunControl()
    poll(control, ray_trainer=1)
    assert not control.should_stop(0, "10.0.0.1", "node-a")
    poll(control, ray_trainer=1, stop=True)
    assert control.should_stop(0, "10.0.0.1", "node-a")
    poll(control, ray_trainer=1)
    assert control.should_stop(0, "10.0.0.1", "node-a")
    assert not poll(control, ray_trainer=2).has_workers
    assert not control.should_stop(0, "10.0.0.1", "node-a")


def test_workers_stop_when_a_node_of_theirs_is_about_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    leaving: set[str] = set()
    monkeypatch.setattr("resnet_dist.launch.control.leaving_nodes", lambda: leaving)
    monkeypatch.setattr("resnet_dist.launch.control._LOOK_EVERY_S", 0.0)
    control = RunControl()
    assert [control.should_stop(rank, f"10.0.0.{rank}", f"node-{rank}") for rank in range(3)] == [False] * 3
    leaving.add("node-7")
    assert not control.should_stop(0, "10.0.0.0", "node-0")  # no worker of this run is on it
    leaving.add("node-2")
    assert control.should_stop(0, "10.0.0.0", "node-0")
    assert poll(control).lines == ("warning: node 10.0.0.2 is about to leave: the workers save and resume without it",)
    poll(control, ray_trainer=2)  # the next group, on the nodes that stay
    assert [control.should_stop(rank, f"10.0.0.{rank}", f"node-{rank}") for rank in range(2)] == [False] * 2


def test_the_second_signal_says_so_and_ends_a_process_that_does_not_end() -> None:
    program = """
import signal, threading
from data_prep.runtime.stop import end_at_once
def second(*_):
    end_at_once(130, "steps since the last checkpoint are trained again", limit_s=0.1)
    raise KeyboardInterrupt
signal.signal(signal.SIGINT, second)
try:
    signal.raise_signal(signal.SIGINT)
finally:
    threading.Event().wait()  # a clean-up that hangs
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stderr.strip().startswith(
        "stopping at once: steps since the last checkpoint are trained again; the same"
    )


def test_a_mistake_of_a_node_ends_a_run_before_its_first_step_only() -> None:
    control = RunControl()
    assert not poll(control).has_workers
    control.workers_started(2, Reservation("a", "b"))
    control.report_mistake("node b: no data")
    assert (poll(control).mistake, poll(control).has_workers) == ("node b: no data", True)
    later = RunControl()
    later.workers_started(2, Reservation("a", "b"))
    later.progressed(0, {})
    later.report_mistake("node c: not mounted yet")
    assert poll(later).mistake is None
    assert later.has_begun()


def test_that_there_are_workers_is_known_again_when_the_actor_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_module, "leaving_nodes", frozenset)
    control = RunControl()
    control.should_stop(0, "10.0.0.1", "n")
    assert poll(control, ray_trainer=0).has_workers


def test_the_dashboard_shows_no_password_of_the_workers() -> None:
    """Ray's dashboard shows `str` of the training configuration."""
    environment = {"MLFLOW_TRACKING_USERNAME": "ann", "MLFLOW_TRACKING_PASSWORD": "pass-1", "HOME": "/root"}
    credentials = server_credentials(environment)
    assert credentials == {"MLFLOW_TRACKING_USERNAME": "ann", "MLFLOW_TRACKING_PASSWORD": "pass-1"}
    setup = WorkerSetup(
        job=cast(Any, "job"),
        storage=cast(Any, "storage"),
        run_id="r",
        tracking_uri="http://ann:pass-2@mlflow:5000",
        control=None,
        failure=FailureConfig(),
        lease=cast(Any, "lease"),
        credentials=credentials,
    )
    assert "pass-" not in str({"setup": setup})
