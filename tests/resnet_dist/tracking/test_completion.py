"""A training ends while MLflow is unreachable or refuses: it does not count as failed, and any command completes it."""

from __future__ import annotations

import json
import sqlite3
from functools import partial
from pathlib import Path

import pytest
from mlflow import MlflowClient

from resnet_dist.bench.mlflow_server import MlflowServer
from resnet_dist.config.loading import load_recipe
from resnet_dist.config.recipe import recipe_hash
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.lease import held
from resnet_dist.launch.publish import FinishedTraining, read_result, read_trained, sync_run, write_trained
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.tracking.connection import sqlite_file
from resnet_dist.tracking.datasets import DataInput
from resnet_dist.tracking.mlflow_run import RunHandle, open_run, record_end, recorded_end
from resnet_dist.tracking.spool import spool_folder
from resnet_dist.tracking.tracker import Spool, SpoolTracker
from resnet_dist.training.checkpoint import METADATA, CheckpointMetadata, Identity, checkpoint_name, write_checkpoint
from resnet_dist.training.model import build_classifier

pytestmark = pytest.mark.system

RECIPE = load_recipe(
    Path(__file__).parents[3] / "resnet_dist/recipes/digits_resnet20.yaml", ["model.name=resnet8", "data.dataset=tiny"]
)
NAMES = tuple("0123456789")


def trained_run(uri: str, storage: FolderStorage, *, early: str = "") -> tuple[FinishedTraining, RunHandle]:
    """As a training leaves it whose MLflow went away: spool, checkpoint, what it reached."""
    handle = open_run(uri, "exp", "demo", storage.folder, {}, {})
    spool = Spool(spool_folder(storage.folder, handle.run_id))
    spool.metrics({"train/loss": 0.5, "val/top1": 75.0}, 10)
    spool.close()
    identity = Identity(recipe_hash(RECIPE), "data", NAMES)
    state = {"net": build_classifier(RECIPE).net.state_dict()}
    metadata = CheckpointMetadata(1, 10, identity, RECIPE.model_dump(mode="json"), {"val/top1": 75.0}, files={})
    storage.commit(checkpoint_name(1, 10), partial(write_checkpoint, state=state, metadata=metadata), last=METADATA)
    data = DataInput("tiny/val", "0" * 32, "validation", "/data/tiny/val.beton")
    trained = FinishedTraining(
        name="demo",
        step=10,
        metrics={"val/top1": 75.0},
        recipe=RECIPE,
        identity=identity,
        validation=data,
        validation_digest="xxh3:" + "0" * 32,
        register_models=True,
        pictures={},
        early=early,
    )
    write_trained(storage, trained)
    return trained, handle


def require_complete(uri: str, handle: RunHandle, storage: FolderStorage, *, early: str = "") -> None:
    client = MlflowClient(uri)
    run = client.get_run(handle.run_id)
    ended = f"finished early: {early}" if early else "finished"
    assert (run.info.status, run.data.tags["ended"], run.data.metrics["val/top1"]) == ("FINISHED", ended, 75.0)
    version = client.get_model_version_by_alias("tiny-resnet8", "champion")
    assert (version.run_id, int(version.version)) == (handle.run_id, 1)
    assert len(client.search_model_versions("name = 'tiny-resnet8'")) == 1
    result = read_result(storage)
    assert result is not None
    assert (result.step, result.metrics, result.name, result.reason) == (10, {"val/top1": 75.0}, "demo", early)


def test_a_trained_model_is_restored_as_written(tmp_path: Path, sqlite_uri: str) -> None:
    storage = FolderStorage(tmp_path / "run")
    trained, _ = trained_run(sqlite_uri, storage)
    assert read_trained(storage) == trained
    for content in ("{}", "[1]", "x", "[" * 100_000, json.dumps({"name": 3, "step": 1e999, "metrics": 5})):
        (storage.folder / "trained.json").write_text(content)
        assert read_trained(storage) is None


