"""What MLflow gets about a run: events, parameters, tags, metrics that workers left unsent, and its end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from mlflow import MlflowClient

from resnet_dist.code_version import CodeVersion
from resnet_dist.config.loading import flatten, load_recipe
from resnet_dist.config.profile import Profile
from resnet_dist.errors import Fault
from resnet_dist.launch.cluster import ClusterNode, listed
from resnet_dist.launch.control import WorkerStatus
from resnet_dist.launch.lease import held
from resnet_dist.launch.mlflow_description import hardware_summary, node_facts, run_params, run_tags
from resnet_dist.launch.progress import EventLog, count_events
from resnet_dist.launch.record import MlflowRecord
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.tracking.mlflow_run import RunEnd, RunHandle, open_run, recorded_end
from resnet_dist.tracking.tracker import SpoolTracker
from resnet_dist.training.checkpoint import METADATA, CheckpointMetadata, Identity, checkpoint_name, write_checkpoint

ROOT = Path(__file__).parents[3]
RECIPE = load_recipe(ROOT / "resnet_dist" / "recipes" / "digits_resnet20.yaml")


def profile(**changes: object) -> Profile:
    base = {"workers": 2, "cpus_per_worker": 1, "data_root": "/d", "storage": "/s", "tracking_uri": "sqlite:////m.db"}
    return Profile.model_validate(base | changes)


def test_restarts_and_resizes_are_counted_over_all_drivers(tmp_path: Path) -> None:
    drivers = ([(1, 2, 0, 0), (1, 2, 10, 0), (2, 2, 10, None), (2, 2, 12, 8)], [(0, 0, 0, None), (1, 3, 9, 9)])
    for statuses in drivers:
        log = EventLog(FolderStorage(tmp_path))
        log.note("driver began:\n1 node")
        for attempt, world_size, step, resumed_step in statuses:
            log.observe(WorkerStatus(attempt=attempt, world_size=world_size, step=step, resumed_step=resumed_step))
    lines = EventLog(FolderStorage(tmp_path)).read().splitlines()
    assert [line.partition(" ")[2] for line in lines] == [
        "driver began: 1 node",
        "workers up: 2, from step 0",
        "workers up: 2, from step 8 (last seen at step 10)",
        "driver began: 1 node",
        "workers up: 3, from step 9",
    ]
    assert count_events(EventLog(FolderStorage(tmp_path)).read()) == {"restarts": "2", "resizes": "1"}
    assert count_events("") == {"restarts": "0", "resizes": "0"}


def test_parameters_and_tags_hold_recipe_and_profile() -> None:
    identity, nodes = Identity("r", "d"), [ClusterNode("a", 2, 0)]
    params, tags = run_params(RECIPE, profile()), run_tags(profile(), identity, nodes, None)
    assert flatten(RECIPE).items() <= params.items()
    assert params["profile.storage"] == "/s"
    wanted = {f"profile.{key}" for key in flatten(profile())}
    assert wanted == {key for key in {**params, **tags} if key.startswith("profile.")}
    assert tags["recipe_hash"] == "r"
    assert "mlflow.source.git.commit" not in tags
    assert run_tags(profile(), identity, nodes, CodeVersion("c" * 40, True, ""))["git.dirty"] == "true"
    for hardware in ({"workers": 1}, {"cpus_per_worker": 4}, {"gpus_per_worker": 1}):
        # MLflow never changes a parameter, and a run may resume on other hardware.
        assert run_params(RECIPE, profile(**hardware)) == params
        assert run_tags(profile(**hardware), identity, nodes, None) != tags


def test_hardware_in_words() -> None:
    assert hardware_summary([ClusterNode("a", 2, 0)]) == "1 node, 2 CPUs, 0 GPUs"
    assert hardware_summary([ClusterNode("a", 64, 8), ClusterNode("b", 64, 8)]) == "2 nodes, 128 CPUs, 16 GPUs"


def test_nodes_are_described_by_kind() -> None:
    label = {"ray.io/accelerator-type": "H100"}
    large = [ClusterNode(f"10.0.0.{k}", 192, 8, {**label, "ray.io/node-id": str(k)}) for k in range(128)]
    nodes = [ClusterNode("10.0.1.1", 8, 0), *large]
    assert listed(nodes) == "128 x 192 CPUs 8 GPUs (H100), 1 x 8 CPUs 0 GPUs"
    assert listed(nodes[:2]) == "10.0.1.1: 8 CPUs 0 GPUs, 10.0.0.0: 192 CPUs 8 GPUs"
    facts = node_facts(nodes)
    assert list(facts) == ["192 CPUs 8 GPUs (H100)", "8 CPUs 0 GPUs"]
    assert facts["192 CPUs 8 GPUs (H100)"] == {
        "nodes": 128,
        "labels": label,
        "addresses": [node.address for node in large],
    }
    assert node_facts([]) == {}


IDENTITY = Identity("recipe", "data")


@contextmanager
def record(handle: RunHandle, said: list[str]) -> Iterator[MlflowRecord]:
    storage = FolderStorage(handle.run_dir)
    with (
        held(storage, 60.0, said.append) as lease,
        MlflowRecord.open(handle, lease, ("cat", "dog"), said.append) as kept,
    ):
        yield kept


def note(handle: RunHandle, event: str) -> None:
    EventLog(FolderStorage(handle.run_dir)).note(event)


def test_a_dead_ranks_metrics_arrive_with_plots_checkpoints_and_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resnet_dist.tracking.tracker._SERVER_LIMIT_S", 0.1)
    uri, run_dir, said = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "run", list[str]()
    handle = open_run(uri, "exp", "r", run_dir, {}, {})
    dead = SpoolTracker(run_dir, handle.run_id, f"sqlite:///{tmp_path}/away.db")
    dead.metrics({"train/top1_error": 50.0, "train/lr": 0.1}, 10)
    dead.close()
    metadata = CheckpointMetadata(1, 10, IDENTITY, {}, {"val/top1": 50.0}, files={})
    write = partial(write_checkpoint, state={}, metadata=metadata)
    FolderStorage(run_dir).commit(checkpoint_name(1, 10), write, last=METADATA)

    note(handle, "failed: rank 0 was killed")
    with pytest.raises(Fault), record(handle, said):
        raise Fault("rank 0 was killed")

    assert said == []
    client = MlflowClient(uri)
    assert [(p.step, p.value) for p in client.get_metric_history(handle.run_id, "train/lr")] == [(10, 0.1)]
    (artifacts,) = tmp_path.rglob(f"{handle.run_id}/artifacts")
    assert sorted(path.name for path in (artifacts / "plots").iterdir()) == ["learning_curves.png", "learning_rate.png"]
    assert "failed: rank 0 was killed" in (artifacts / "events.log").read_text()
    (entry,) = json.loads((artifacts / "checkpoints.json").read_text())
    assert entry == {
        "name": "epoch=001-step=00000010",
        "step": 10,
        "metrics": {"val/top1": 50.0},
        "path": str(run_dir / "epoch=001-step=00000010"),
    }
    run = client.get_run(handle.run_id)
    assert (run.info.status, run.data.tags["ended"], run.data.tags["restarts"]) == (
        "FAILED",
        "failed: rank 0 was killed",
        "0",
    )


def test_a_run_that_mlflow_does_not_take_costs_one_warning(tmp_path: Path) -> None:
    uri, run_dir, said = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "run", list[str]()
    handle = open_run(uri, "exp", "r", run_dir, {}, {})
    MlflowClient(uri).delete_run(handle.run_id)
    with record(handle, said) as kept:
        note(handle, "stopped after step 10")
        kept.ending.end = RunEnd("KILLED", "stopped after step 10")
    (line,) = said
    assert line.startswith("warning: ")
    assert "was deleted" in line
    assert f"`resnet-dist tracking sync {run_dir} --tracking-uri {uri}`" in line
    assert "stopped after step 10" in EventLog(FolderStorage(run_dir)).read()
    end = recorded_end(run_dir)
    assert end is not None
    assert (end.status, end.reason) == ("KILLED", "stopped after step 10")
