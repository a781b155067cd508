"""The MLflow run of a job: one for its lifetime, whichever process is killed; its end waits until the server has it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from resnet_dist.errors import Fault, UserError
from resnet_dist.tracking import mlflow_run
from resnet_dist.tracking.datasets import DataInput
from resnet_dist.tracking.mlflow_run import (
    RunEnd,
    end_run,
    log_details,
    log_folder,
    open_run,
    recorded_end,
    run_file,
    send_end_status,
    set_tags,
)

VAL = DataInput("digits/val", "cd" * 32, "validation", "/data/val.beton", {"num_samples": 355})


def begin(uri: str, run_dir: Path, **changes):
    arguments = {"experiment": "exp", "run_name": "r50", "tags": {"git": "abc"}, "params": {"optim.lr": "0.1"}}
    return open_run(uri, storage=run_dir, **(arguments | changes))


def all_runs(uri: str):
    client = MlflowClient(uri)
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(ids)


def test_one_run_for_the_life_of_a_job(sqlite_uri, tmp_path):
    client = MlflowClient(sqlite_uri)
    first = begin(sqlite_uri, tmp_path / "run")
    run = client.get_run(first.run_id)
    assert (run.info.status, run.info.run_name) == ("RUNNING", "r50")
    assert (run.data.params, run.data.tags["git"]) == ({"optim.lr": "0.1"}, "abc")
    assert run.data.tags["resumed"] == "0"
    assert end_run(first, "FAILED")
    assert client.get_run(first.run_id).info.status == "FAILED"

    second = begin(sqlite_uri, tmp_path / "run", tags={"git": "def"}, params={"optim.lr": "0.2", "seed": "3"})
    assert second == first
    run = client.get_run(first.run_id)
    assert run.info.status == "RUNNING"
    assert run.data.params == {"optim.lr": "0.1", "seed": "3"}  # MLflow never changes a parameter: the first stands
    assert (run.data.tags["git"], run.data.tags["resumed"]) == ("def", "1")
    assert end_run(second, "FINISHED")
    run = client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.end_time >= run.info.start_time
    assert len(all_runs(sqlite_uri)) == 1


def test_another_folder_is_another_run_of_the_same_experiment(sqlite_uri, tmp_path):
    one, two = begin(sqlite_uri, tmp_path / "one"), begin(sqlite_uri, tmp_path / "two")
    assert one.run_id != two.run_id
    assert one.experiment_id == two.experiment_id


@pytest.mark.parametrize("writes_before_the_kill", [0, 1])
def test_a_driver_killed_while_it_creates_the_run_makes_no_second_one(
    sqlite_uri, tmp_path, monkeypatch, writes_before_the_kill
):
    """The two moments between which the run exists: before the key is written, and before the id is."""
    real_write = mlflow_run.write_json
    calls = []

    class Killed(BaseException):
        pass

    def write(path, tree, **kwargs):
        if len(calls) == writes_before_the_kill:
            raise Killed
        calls.append(tree)
        real_write(path, tree, **kwargs)

    monkeypatch.setattr(mlflow_run, "write_json", write)
    with pytest.raises(Killed):
        begin(sqlite_uri, tmp_path / "run")
    assert len(all_runs(sqlite_uri)) == writes_before_the_kill
    monkeypatch.undo()
    handle = begin(sqlite_uri, tmp_path / "run")
    assert [run.info.run_id for run in all_runs(sqlite_uri)] == [handle.run_id]
    assert json.loads(run_file(tmp_path / "run").read_text())["run_id"] == handle.run_id


def test_a_create_that_mlflow_repeated_leaves_one_run(sqlite_uri, tmp_path, monkeypatch):
    real_create = MlflowClient.create_run

    def create_twice(self, *args, **kwargs):
        real_create(self, *args, **kwargs)
        return real_create(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "create_run", create_twice)
    handle = begin(sqlite_uri, tmp_path / "run")
    assert [run.info.run_id for run in all_runs(sqlite_uri)] == [handle.run_id]


def test_many_parameters_and_long_ones(sqlite_uri, tmp_path):
    params = {f"p{i:03d}": str(i) for i in range(250)} | {"long": "x" * 20_000}
    handle = begin(sqlite_uri, tmp_path / "run", params=params)
    stored = MlflowClient(sqlite_uri).get_run(handle.run_id).data.params
    assert {key: value for key, value in stored.items() if key != "long"} == {f"p{i:03d}": str(i) for i in range(250)}
    assert set(stored["long"].rstrip(".")) == {"x"}


def test_passwords_reach_neither_parameters_nor_tags(sqlite_uri, tmp_path):
    secret = {"profile.tracking_uri": "https://me:hunter2@mlflow:5000"}
    handle = begin(sqlite_uri, tmp_path / "run", tags=secret, params=secret)
    run = MlflowClient(sqlite_uri).get_run(handle.run_id)
    assert run.data.params["profile.tracking_uri"] == "https://***@mlflow:5000"
    assert run.data.tags["profile.tracking_uri"] == "https://***@mlflow:5000"
    assert sqlite_uri not in repr(handle)


def test_artifacts_of_a_sqlite_store_are_beside_it_wherever_the_command_started(sqlite_uri, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    handle = begin(sqlite_uri, tmp_path / "run", experiment="a b/c")
    MlflowClient(sqlite_uri).log_text(handle.run_id, "hello", "note.txt")
    found = list(tmp_path.rglob("note.txt"))
    assert [path.relative_to(tmp_path).parts[:3] for path in found] == [("store", "mlartifacts", "a_b_c")]


def test_a_run_the_server_does_not_have_is_the_users_to_fix(sqlite_uri, template_database, tmp_path):
    handle = begin(sqlite_uri, tmp_path / "run")
    MlflowClient(sqlite_uri).delete_run(handle.run_id)
    with pytest.raises(UserError, match="was deleted; restore it with `mlflow runs restore"):
        begin(sqlite_uri, tmp_path / "run")
    MlflowClient(sqlite_uri).restore_run(handle.run_id)
    assert begin(sqlite_uri, tmp_path / "run") == handle
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "mlflow.db"
    other.write_bytes(template_database.read_bytes())
    with pytest.raises(UserError, match=f"has no run {handle.run_id}; set tracking_uri"):
        begin(f"sqlite:///{other}", tmp_path / "run")


def test_a_deleted_experiment_is_the_users_to_fix(sqlite_uri, tmp_path):
    client = MlflowClient(sqlite_uri)
    client.delete_experiment(client.create_experiment("exp"))
    with pytest.raises(UserError, match="mlflow experiments restore"):
        begin(sqlite_uri, tmp_path / "run")


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_run_file_is_the_users_to_fix(sqlite_uri, tmp_path, content):
    run_file(tmp_path).write_text(content)
    with pytest.raises(UserError, match=r"mlflow_run\.json.*remove"):
        begin(sqlite_uri, tmp_path)


def test_a_server_that_is_not_there_is_one_line(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(Fault, match=r"does not respond \(.*refused.*\)") as caught:
        begin(f"http://me:hunter2@127.0.0.1:{port}", tmp_path / "run", limit_s=0.6)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not run_file(tmp_path / "run").exists()


def test_an_end_that_cannot_be_sent_is_kept(sqlite_uri, tmp_path):
    handle = begin(sqlite_uri, tmp_path / "run")
    with socket.socket() as deaf:  # accepts, never answers
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        away = replace(handle, tracking_uri=f"http://127.0.0.1:{deaf.getsockname()[1]}")
        assert not end_run(away, "KILLED", "no longer at http://me:hunter2@host", limit_s=0.6)
    waiting = json.loads(run_file(tmp_path / "run").read_text())["end"]
    assert (waiting["status"], waiting["sent"]) == ("KILLED", False)
    assert recorded_end(tmp_path / "run") == RunEnd("KILLED", "no longer at http://***@host")
    assert send_end_status(handle)
    run = MlflowClient(sqlite_uri).get_run(handle.run_id)
    assert (run.info.status, run.info.end_time) == ("KILLED", waiting["time_ms"])
    assert run.data.tags["ended"] == "no longer at http://***@host"
    assert not send_end_status(handle)
    begin(sqlite_uri, tmp_path / "run")
    assert "ended" not in MlflowClient(sqlite_uri).get_run(handle.run_id).data.tags
    assert recorded_end(tmp_path / "run") is None


def test_a_resumed_run_forgets_the_end_that_was_kept(sqlite_uri, tmp_path):
    handle = begin(sqlite_uri, tmp_path / "run")
    record = json.loads(run_file(tmp_path / "run").read_text())
    run_file(tmp_path / "run").write_text(
        json.dumps(record | {"end": {"status": "FAILED", "time_ms": 1, "reason": "", "sent": False}})
    )
    begin(sqlite_uri, tmp_path / "run")
    assert not send_end_status(handle)
    assert MlflowClient(sqlite_uri).get_run(handle.run_id).info.status == "RUNNING"


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


def test_importing_the_package_costs_no_mlflow():
    program = (
        "import sys\n"
        "import resnet_dist.tracking.tracker, resnet_dist.tracking.mlflow_run, resnet_dist.tracking.sync\n"
        "import resnet_dist.tracking.models\n"
        "print([name for name in ('mlflow', 'torch', 'ray') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]"
