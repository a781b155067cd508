"""The end of a record: what dead workers left unsent arrives, and a server that is away fails nothing."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlflow import MlflowClient

from resnet_dist.launch.events import EventLog
from resnet_dist.launch.record import Record
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.tracking.mlflow_run import RunHandle, open_run
from resnet_dist.tracking.mlflow_tracker import SpoolTracker
from resnet_dist.training.checkpoint import CARD, Card, Identity, checkpoint_name, save_checkpoint

IDENTITY = Identity("recipe", "data")


def record(handle: RunHandle, said: list[str]) -> Record:
    prepared: Any = SimpleNamespace(
        storage=FolderStorage(handle.run_dir),
        run_dir=handle.run_dir,
        identity=IDENTITY,
        val=SimpleNamespace(class_names=("cat", "dog")),
    )
    return Record(handle, prepared, EventLog(FolderStorage(handle.run_dir)), said.append)


def test_what_a_dead_rank_left_arrives_with_plots_checkpoints_and_events(tmp_path: Path) -> None:
    uri, run_dir, said = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "run", list[str]()
    handle = open_run(uri, "exp", "r", run_dir, {}, {})
    dead = SpoolTracker(run_dir, handle.run_id, f"sqlite:///{tmp_path}/away.db", close_limit_s=0.1)
    dead.metrics({"train/top1_error": 50.0, "train/lr": 0.1}, 10)
    dead.close()
    card = Card(1, 10, IDENTITY, {}, {"val/top1": 50.0}, files={})
    write = partial(save_checkpoint, state={}, card=card)
    FolderStorage(run_dir).commit(checkpoint_name(1, 10), write, last=CARD)

    record(handle, said).end("failed: rank 0 was killed")

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
    assert client.get_run(handle.run_id).data.tags["restarts"] == "0"


def test_a_store_that_is_away_costs_two_warnings(tmp_path: Path) -> None:
    uri, run_dir, said = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "run", list[str]()
    handle = open_run(uri, "exp", "r", run_dir, {}, {})
    away = RunHandle("0" * 32, handle.experiment_id, run_dir, uri)
    SpoolTracker(run_dir, away.run_id, uri, close_limit_s=0.1).close()
    record(away, said).end("finished after step 10")
    assert [line.partition(":")[0] for line in said] == ["warning", "warning"]
    assert "what the workers left unsent waits in storage" in said[0]
    assert "plots, checkpoints and events are not in MLflow" in said[1]
    assert "finished after step 10" in EventLog(FolderStorage(run_dir)).read()
