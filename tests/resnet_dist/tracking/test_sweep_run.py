"""A sweep's parent run and its trials, on a real store: statuses are true at every end."""

from __future__ import annotations

from mlflow import MlflowClient

from resnet_dist.tracking.mlflow_run import end_run, log_folder, open_run
from resnet_dist.tracking.sync import end_sweep, end_trial, open_sweep, sync
from resnet_dist.tracking.tracker import SpoolTracker


def begin(uri, folder):
    return open_sweep(
        uri, "exp", "lr-sweep", folder, description="**eight** trials", tags={"space": "lr"}, params={"trials": "8"},
        texts={"space.yaml": "optim.lr: loguniform\n"},
    )  # fmt: skip


def begin_trial(uri, sweep, number):
    name = f"{number:03d}"
    return open_run(uri, "exp", name, sweep.run_dir / name, {}, {}, parent_run_id=sweep.run_id)


def test_every_trial_ends_with_its_true_status(sqlite_uri, tmp_path):
    client = MlflowClient(sqlite_uri)
    sweep = begin(sqlite_uri, tmp_path / "sweep")
    finished, stopped, orphan = (begin_trial(sqlite_uri, sweep, number) for number in range(3))
    never_opened = sweep.run_dir / "003"
    never_opened.mkdir()
    assert end_run(finished, "FINISHED", "finished")
    # Tune killed the second trial's driver; what its rank 0 had in the spool still arrives.
    left = SpoolTracker(stopped.run_dir, stopped.run_id, f"sqlite:///{tmp_path}/away.db")
    left.metrics({"val/top1": 31.5}, 40)
    left.close()
    assert end_trial(stopped.run_dir, sqlite_uri, "FINISHED", "stopped early at rung 1")
    assert end_trial(never_opened, sqlite_uri, "KILLED", "never began")
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "parallel.html").write_text("<p>")
    log_folder(sweep, tmp_path / "plots", "plots")
    assert end_sweep(sweep, [stopped.run_dir, finished.run_dir, orphan.run_dir, never_opened], "FINISHED")

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
    assert (found["lr-sweep"].data.tags["kind"], found["lr-sweep"].data.params) == ("sweep", {"trials": "8"})
    assert {item.path for item in client.list_artifacts(sweep.run_id)} == {"plots", "space.yaml"}


def test_a_sweep_that_is_started_again_continues_its_run(sqlite_uri, tmp_path):
    first = begin(sqlite_uri, tmp_path / "sweep")
    trial = begin_trial(sqlite_uri, first, 0)
    assert end_sweep(first, [trial.run_dir], "KILLED", "Ctrl-C")
    again = begin(sqlite_uri, tmp_path / "sweep")
    assert again == first
    assert begin_trial(sqlite_uri, again, 0) == trial
    runs = MlflowClient(sqlite_uri).search_runs([first.experiment_id])
    assert [run.info.status for run in runs] == ["RUNNING", "RUNNING"]
    assert all("ended" not in run.data.tags for run in runs)


def test_the_end_of_a_sweep_waits_for_a_store_that_is_away(sqlite_uri, tmp_path):
    sweep = begin(sqlite_uri, tmp_path / "sweep")
    trial = begin_trial(sqlite_uri, sweep, 0)
    store = tmp_path / "store"
    store.rename(tmp_path / "gone")
    (tmp_path / "store").write_text("in the way")
    assert not end_sweep(sweep, [trial.run_dir], "FAILED", "no disk")
    (tmp_path / "store").unlink()
    (tmp_path / "gone").rename(store)
    for folder in (trial.run_dir, sweep.run_dir):
        assert sync(folder, sqlite_uri).end_status_sent
    runs = MlflowClient(sqlite_uri).search_runs([sweep.experiment_id])
    assert {run.info.status for run in runs} == {"FAILED", "KILLED"}
