"""What the launcher decides: pure functions, no Ray started."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from resnet_dist.config.profile import FailureConfig, Profile, Workers
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch import cluster
from resnet_dist.launch import control as control_module
from resnet_dist.launch.cluster import (
    Node,
    cluster_of,
    ray_session,
    require_capacity,
    worker_environment,
    workers_that_fit,
    workers_with_room,
)
from resnet_dist.launch.control import RunControl, Status, stop_signals
from resnet_dist.launch.progress import describe
from resnet_dist.launch.publish import RunResult, read_result, write_result
from resnet_dist.launch.ray_internals import Reservation
from resnet_dist.launch.worker import WorkerSetup
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.tracking.connection import server_credentials
from resnet_dist.training.schedule import RunPlan

PROFILE = Profile(
    workers=Workers(min=4, max=4), cpus_per_worker=3, data_root="/d", storage="/s", tracking_uri="sqlite:////m.db"
)


def look(control: RunControl, trainer: int = 0, *, stop: bool = False) -> Status:
    return control.look(trainer, stop=stop)


def test_a_worker_stays_whole_on_one_node() -> None:
    nodes = [Node("a", 8, 2), Node("b", 4, 0), Node("c", 2, 8)]
    assert workers_that_fit(nodes, 3, 0) == 3
    assert workers_that_fit(nodes, 1, 1) == 4
    assert workers_that_fit([], 1, 0) == 0


def test_capacity_names_what_was_found() -> None:
    require_capacity([Node("a", 12, 0)], PROFILE)
    with pytest.raises(UserError, match=r"4 workers of 3 CPUs and 0 GPUs, the cluster holds 2 \(a: 8 CPUs 0 GPUs\)"):
        require_capacity([Node("a", 8, 0)], PROFILE)
    with pytest.raises(UserError, match=r"no nodes"):
        require_capacity([], PROFILE)


def test_only_nodes_with_the_labels_count() -> None:
    picky = PROFILE.model_copy(update={"node_labels": {"market": "spot"}})
    require_capacity([Node("a", 12, 0, {"market": "spot", "zone": "b"})], picky)
    with pytest.raises(UserError, match=r"the cluster holds 0 \(no nodes with market=spot, of 1 in all\)"):
        require_capacity([Node("a", 12, 0)], picky)


def test_the_profile_comes_before_the_environment() -> None:
    assert cluster_of(PROFILE, {}) is None
    assert cluster_of(PROFILE, {"RAY_ADDRESS": "job:1"}) == "job:1"
    assert cluster_of(PROFILE.model_copy(update={"ray_address": "mine:1"}), {"RAY_ADDRESS": "job:1"}) == "mine:1"


def test_a_local_ray_that_does_not_start_is_a_fault_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise Exception("The current node timed out\nduring startup.")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr(os, "environ", {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"})
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    why = r"^Ray did not start on this machine: The current node timed out during startup\. \(its logs: \S+\)$"
    with pytest.raises(Fault, match=why), ray_session(PROFILE):
        pass


def test_status_counts_attempts_and_keeps_the_newest_numbers() -> None:
    control = RunControl()
    control.began(2, Reservation("ab", "train-1"))
    control.progressed(10, {"train/loss": 1.0})
    control.progressed(20, {"val/top1": 90.0})
    control.progressed(21, {"train/loss": 0.9})
    second = Reservation("cd", "train-2")
    control.began(1, second)
    expected = Status(
        attempt=2,
        world_size=1,
        reservation=second,
        step=21,
        resumed_step=None,
        metrics={"train/loss": 0.9, "val/top1": 90.0},
        evaluated_step=20,
        has_workers=True,
    )
    assert look(control) == expected
    control.progressed(15, {})
    assert look(control) == replace(expected, step=15, resumed_step=15)


def test_a_request_to_stop_holds_for_one_trainer() -> None:
    control = RunControl()
    look(control, trainer=1)
    assert not control.asks(0, 1, "10.0.0.1", "node-a")
    look(control, trainer=1, stop=True)
    assert control.asks(0, 1, "10.0.0.1", "node-a")
    look(control, trainer=1)
    assert control.asks(0, 1, "10.0.0.1", "node-a")
    assert not look(control, trainer=2).has_workers
    assert not control.asks(0, 1, "10.0.0.1", "node-a")


def test_workers_stop_when_a_node_of_theirs_is_about_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    leaving: set[str] = set()
    monkeypatch.setattr("resnet_dist.launch.control.leaving_nodes", lambda: leaving)
    monkeypatch.setattr("resnet_dist.launch.control._LOOK_EVERY_S", 0.0)
    control = RunControl()
    assert [control.asks(rank, 3, f"10.0.0.{rank}", f"node-{rank}") for rank in range(3)] == [False] * 3
    leaving.add("node-7")
    assert not control.asks(0, 3, "10.0.0.0", "node-0")  # nobody of this run is there
    leaving.add("node-2")
    assert control.asks(0, 3, "10.0.0.0", "node-0")
    assert look(control).warnings == ("node 10.0.0.2 is about to leave: the workers save and resume without it",)
    look(control, trainer=2)  # the next group, on the nodes that stay
    assert [control.asks(rank, 2, f"10.0.0.{rank}", f"node-{rank}") for rank in range(2)] == [False] * 2


def test_the_line_of_progress() -> None:
    plan = RunPlan(
        steps_per_epoch=11,
        total_steps=22,
        last_step=22,
        eval_every_epochs=1,
        save_every_epochs=1,
        save_every_steps=None,
        log_every_steps=10,
    )
    metrics = {"train/loss": 0.5, "val/top1": 98.125, "speed/images_per_s": 640.4}
    status = Status(attempt=1, world_size=2, step=12, resumed_step=0, metrics=metrics)
    assert describe(status, plan) == "epoch 2/2, loss 0.5000, val top-1 98.12 %, 640 images/s"
    assert describe(Status(), plan) == "epoch 1/2"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_a_wish_the_second_an_order(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    ends: list[tuple[int, str]] = []
    with stop_signals(lambda code, lost: ends.append((code, lost))) as stop:
        assert stop.number is None
        os.kill(os.getpid(), number)
        assert (stop.number, stop.exit_code) == (number, code)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert ends == [(code, "steps since the last checkpoint are trained again")]
    assert signal.getsignal(number) is before


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


def test_a_result_round_trips_and_a_damaged_one_says_how_to_mend_it(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    assert read_result(storage) is None
    result = RunResult("n", str(tmp_path), "r", "t", "m", f"{tmp_path}/epoch=002", 22, {"val/top1": 99.0})
    write_result(storage, result)
    assert read_result(storage) == result
    copy = shutil.copytree(tmp_path, tmp_path / "moved")
    moved = read_result(FolderStorage(copy))
    assert moved is not None
    assert (moved.run_dir, moved.checkpoint) == (str(copy), f"{copy}/epoch=002")
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(Fault, match="delete it and run again"):
        read_result(storage)


def test_a_worker_gets_an_environment_of_its_own_only_where_it_needs_one() -> None:
    assert worker_environment(PROFILE) is None
    server = PROFILE.model_copy(update={"tracking_uri": "http://m:5000"})
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" in (worker_environment(server) or {})["env_vars"]
    assert worker_environment(PROFILE.model_copy(update={"env": {"NCCL_DEBUG": "WARN"}})) == {
        "env_vars": {"NCCL_DEBUG": "WARN"}
    }


def test_what_workers_are_given_shows_no_password_in_the_dashboard() -> None:
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
        save_every_s=None,
        lease=cast(Any, "lease"),
        credentials=credentials,
    )
    assert "pass-" not in str({"setup": setup})


def test_a_growing_cluster_is_asked_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = PROFILE.model_copy(update={"failure": PROFILE.failure.model_copy(update={"wait_for_nodes_s": 60.0})})
    seen = iter([[], [Node("a", 4, 0)], [Node("a", 12, 0)], [Node("a", 99, 0)]])
    asked: list[list[dict[str, float]]] = []
    monkeypatch.setattr(cluster, "alive_nodes", lambda: next(seen))
    monkeypatch.setattr(cluster, "request_resources", lambda bundles, **_: asked.append(bundles))
    monkeypatch.setattr(cluster.time, "sleep", lambda _: None)
    said: list[str] = []
    with cluster.asked_for(profile, cluster.worker_bundles(profile)):
        nodes = cluster.await_nodes(profile, lambda n: workers_with_room(n, profile) >= 4, said.append)
    assert [node.cpus for node in nodes] == [12]
    assert asked == [[{"CPU": 3.0}] * 4, []]
    assert said == ["the cluster has no room yet: waiting up to 60 s for nodes (failure.wait_for_nodes_s)"]


def test_a_cluster_that_stays_as_it_is_is_judged_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "alive_nodes", list)
    with cluster.asked_for(PROFILE, cluster.worker_bundles(PROFILE)):
        assert cluster.await_nodes(PROFILE, bool, pytest.fail) == []


def test_a_mistake_of_a_node_ends_a_run_before_its_first_step_only() -> None:
    control = RunControl()
    assert not look(control).has_workers
    control.began(2, Reservation("a", "b"))
    control.mistake("node b: no data")
    assert (look(control).mistake, look(control).has_workers) == ("node b: no data", True)
    later = RunControl()
    later.began(2, Reservation("a", "b"))
    later.progressed(0, {})
    later.mistake("node c: not mounted yet")
    assert look(later).mistake is None


def test_that_there_are_workers_is_known_again_when_the_actor_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_module, "leaving_nodes", frozenset)
    control = RunControl()
    control.asks(0, 1, "10.0.0.1", "n")
    assert look(control, trainer=0).has_workers
