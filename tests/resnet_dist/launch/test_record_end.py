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
from resnet_dist.tracking.mlflow_run import RunHandle, open_run, recorded_end
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

    kept = record(handle, said)
    kept.events.note("failed: rank 0 was killed")
    kept.close("FAILED", "failed: rank 0 was killed")

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
    kept = record(handle, said)
    kept.events.note("stopped after step 10")
    kept.close("KILLED", "stopped after step 10")
    (line,) = said
    assert line.startswith("warning: ")
    assert "was deleted" in line
    assert f"`resnet-dist tracking sync {run_dir} --tracking-uri {uri}`" in line
    assert "stopped after step 10" in EventLog(FolderStorage(run_dir)).read()
    end = recorded_end(run_dir)
    assert end is not None
    assert (end.status, end.reason) == ("KILLED", "stopped after step 10")
