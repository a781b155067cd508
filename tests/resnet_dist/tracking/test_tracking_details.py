"""What is logged around the numbers: descriptions, data sets, files, plots, system metrics, and what is read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from resnet_dist.errors import UserError
from resnet_dist.tracking.datasets import DataInput
from resnet_dist.tracking.experiment import Difference, RunRow, differences, find_run, list_runs
from resnet_dist.tracking.mlflow_run import end_run, log_details, log_folder, open_run, set_tags
from resnet_dist.tracking.models import log_classifier, log_model_metrics
from resnet_dist.tracking.plots import draw_plots
from resnet_dist.tracking.spool import History, read_history
from resnet_dist.tracking.sync import sync
from resnet_dist.tracking.system_metrics import NodeMonitor
from resnet_dist.tracking.tracker import CONFUSION, SpoolTracker, Tracker

VAL = DataInput("digits/val", "cd" * 32, "validation", "/data/val.beton", {"num_samples": 355})


def test_details_are_logged_once_and_without_passwords(sqlite_uri, tmp_path):
    handle = open_run(sqlite_uri, "exp", "r", tmp_path / "run", {}, {})
    inputs = [DataInput("digits/train", "ab" * 16, "training", "/data/train.beton"), VAL]
    texts = {"config/profile.yaml": "tracking_uri: http://me:geheim@host:5000\n"}
    for description in ("first", "second"):
        log_details(handle, description=description, texts=texts, inputs=inputs)
    client = MlflowClient(sqlite_uri)
    run = client.get_run(handle.run_id)
    assert run.data.tags["mlflow.note.content"] == "first"  # somebody may have edited it
    found = [(i.dataset.name, i.dataset.digest, i.tags[0].value) for i in run.inputs.dataset_inputs]
    assert sorted(found) == [("digits/train", "ab" * 16, "training"), ("digits/val", "cd" * 18, "validation")]
    assert json.loads(run.inputs.dataset_inputs[1].dataset.profile) == {"num_samples": 355}
    (stored,) = tmp_path.rglob("profile.yaml")
    assert stored.read_text() == "tracking_uri: http://***@host:5000\n"
    set_tags(handle, {"restarts": "2"})
    assert client.get_run(handle.run_id).data.tags["restarts"] == "2"


def test_a_folder_becomes_artifacts_through_a_real_server(server, tmp_path):
    handle = open_run(server.uri, "exp", "r", tmp_path / "run", {}, {})
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "a.png").write_bytes(b"x" * 5000)
    log_folder(handle, tmp_path / "plots", "plots")
    log_details(handle, description="d", texts={"events.log": "one\n"}, inputs=[VAL])
    client = MlflowClient(server.uri)
    assert [(f.path, f.file_size) for f in client.list_artifacts(handle.run_id, "plots")] == [("plots/a.png", 5000)]
    assert [f.path for f in client.list_artifacts(handle.run_id)] == ["events.log", "plots"]
    assert client.get_run(handle.run_id).inputs.dataset_inputs[0].dataset.name == "digits/val"


def logged_run(uri: str, run_dir: Path, name: str = "r", **params: str):
    """A run with some points in its spool and at the server."""
    handle = open_run(uri, "exp", name, run_dir, {"workers": "2"}, params)
    tracker = SpoolTracker(run_dir, handle.run_id, uri)
    for step in (10, 20):
        tracker.metrics({"train/top1_error": 100.0 - step, "train/lr": 0.1, "speed/images_per_s": 50.0}, step)
    tracker.metrics({"val/top1": 70.0, "val/top1_error": 30.0, "val/top5_error": float("nan")}, 20)
    tracker.text(CONFUSION, json.dumps({"num_classes": 2, "counts": [[0, 0, 3], [1, 0, 1], [1, 1, 4]]}))
    assert tracker.flush(60)
    tracker.close()
    return handle


def test_history_is_what_the_spool_holds(sqlite_uri, tmp_path):
    handle = logged_run(sqlite_uri, tmp_path / "run")
    history = read_history(tmp_path / "run", handle.run_id)
    assert history.points["train/top1_error"] == [(10, 90.0), (20, 80.0)]
    assert history.points["val/top1"] == [(20, 70.0)]
    assert json.loads(history.texts[CONFUSION])["num_classes"] == 2
    (point,) = MlflowClient(sqlite_uri).get_metric_history(handle.run_id, "val/top1")
    assert history.times_ms["val/top1", 20] == point.timestamp
    assert read_history(tmp_path / "elsewhere", handle.run_id) == History()


def test_plots_of_what_there_is(sqlite_uri, tmp_path):
    handle = logged_run(sqlite_uri, tmp_path / "run")
    history = read_history(tmp_path / "run", handle.run_id)
    drawn = draw_plots(history, ("cat", "dog"), tmp_path / "plots")
    names = ["learning_curves.png", "learning_rate.png", "throughput.png", "confusion.png"]
    assert [path.name for path in drawn] == names
    for path in drawn:
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("L")).std() > 5  # not an empty sheet
    assert draw_plots(History(), (), tmp_path / "none") == []
    counts = [[k, k, 1] for k in range(200)]
    many = History(texts={CONFUSION: json.dumps({"num_classes": 200, "counts": counts})})
    assert len(draw_plots(many, [str(k) for k in range(200)], tmp_path / "many")) == 1


def test_a_models_metrics_are_the_runs_points(sqlite_uri, tmp_path, stored_rows):
    import torch

    class Zero(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().mean((1, 2))

    handle = logged_run(sqlite_uri, tmp_path / "run")
    database = Path(sqlite_uri.removeprefix("sqlite:///"))
    before = stored_rows(database, handle.run_id)
    example = np.zeros((2, 8, 8, 3), np.uint8)
    given = {"name": "m", "input_example": example, "resize": 8, "class_names": "abc", "pictures": {}}
    uri = log_classifier(handle, Zero(), **given, metadata={}, step=20)
    history = read_history(tmp_path / "run", handle.run_id)
    for _ in range(2):
        log_model_metrics(handle, uri, ["val/top1", "val/unknown"], 20, history, VAL)
    assert stored_rows(database, handle.run_id) == before
    model = MlflowClient(sqlite_uri).get_logged_model(uri.removeprefix("models:/"))
    assert [(m.key, m.value, m.step, m.dataset_name) for m in model.metrics] == [("val/top1", 70.0, 20, "digits/val")]


class Kept(Tracker):
    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.points.append((step, dict(values)))


def test_a_node_is_measured_now_and_then():
    now, tracker = [0.0], Kept()
    monitor = NodeMonitor(tracker, 3, every_s=10.0, clock=lambda: now[0])
    for step, now[0] in enumerate((0.5, 2.0, 5.0, 11.9, 12.0, 30.0)):
        monitor.observe(step)
    assert [step for step, _ in tracker.points] == [1, 4, 5]
    for _, values in tracker.points:
        assert all(key.startswith("system/node-3/") for key in values)
        assert 0.0 < values["system/node-3/system_memory_usage_percentage"] <= 100.0
        assert 0.0 <= values["system/node-3/cpu_utilization_percentage"] <= 100.0
        assert min(values.values()) >= 0.0


def test_another_nodes_spool_arrives_by_itself_and_by_sync(sqlite_uri, tmp_path, stored_rows):
    run_dir = tmp_path / "run"
    handle = logged_run(sqlite_uri, run_dir)
    database = Path(sqlite_uri.removeprefix("sqlite:///"))
    num_before = len(stored_rows(database, handle.run_id))
    away = SpoolTracker(run_dir, handle.run_id, f"sqlite:///{tmp_path}/not-here.db", writer="node-1", close_limit_s=0.1)
    away.metrics({"system/node-1/cpu_utilization_percentage": 7.0}, 20)
    away.close()
    assert len(stored_rows(database, handle.run_id)) == num_before
    report = sync(run_dir, sqlite_uri)
    assert (report.num_points, report.num_rejected) == (1, 0)
    rows = stored_rows(database, handle.run_id)
    assert len(rows) == num_before + 1
    assert [row[3] for row in rows if row[0].startswith("system/")] == [7.0]
    assert sync(run_dir, sqlite_uri).num_points == 0


def test_runs_are_listed_and_compared(sqlite_uri, tmp_path):
    for name, lr in (("a", "0.1"), ("b", "0.2")):
        end_run(logged_run(sqlite_uri, tmp_path / name, name, **{"optim.lr": lr, "seed": "0"}), "FINISHED")
    rows = list_runs(sqlite_uri, "exp")
    assert [(row.name, row.status, row.metrics["val/top1"]) for row in rows] == [
        ("b", "FINISHED", 70.0),
        ("a", "FINISHED", 70.0),
    ]
    assert find_run(rows, "a").name == "a"
    assert find_run(rows, rows[0].run_id[:10]).name == "b"
    found = differences(find_run(rows, "a"), find_run(rows, "b"))
    assert found[0] == Difference("optim.lr", "0.1", "0.2")
    assert Difference("val/top1", "70", "70") in found
    assert [pair.key for pair in found if pair.key == "seed"] == []
    with pytest.raises(UserError, match="no run of this name"):
        find_run(rows, "no id begins so")
    twins = [RunRow("x", str(k), "e", "FINISHED", 0, 1.0, {}, {}, {}) for k in range(2)]
    with pytest.raises(UserError, match="2 runs"):
        find_run(twins, "x")
    with pytest.raises(UserError, match="no such experiment; there are Default, exp"):
        list_runs(sqlite_uri, "nope")
    with pytest.raises(UserError, match="no MLflow database"):
        list_runs(f"sqlite:///{tmp_path}/none.db")
