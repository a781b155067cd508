"""From a spool to MLflow: every point arrives once, in order, whatever fails; the same for spools of version 1."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Metric

from resnet_dist.errors import Fault, UserError
from resnet_dist.tracking.connection import sqlite_file
from resnet_dist.tracking.mlflow_run import open_run, recorded_end, recorded_run, run_file
from resnet_dist.tracking.spool import History, read_history, spool_folder, spool_folders
from resnet_dist.tracking.sync import (
    MAX_POINTS,
    REJECTED_NAME,
    Delivery,
    MlflowTransport,
    Rejected,
    Unavailable,
    sync,
)
from resnet_dist.tracking.tracker import CONFUSION, Spool, SpoolTracker

VERSION_1 = Path(__file__).parent / "version_1" / "run"
"""A run's folder as commit d23ff8b left it: two attempts, the second of which resumed at step 4 and met no server, a
torn last line, and the spool of another node."""


class MemoryServer:
    """Keeps points as MLflow does: a (key, time, step, value) twice is one. `script`: which requests fail, and how."""

    def __init__(self, script=()):
        self.script = iter(script)
        self.points = {}
        self.tags = {}
        self.texts = {}
        self.arrivals = []
        self.num_requests = 0

    def newest_steps(self):
        if next(self.script, "ok") != "ok":
            raise Unavailable("down")
        newest = {}
        for key, _, step, _ in self.points:
            newest[key] = max(step, newest.get(key, step))
        return newest

    def send(self, points):
        assert 0 < len(points) <= MAX_POINTS
        with self.answering([point.key for point in points]):
            for point in points:
                identity = (point.key, point.time_ms, point.step, point.value)
                if identity not in self.points:
                    self.points[identity] = True
                    self.arrivals.append((point.key, point.step))

    def send_tag(self, key, value):
        with self.answering([key]):
            self.tags[key] = value

    def send_text(self, path, content):
        with self.answering([path]):
            self.texts[path] = content

    @contextmanager
    def answering(self, names):
        self.num_requests += 1
        failure = next(self.script, "ok")
        if failure == "lost on the way":
            raise Unavailable(failure)
        if any("bad" in name for name in names):
            raise Rejected("bad name")
        yield
        if failure == "answer lost":
            raise Unavailable(failure)


def deliver_all(delivery, attempts=1000):
    for _ in range(attempts):
        try:
            return delivery.send_all()
        except Unavailable:
            pass
    raise AssertionError("never finished")


def log(folder: Path, *steps: int, **values: float) -> None:
    spool = Spool(folder)
    for step in steps:
        spool.metrics(values or {"loss": 1.0}, step)
    spool.close()


def test_requests_keep_to_the_servers_limits_and_the_last_tag_and_text_of_a_name_win(tmp_path):
    spool = Spool(tmp_path)
    spool.metrics({f"m{i}": 1.0 for i in range(3 * MAX_POINTS)}, 1)
    for number in ("1", "2"):
        spool.tags({"a": number, f"only {number}": "x"})
        spool.text("notes.txt", number)
    spool.close()
    server = MemoryServer()
    deliver_all(Delivery(tmp_path, server))
    assert [key for key, _ in server.arrivals] == [f"m{i}" for i in range(3 * MAX_POINTS)]
    assert server.tags == {"a": "2", "only 1": "x", "only 2": "x"}
    assert server.texts == {"notes.txt": "2"}


@given(
    failures=st.lists(st.sampled_from(["ok", "lost on the way", "answer lost"]), max_size=30),
    restarts=st.lists(st.integers(0, 4), max_size=6),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_point_arrives_once_and_in_order_whatever_fails(tmp_path_factory, failures, restarts):
    folder = tmp_path_factory.mktemp("spool")
    server = MemoryServer(failures)
    step = 0
    for num_attempts in [*restarts, None]:
        spool = Spool(folder)
        for new in range(max(step - 3, 0), step + 7):  # every attempt begins three steps before the last one's end
            spool.metrics({"loss": float(new), "lr": 0.1}, new)
        step += 6
        spool.text("recipe.yaml", f"attempt at {step}")
        spool.close()
        delivery = Delivery(folder, server)
        if num_attempts is None:
            deliver_all(delivery)
        for _ in range(num_attempts or 0):
            try:
                delivery.send_all()
            except Unavailable:
                continue
    wanted = [(key, n) for n in range(step + 1) for key in ("loss", "lr")]
    assert server.arrivals == wanted
    assert len(server.points) == len(wanted)
    assert server.texts == {"recipe.yaml": f"attempt at {step}"}


def test_what_the_server_has_is_not_sent_again(tmp_path):
    log(tmp_path, *range(3000))
    server = MemoryServer()
    deliver_all(Delivery(tmp_path, server))
    assert server.num_requests == 4
    again = Delivery(tmp_path, server)
    deliver_all(again)
    assert (again.num_points, server.num_requests) == (0, 4)


def test_two_senders_at_once_leave_every_point_once(tmp_path):
    """`tracking sync` of a run that is in progress: each sends what the server lacked when it asked."""
    log(tmp_path, *range(2000))
    server = MemoryServer()
    one, other = Delivery(tmp_path, server), Delivery(tmp_path, server)
    turns = iter([True, False])
    one.send_all(proceed=lambda: next(turns, False))  # its first request only
    deliver_all(other)
    deliver_all(one)
    assert server.arrivals == [("loss", step) for step in range(2000)]


def test_a_new_spool_of_an_old_run_leaves_out_what_the_server_has(tmp_path):
    server = MemoryServer()
    log(tmp_path / "node-1", *range(1, 11))
    deliver_all(Delivery(tmp_path / "node-1", server))
    # another disk: resumes at step 7, knows nothing
    log(tmp_path / "node-2", *range(8, 15), **{"loss": -1.0, "val/loss": 2.0})
    deliver_all(Delivery(tmp_path / "node-2", server))
    losses = {step: value for key, _, step, value in server.points if key == "loss"}
    assert losses == {step: 1.0 if step <= 10 else -1.0 for step in range(1, 15)}
    assert sorted(step for key, _, step, _ in server.points if key == "val/loss") == list(range(8, 15))
    assert len(server.points) == 14 + 7


def test_a_storage_that_cannot_be_read_for_a_while_costs_no_point(tmp_path, monkeypatch):
    log(tmp_path, *range(3 * MAX_POINTS))
    server = MemoryServer(["ok", "ok", "lost on the way"])
    delivery = Delivery(tmp_path, server)
    with pytest.raises(Unavailable):
        delivery.send_all()
    with monkeypatch.context() as patch:
        patch.setattr("resnet_dist.tracking.spool.decode", lambda line: Path("/nowhere/at/all").stat())
        for _ in range(2):
            with pytest.raises(OSError, match="nowhere"):
                delivery.send_all()
    deliver_all(delivery)
    assert server.arrivals == [("loss", step) for step in range(3 * MAX_POINTS)]


def test_what_the_server_refuses_does_not_hold_up_the_rest(tmp_path):
    spool = Spool(tmp_path)
    for step in range(20):
        spool.metrics({"loss": 1.0, "lr": 0.1} | ({"bad|name": 3.0} if step == 7 else {}), step)
    spool.tags({"bad tag": "x", "good": "y"})
    spool.metrics({"loss": 1.0}, 20)
    spool.close()
    server = MemoryServer()
    delivery = Delivery(tmp_path, server)
    deliver_all(delivery)
    assert [step for key, step in server.arrivals if key == "loss"] == list(range(21))
    assert server.tags == {"good": "y"}
    assert delivery.num_rejected == 2
    rejected = (tmp_path / REJECTED_NAME).read_text().splitlines()
    assert len(rejected) == 2
    assert "bad|name at step 7 = 3.0" in rejected[0]
    assert "bad tag" in rejected[1]


def test_texts_that_cannot_be_stored_do_not_hold_up_the_points(tmp_path):
    spool = Spool(tmp_path)
    spool.text("recipe.yaml", "seed: 1")
    spool.metrics({"loss": 1.0}, 1)
    spool.close()
    server = MemoryServer()
    server.send_text = lambda path, content: (_ for _ in ()).throw(Unavailable("no room"))
    delivery = Delivery(tmp_path, server)
    for _ in range(2):
        with pytest.raises(Unavailable, match="no room"):
            delivery.send_all()
    assert server.arrivals == [("loss", 1)]
    del server.send_text
    deliver_all(delivery)
    assert server.texts == {"recipe.yaml": "seed: 1"}
    assert delivery.num_points == 1


# With MLflow itself, on sqlite.


def begin(uri: str, run_dir: Path):
    return open_run(uri, "exp", "r", run_dir, {}, {})


def test_everything_arrives_once(sqlite_uri, tmp_path, stored_rows, spooled_rows):
    handle = begin(sqlite_uri, tmp_path / "run")
    tracker = SpoolTracker(handle.run_dir, handle.run_id, handle.tracking_uri)
    for step in range(1, 1501):
        tracker.metrics({"train/loss": 1.0 / step, "lr": 0.1}, step)
    tracker.metrics({"val/loss": math.nan, "val/top1": 97.5}, 1500)
    tracker.tags({"host": "node-1", "storage": "https://me:hunter2@minio:9000"})
    tracker.text("notes/recipe.yaml", "seed: 1\nuri: http://me:hunter2@mlflow\n")
    assert tracker.flush(60)
    tracker.close()
    rows = stored_rows(sqlite_file(sqlite_uri), handle.run_id)
    assert rows == spooled_rows(handle)
    assert len(rows) == 3002
    run = MlflowClient(sqlite_uri).get_run(handle.run_id)
    assert run.data.tags["host"] == "node-1"
    assert run.data.tags["storage"] == "https://***@minio:9000"
    (text,) = tmp_path.rglob("recipe.yaml")
    assert text.read_text() == "seed: 1\nuri: http://***@mlflow\n"


def test_of_a_hundred_spools_the_server_is_asked_once_and_given_up_soon(sqlite_uri, tmp_path, stored_rows, monkeypatch):
    handle = begin(sqlite_uri, tmp_path / "run")
    for node in range(100):
        with closing(Spool(spool_folder(handle.run_dir, handle.run_id, f"node-{node}" if node else ""))) as spool:
            spool.metrics({f"system/node-{node}/cpu": 1.0}, 1)
    asked, ask = [], MlflowTransport.newest_steps
    is_away = True

    def newest_steps(transport: MlflowTransport) -> dict[str, int]:
        asked.append(1)
        if is_away:
            raise Unavailable("connection refused")
        return ask(transport)

    monkeypatch.setattr(MlflowTransport, "newest_steps", newest_steps)
    monkeypatch.setattr("resnet_dist.tracking.sync.backoff_s", lambda num_failures: 0.0)
    with pytest.raises(Fault, match="connection refused"):
        sync(handle.run_dir, handle.tracking_uri)
    assert len(asked) == 5 + 1 + 1
    is_away = False
    asked.clear()
    assert sync(handle.run_dir, handle.tracking_uri).num_points == 100
    assert len(asked) == 1
    assert len(stored_rows(sqlite_file(sqlite_uri), handle.run_id)) == 100


def test_spools_that_fail_now_and_then_do_not_hold_up_the_others(sqlite_uri, tmp_path, stored_rows, monkeypatch):
    handle = begin(sqlite_uri, tmp_path / "run")
    for node in range(12):
        with closing(Spool(spool_folder(handle.run_dir, handle.run_id, f"node-{node:02}" if node else ""))) as spool:
            spool.metrics({f"system/node-{node}/cpu": 1.0}, 1)
    send = MlflowTransport.send

    def refuse_some(transport: MlflowTransport, points) -> None:
        if int(points[0].key.split("-")[1].split("/")[0]) % 2:
            raise Unavailable("refused")
        send(transport, points)

    monkeypatch.setattr(MlflowTransport, "send", refuse_some)
    monkeypatch.setattr("resnet_dist.tracking.sync.backoff_s", lambda num_failures: 0.0)
    with pytest.raises(Fault, match="refused"):
        sync(handle.run_dir, handle.tracking_uri)
    assert len(stored_rows(sqlite_file(sqlite_uri), handle.run_id)) == 6


def test_a_name_that_mlflow_refuses_is_set_aside(sqlite_uri, tmp_path, stored_rows):
    handle = begin(sqlite_uri, tmp_path / "run")
    tracker = SpoolTracker(handle.run_dir, handle.run_id, handle.tracking_uri)
    tracker.metrics({"loss": 1.0, "bad\nname": 2.0}, 1)
    for path in ("../outside.txt", "/abs.txt", "", "a\0b"):
        with pytest.raises(ValueError, match="artifact_path"):
            tracker.text(path, "x")
    tracker.metrics({"loss": 3.0}, 2)
    assert tracker.flush(60)
    tracker.close()
    assert [row[:2] for row in stored_rows(sqlite_file(sqlite_uri), handle.run_id)] == [("loss", 1), ("loss", 2)]
    rejected = (spool_folder(handle.run_dir, handle.run_id) / REJECTED_NAME).read_text()
    assert "bad\\nname at step 1" in rejected


def test_a_run_deleted_by_somebody_waits_for_its_return(sqlite_uri, tmp_path, stored_rows, spooled_rows):
    handle = begin(sqlite_uri, tmp_path / "run")
    MlflowClient(sqlite_uri).delete_run(handle.run_id)
    tracker = SpoolTracker(handle.run_dir, handle.run_id, handle.tracking_uri)
    tracker.metrics({"loss": 1.0}, 1)
    assert not tracker.flush(2)
    tracker.close()
    MlflowClient(sqlite_uri).restore_run(handle.run_id)
    assert sync(handle.run_dir, sqlite_uri).num_points == 1
    assert stored_rows(sqlite_file(sqlite_uri), handle.run_id) == spooled_rows(handle)


def test_no_point_gets_into_another_run_than_the_folders_own(sqlite_uri, tmp_path, stored_rows):
    victim, handle = begin(sqlite_uri, tmp_path / "victim"), begin(sqlite_uri, tmp_path / "run")
    for run_id in (victim.run_id, handle.run_id):
        spool = Spool(spool_folder(handle.run_dir, run_id))
        spool.metrics({"loss": 0.0}, 1)
        spool.close()
    report = sync(handle.run_dir, sqlite_uri)
    assert (report.num_points, report.other_runs) == (1, (f"tracking/{victim.run_id}",))
    assert stored_rows(sqlite_file(sqlite_uri), victim.run_id) == []
    record = json.loads(run_file(handle.run_dir).read_text())
    run_file(handle.run_dir).write_text(json.dumps(record | {"run_id": victim.run_id}))
    for send in (sync, lambda folder, uri: open_run(uri, "exp", "r", folder, {}, {})):
        with pytest.raises(UserError, match="belongs to another folder"):
            send(handle.run_dir, sqlite_uri)
    assert stored_rows(sqlite_file(sqlite_uri), victim.run_id) == []


def test_a_bad_line_is_counted_and_passed_over(sqlite_uri, tmp_path, stored_rows):
    handle = begin(sqlite_uri, tmp_path / "run")
    folder = spool_folder(handle.run_dir, handle.run_id)
    spool = Spool(folder)
    for step in (1, 2, 3):
        spool.metrics({"loss": float("nan") if step == 2 else math.inf}, step)
    spool.close()
    lines = spool.path.read_bytes().splitlines(keepends=True)
    bad = [b'{"kind":"text","seq":9,"time_ms":1,"path":"../../x","content":"x"}\n', b"\xff\0\n", b"[" * 100_000 + b"\n"]
    spool.path.write_bytes(b"".join([*lines[:2], *bad, *lines[2:], b'{"torn']))
    (folder / "\u00b2.jsonl").write_bytes(b"no segment")
    report = sync(handle.run_dir, sqlite_uri)
    assert (report.num_points, report.num_bad_lines) == (3, 3)
    rows = stored_rows(sqlite_file(sqlite_uri), handle.run_id)
    assert [(step, value > 1e308, is_nan) for _, step, _, value, is_nan in rows] == [
        (1, True, False), (2, False, True), (3, True, False)
    ]  # fmt: skip


def test_a_database_that_is_not_on_this_node_is_not_created(tmp_path):
    tracker = SpoolTracker(tmp_path / "run", "a" * 32, f"sqlite:///{tmp_path}/gone.db")
    tracker.metrics({"loss": 1.0}, 1)
    assert not tracker.flush(0.5)
    tracker.close()
    assert not (tmp_path / "gone.db").exists()


def test_storage_that_cannot_be_written_is_a_fault(tmp_path):
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(Fault, match="cannot be kept"):
        SpoolTracker(tmp_path / "run", "a" * 32, "sqlite:////nowhere.db")


def test_sync_of_a_folder_without_a_run(tmp_path):
    with pytest.raises(UserError, match="no tracked run"):
        sync(tmp_path, f"sqlite:///{tmp_path}/m.db")


def test_history_is_what_the_spool_holds(sqlite_uri, tmp_path, logged_run):
    handle = logged_run(sqlite_uri, tmp_path / "run")
    history = read_history(tmp_path / "run", handle.run_id)
    assert history.points["train/top1_error"] == [(10, 90.0), (20, 80.0)]
    assert history.points["val/top1"] == [(20, 70.0)]
    assert json.loads(history.texts[CONFUSION])["num_classes"] == 2
    (point,) = MlflowClient(sqlite_uri).get_metric_history(handle.run_id, "val/top1")
    assert history.times_ms["val/top1", 20] == point.timestamp
    assert read_history(tmp_path / "elsewhere", handle.run_id) == History()


@pytest.fixture
def old_run(sqlite_uri: str, tmp_path: Path):
    """The run of version 1, continued at another server that has what its first attempt had sent."""
    handle = open_run(sqlite_uri, "exp", "r", tmp_path / "run", {}, {})
    for folder in spool_folders(VERSION_1):
        shutil.copytree(folder, handle.run_dir / folder.parent.name / handle.run_id)
    history = read_history(handle.run_dir, handle.run_id)
    sent = [
        Metric(key, value, history.times_ms[key, step], step)
        for key, points in history.points.items()
        for step, value in points
        if step <= 7
    ]
    MlflowClient(sqlite_uri).log_batch(handle.run_id, metrics=sent)
    return handle


def test_a_spool_of_version_1_is_sent(old_run, stored_rows):
    report, again = (sync(old_run.run_dir, old_run.tracking_uri) for _ in range(2))
    assert (report.num_points, report.num_bad_lines, again.num_points) == (2 * 5 + 1 + 1, 0, 0)
    rows = stored_rows(sqlite_file(old_run.tracking_uri), old_run.run_id)
    losses = [(step, value) for key, step, _, value, _ in rows if key == "train/loss"]
    assert losses == [(step, 1.0 / step if step <= 7 else -1.0 / step) for step in range(1, 13)]
    assert [(key, step) for key, step, *_ in rows if not key.startswith("train/")] == [
        ("odd", 7), ("val/top1", 7), ("system/node-1/cpu_utilization_percentage", 10), ("val/top1", 12)
    ]  # fmt: skip
    run = MlflowClient(old_run.tracking_uri).get_run(old_run.run_id)
    assert run.data.tags["workers"] == "3"


def test_a_run_of_version_1_is_continued(old_run, stored_rows):
    tracker = SpoolTracker(old_run.run_dir, old_run.run_id, old_run.tracking_uri, lease=1)
    for step in range(10, 15):
        tracker.metrics({"train/loss": 0.0}, step)
    assert tracker.flush(60)
    tracker.close()
    rows = stored_rows(sqlite_file(old_run.tracking_uri), old_run.run_id)
    losses = {step: value for key, step, _, value, _ in rows if key == "train/loss"}
    assert losses == {step: 1.0 / step if step <= 7 else -1.0 / step for step in range(1, 13)} | {13: 0.0, 14: 0.0}
    assert [row[1] for row in rows if row[0] == "train/loss"] == list(range(1, 15))


def test_the_record_of_a_run_of_version_1_is_read():
    handle, end = recorded_run(VERSION_1, "http://mlflow:5000"), recorded_end(VERSION_1)
    assert handle is not None
    assert [folder.name for folder in spool_folders(VERSION_1)] == [handle.run_id, handle.run_id]
    assert end is not None
    assert (end.status, end.reason) == ("KILLED", "interrupted")
