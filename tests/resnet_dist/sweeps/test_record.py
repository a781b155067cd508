"""A sweep's MLflow run and its trials', on a real store: statuses are true at every end."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from resnet_dist.storage.folder import as_storage
from resnet_dist.sweeps.record import end_sweep, end_trial
from resnet_dist.tracking.mlflow_run import RunHandle, end_run, open_run
from resnet_dist.tracking.sync import sync
from resnet_dist.tracking.tracker import SpoolTracker


@pytest.fixture
def uri(tmp_path: Path) -> str:
    (tmp_path / "store").mkdir()
    return f"sqlite:///{tmp_path}/store/mlflow.db"


def open_sweep(uri: str, folder: Path) -> RunHandle:
    return open_run(uri, "exp", "lr-sweep", folder / "sweep", {}, {})


def open_trial(sweep: RunHandle, number: int) -> RunHandle:
    name = f"{number:03d}"
    return open_run(sweep.tracking_uri, "exp", name, sweep.run_dir / name, {}, {}, parent_run_id=sweep.run_id)


def test_every_trial_ends_with_its_true_status_and_a_sweep_that_resumes_continues_its_run(
    uri: str, tmp_path: Path, monkeypatch
) -> None:
    client = MlflowClient(uri)
    sweep = open_sweep(uri, tmp_path)
    finished, stopped, orphan = (open_trial(sweep, number) for number in range(3))
    never_opened = as_storage(sweep.run_dir / "003")
    assert end_run(finished, "FINISHED", "finished")
    # The second trial's process was killed; what its rank 0 had in the spool still arrives.
    monkeypatch.setattr("resnet_dist.tracking.tracker._SERVER_LIMIT_S", 0.1)
    left = SpoolTracker(stopped.run_dir, stopped.run_id, f"sqlite:///{tmp_path}/away.db")
    left.metrics({"val/top1": 31.5}, 40)
    left.close()
    end_trial(stopped.storage, uri, "FINISHED", "stopped early at rung 1")
    end_sweep(sweep, [stopped.storage, finished.storage, orphan.storage, never_opened], "FINISHED")

    found = {run.info.run_name: run for run in client.search_runs([sweep.experiment_id])}
    ends = {name: (run.info.status, run.data.tags.get("ended")) for name, run in found.items()}
    assert ends == {
        "lr-sweep": ("FINISHED", None),
        "000": ("FINISHED", "finished"),
        "001": ("FINISHED", "stopped early at rung 1"),
        "002": ("KILLED", "orphaned"),
    }
    assert {run.data.tags.get("mlflow.parentRunId") for run in found.values()} == {None, sweep.run_id}
    assert [(p.step, p.value) for p in client.get_metric_history(stopped.run_id, "val/top1")] == [(40, 31.5)]

    assert open_sweep(uri, tmp_path) == sweep
    assert open_trial(sweep, 2) == orphan
    for handle in (sweep, orphan):
        run = client.get_run(handle.run_id)
        assert (run.info.status, "ended" in run.data.tags) == ("RUNNING", False)


def test_the_end_of_a_sweep_waits_for_a_store_that_is_away(uri: str, tmp_path: Path) -> None:
    sweep = open_sweep(uri, tmp_path)
    trial = open_trial(sweep, 0)
    store = tmp_path / "store"
    store.rename(tmp_path / "gone")
    (tmp_path / "store").write_text("in the way")
    end_sweep(sweep, [trial.storage], "FAILED", "no disk")
    (tmp_path / "store").unlink()
    (tmp_path / "gone").rename(store)
    for folder in (trial.run_dir, sweep.run_dir):
        assert sync(folder, uri).end_status_sent
    runs = MlflowClient(uri).search_runs([sweep.experiment_id])
    assert {run.info.status for run in runs} == {"FAILED", "KILLED"}
