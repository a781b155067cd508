"""What fits into a cluster, and what is waited for: no Ray started."""

from __future__ import annotations

import os
from typing import Any

import pytest

from resnet_dist.config.profile import Profile, Workers
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch import cluster
from resnet_dist.launch.cluster import (
    ClusterNode,
    cluster_of,
    ray_session,
    ray_settings,
    remedy,
    require_capacity,
    worker_capacity,
    worker_environment,
    workers_that_fit,
)

PROFILE = Profile(
    workers=Workers(min=4, max=4), cpus_per_worker=3, data_root="/d", storage="/s", tracking_uri="sqlite:////m.db"
)


def test_a_worker_fits_on_one_node() -> None:
    nodes = [ClusterNode("a", 8, 2), ClusterNode("b", 4, 0), ClusterNode("c", 2, 8)]
    assert workers_that_fit(nodes, 3, 0) == 3
    assert workers_that_fit(nodes, 1, 1) == 4
    assert workers_that_fit([], 1, 0) == 0


@pytest.mark.parametrize(("most", "seconds"), [(4, "0.5"), (250, "0.5"), (1000, "2")])
def test_the_controller_makes_five_hundred_health_checks_a_second_at_most(most: int, seconds: str) -> None:
    profile = PROFILE.model_copy(update={"workers": Workers(min=1, max=most)})
    assert ray_settings(profile, local=False)["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == seconds


def test_capacity_names_what_was_found() -> None:
    require_capacity([ClusterNode("a", 12, 0)], PROFILE)
    with pytest.raises(UserError, match=r"4 workers of 3 CPUs and 0 GPUs, the cluster holds 2 \(a: 8 CPUs 0 GPUs\)"):
        require_capacity([ClusterNode("a", 8, 0)], PROFILE)
    with pytest.raises(UserError, match=r"no nodes"):
        require_capacity([], PROFILE)


def test_the_remedy_says_what_no_node_has() -> None:
    profile = PROFILE.model_copy(update={"gpus_per_worker": 1})
    assert remedy([ClusterNode("a", 2, 0)], profile, {}).startswith("no node has a GPU; ")
    assert remedy([ClusterNode("a", 8, 0), ClusterNode("b", 0, 8)], profile, {}).startswith("no node has both; ")


def test_only_nodes_with_the_labels_count() -> None:
    picky = PROFILE.model_copy(update={"node_labels": {"market": "spot"}})
    require_capacity([ClusterNode("a", 12, 0, {"market": "spot", "zone": "b"})], picky)
    with pytest.raises(UserError, match=r"the cluster holds 0 \(no nodes with market=spot, of 1 in all\)"):
        require_capacity([ClusterNode("a", 12, 0)], picky)


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


def test_a_worker_gets_its_own_environment_only_where_it_needs_one() -> None:
    assert worker_environment(PROFILE) is None
    server = PROFILE.model_copy(update={"tracking_uri": "http://m:5000"})
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" in (worker_environment(server) or {})["env_vars"]
    assert worker_environment(PROFILE.model_copy(update={"env": {"NCCL_DEBUG": "WARN"}})) == {
        "env_vars": {"NCCL_DEBUG": "WARN"}
    }


def test_a_growing_cluster_is_asked_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = PROFILE.model_copy(update={"failure": PROFILE.failure.model_copy(update={"wait_for_nodes_s": 60.0})})
    seen = iter([[], [ClusterNode("a", 4, 0)], [ClusterNode("a", 12, 0)], [ClusterNode("a", 99, 0)]])
    asked: list[list[dict[str, float]]] = []
    monkeypatch.setattr(cluster, "alive_nodes", lambda: next(seen))
    monkeypatch.setattr(cluster, "request_resources", lambda bundles, **_: asked.append(bundles))
    monkeypatch.setattr(cluster.time, "sleep", lambda _: None)
    said: list[str] = []
    with cluster.nodes_requested(profile, cluster.worker_bundles(profile)):
        nodes = cluster.wait_for_nodes(profile, lambda n: worker_capacity(n, profile) >= 4, said.append)
    assert [node.cpus for node in nodes] == [12]
    assert asked == [[{"CPU": 3.0}] * 4, []]
    assert said == ["the cluster has no room yet: waiting up to 60 s for nodes (failure.wait_for_nodes_s)"]


def test_a_cluster_of_fixed_size_is_judged_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "alive_nodes", list)
    with cluster.nodes_requested(PROFILE, cluster.worker_bundles(PROFILE)):
        assert cluster.wait_for_nodes(PROFILE, bool, pytest.fail) == []