def test_a_server_that_is_away_at_the_end(server: MlflowServer, tmp_path: Path) -> None:
    storage, logged = FolderStorage(tmp_path / "run"), list[str]()
    _, handle = trained_run(server.uri, storage)
    server.kill()
    with pytest.raises(Fault) as caught:
        sync_run(storage, server.uri, logged.append)
    words = str(caught.value)
    assert words.startswith("training finished after step 10 at 75.00 % top-1")
    assert words.count("does not respond") == 1
    assert (
        f"`resnet-dist tracking sync {storage.location} --tracking-uri {server.uri}`, or by the same command" in words
    )
    assert logged == []
    end = recorded_end(storage.folder)
    assert end is not None
    assert end.status == "FINISHED"
    server.start()
    words = sync_run(storage, server.uri, logged.append)
    assert words.startswith("training finished after step 10 at 75.00 % top-1: run ")
    assert "marked FINISHED" in words
    require_complete(server.uri, handle, storage)
    assert sync_run(storage, server.uri, logged.append) == "no point was waiting; run was marked FINISHED"


def test_a_registry_that_refuses(tmp_path: Path, sqlite_uri: str) -> None:
    """The model of a run that finished early."""
    storage, logged, early = FolderStorage(tmp_path / "run"), list[str](), "val/loss was best at step 5"
    _, handle = trained_run(sqlite_uri, storage, early=early)
    with sqlite3.connect(sqlite_file(sqlite_uri)) as database:
        database.execute(
            "create trigger t before insert on model_versions begin select raise(abort, 'the registry is full'); end"
        )
    for _ in range(2):
        with pytest.raises(
            Fault,
            match=r"finished after step 10 \(val/loss was best at step 5\) at 75.00 % top-1.*Version creation error",
        ):
            sync_run(storage, sqlite_uri, logged.append)
    run = MlflowClient(sqlite_uri).get_run(handle.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["ended"].startswith("finished; its model is not in MLflow yet: MLflow at ")
    with sqlite3.connect(sqlite_file(sqlite_uri)) as database:
        database.execute("drop trigger t")
    with held(storage, 3, logged.append), pytest.raises(UserError, match="another driver is working on this run"):
        sync_run(storage, sqlite_uri, logged.append)
    sync_run(storage, sqlite_uri, logged.append)
    require_complete(sqlite_uri, handle, storage, early=early)
    assert MlflowClient(sqlite_uri).get_run(handle.run_id).info.end_time == run.info.end_time


def test_sync_reports_a_runs_state(tmp_path: Path, sqlite_uri: str) -> None:
    storage, logged = FolderStorage(tmp_path / "run"), list[str]()
    handle = open_run(sqlite_uri, "exp", "demo", storage.folder, {}, {})
    tracker = SpoolTracker(storage, handle.run_id, f"sqlite:///{tmp_path}/away.db")
    tracker.metrics({"train/loss": 0.5}, 1)
    tracker.close()
    with held(storage, 5, logged.append):
        assert "sent 1 points; run in progress (pid " in sync_run(storage, sqlite_uri, logged.append)
    assert sync_run(storage, sqlite_uri, logged.append).startswith("no point was waiting; the run has not ended")
    record_end(handle, "FAILED", "failed: a node was lost")
    assert sync_run(storage, sqlite_uri, logged.append) == (
        "no point was waiting; run marked FAILED (failed: a node was lost)"
    )
    assert MlflowClient(sqlite_uri).get_run(handle.run_id).info.status == "FAILED"
    assert logged[0].startswith("reading 0.0 MB of metrics")


def test_a_run_file_of_any_content_is_named(tmp_path: Path, sqlite_uri: str) -> None:
    storage = FolderStorage(tmp_path / "run")
    handle = open_run(sqlite_uri, "exp", "demo", storage.folder, {}, {})
    record = {"run_key": "k", "run_id": handle.run_id, "experiment_id": "1"}
    for damaged in (
        record | {"end": 5}, record | {"end": {}}, record | {"run_id": 5}, record | {"run_id": "../x"}, [], "x", None,
        record | {"end": {"status": "DONE", "time_ms": 1, "reason": "", "sent": False}}, {"run_key": "k"},
        record | {"end": {"status": "FAILED", "time_ms": 1e9, "reason": "", "sent": False}},
    ):  # fmt: skip
        (storage.folder / "mlflow_run.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=r"mlflow_run\.json"):
            sync_run(storage, sqlite_uri, print)
