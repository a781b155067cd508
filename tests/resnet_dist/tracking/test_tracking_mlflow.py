"""The whole way, tracker to MLflow: on sqlite, and on a real server that is killed, stopped and answers nonsense."""

from __future__ import annotations

import http.server
import json
import math
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from mlflow import MlflowClient

from resnet_dist.errors import Fault, UserError
from resnet_dist.tracking.connection import require_answer, sqlite_file
from resnet_dist.tracking.mlflow_run import end_run, open_run, run_file
from resnet_dist.tracking.spool import Metrics, Spool, SpoolReader, spool_folder
from resnet_dist.tracking.sync import REJECTED_NAME, MlflowTransport, Point, sync
from resnet_dist.tracking.tracker import SpoolTracker


def begin(uri: str, run_dir: Path):
    return open_run(uri, "exp", "r", run_dir, {}, {})


def track(handle, **kwargs) -> SpoolTracker:
    return SpoolTracker(handle.run_dir, handle.run_id, handle.tracking_uri, **({"max_backoff_s": 0.5} | kwargs))


def spooled_rows(handle):
    """What the spool says that MLflow's table must hold, row by row (MLflow keeps NaN as 0 with a mark)."""
    reader = SpoolReader(spool_folder(handle.run_dir, handle.run_id))
    rows = []
    while events := reader.read():
        for event in events:
            if isinstance(event, Metrics):
                for key, value in event.values.items():
                    nan = math.isnan(value)
                    rows.append((key, event.step, event.time_ms, 0.0 if nan else value, nan))
    return sorted(rows, key=lambda row: (row[1], row[0]))


def test_everything_arrives_once(sqlite_uri, tmp_path, stored_rows):
    handle = begin(sqlite_uri, tmp_path / "run")
    tracker = track(handle)
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


def test_sending_twice_leaves_every_row_once(sqlite_uri, tmp_path, stored_rows):
    handle = begin(sqlite_uri, tmp_path / "run")
    tracker = track(handle)
    for step in range(1, 51):
        tracker.metrics({"loss": math.nan if step == 7 else math.inf if step == 8 else 0.1 * step, "lr": 0.1}, step)
    assert tracker.flush(60)
    tracker.close()
    rows = stored_rows(sqlite_file(sqlite_uri), handle.run_id)
    assert len(rows) == 100
    MlflowTransport(sqlite_uri, handle.run_id).send(
        [Point(key, math.nan if is_nan else value, time_ms, step) for key, step, time_ms, value, is_nan in rows]
    )
    assert sync(handle.run_dir, sqlite_uri).num_points == 0
    assert stored_rows(sqlite_file(sqlite_uri), handle.run_id) == rows


def test_a_restarted_run_logs_no_step_twice(sqlite_uri, tmp_path, stored_rows):
    for first, last in ((1, 30), (21, 60), (41, 80)):  # each attempt resumes at a checkpoint before the last one's end
        handle = begin(sqlite_uri, tmp_path / "run")
        tracker = track(handle)
        for step in range(first, last + 1):
            tracker.metrics({"loss": first + step / 1000}, step)
        tracker.close()
    rows = stored_rows(sqlite_file(sqlite_uri), handle.run_id)
    assert [row[1] for row in rows] == list(range(1, 81))
    assert rows == spooled_rows(handle)


def test_a_lost_spool_does_not_repeat_what_the_server_has(sqlite_uri, tmp_path, stored_rows):
    handle = begin(sqlite_uri, tmp_path / "run")
    first = track(handle)
    for step in range(1, 11):
        first.metrics({"loss": 1.0}, step)
    assert first.flush(60)
    first.close()
    folder = spool_folder(handle.run_dir, handle.run_id)
    folder.rename(tmp_path / "lost")
    second = track(handle)
    for step in range(6, 16):
        second.metrics({"loss": 2.0}, step)
    assert second.flush(60)
    second.close()
    rows = stored_rows(sqlite_file(sqlite_uri), handle.run_id)
    assert [(row[1], row[3]) for row in rows] == [(n, 1.0 if n <= 10 else 2.0) for n in range(1, 16)]


def test_a_name_that_mlflow_refuses_is_set_aside(sqlite_uri, tmp_path, stored_rows):
    handle = begin(sqlite_uri, tmp_path / "run")
    tracker = track(handle)
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


def test_a_run_deleted_by_somebody_waits_for_its_return(sqlite_uri, tmp_path, stored_rows):
    handle = begin(sqlite_uri, tmp_path / "run")
    MlflowClient(sqlite_uri).delete_run(handle.run_id)
    tracker = track(handle, close_limit_s=0.5)
    tracker.metrics({"loss": 1.0}, 1)
    assert not tracker.flush(2)
    tracker.close()
    MlflowClient(sqlite_uri).restore_run(handle.run_id)
    assert sync(handle.run_dir, sqlite_uri).num_points == 1
    assert stored_rows(sqlite_file(sqlite_uri), handle.run_id) == spooled_rows(handle)


def test_a_run_that_stays_deleted_holds_up_no_other_of_its_folder(sqlite_uri, tmp_path, stored_rows):
    deleted = begin(sqlite_uri, tmp_path / "run")
    MlflowClient(sqlite_uri).delete_run(deleted.run_id)
    tracker = track(deleted, close_limit_s=0.5)
    tracker.metrics({"loss": 1.0}, 1)
    tracker.close()
    run_file(tmp_path / "run").unlink()
    handle = begin(sqlite_uri, tmp_path / "run")
    spool = Spool(spool_folder(handle.run_dir, handle.run_id))
    spool.append_metrics({"loss": 2.0}, 1)
    assert spool.close(30)
    report = sync(handle.run_dir, sqlite_uri)
    assert report.strangers == (f"tracking/{deleted.run_id}",)
    assert len(stored_rows(sqlite_file(sqlite_uri), handle.run_id)) == 1


def test_no_point_gets_into_another_run_than_the_folders_own(sqlite_uri, tmp_path, stored_rows):
    victim, handle = begin(sqlite_uri, tmp_path / "victim"), begin(sqlite_uri, tmp_path / "run")
    for run_id in (victim.run_id, handle.run_id):
        spool = Spool(spool_folder(handle.run_dir, run_id))
        spool.append_metrics({"loss": 0.0}, 1)
        assert spool.close(30)
    report = sync(handle.run_dir, sqlite_uri)
    assert (report.num_points, report.strangers) == (1, (f"tracking/{victim.run_id}",))
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
        spool.append_metrics({"loss": float("nan") if step == 2 else math.inf}, step)
    assert spool.close(30)
    lines = spool.path.read_bytes().splitlines(keepends=True)
    bad = [b'{"kind":"text","seq":9,"time_ms":1,"path":"../../x","content":"x"}\n', b"\xff\0\n", b"[" * 100_000 + b"\n"]
    spool.path.write_bytes(b"".join([*lines[:2], *bad, *lines[2:], b'{"torn']))
    (folder / "\u00b2.jsonl").write_bytes(b"no segment")
    report = sync(handle.run_dir, sqlite_uri)
    assert (report.num_points, report.num_bad_lines, report.num_unreadable_bytes) == (3, 3, 6)
    rows = stored_rows(sqlite_file(sqlite_uri), handle.run_id)
    assert [(step, value > 1e308, is_nan) for _, step, _, value, is_nan in rows] == [
        (1, True, False), (2, False, True), (3, True, False)
    ]  # fmt: skip


def test_a_database_that_is_not_on_this_node_is_not_made_anew(tmp_path):
    tracker = SpoolTracker(tmp_path / "run", "a" * 32, f"sqlite:///{tmp_path}/gone.db", close_limit_s=0.1)
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


def test_the_server_is_killed_and_comes_back(server, tmp_path, stored_rows):
    handle = begin(server.uri, tmp_path / "run")
    tracker = track(handle)
    for step in range(1, 101):
        tracker.metrics({"loss": 1.0 / step, "odd": math.nan if step % 9 == 0 else -math.inf}, step)
    assert tracker.flush(60)
    server.kill()
    for step in range(101, 2001):
        tracker.metrics({"loss": 1.0 / step}, step)
    tracker.text("during/outage.txt", "kept")
    tracker.tags({"state": "outage"})
    assert not tracker.flush(1.0)
    server.start()
    assert tracker.flush(120)
    tracker.close()
    rows = stored_rows(server.database, handle.run_id)
    infinity = 1.7976931348623157e308  # what MLflow makes of it
    expected = [(k, s, t, max(v, -infinity), n) for k, s, t, v, n in spooled_rows(handle)]
    assert rows == expected
    assert len(rows) == 2100
    client = MlflowClient(server.uri)
    assert [m.step for m in client.get_metric_history(handle.run_id, "loss")] == list(range(1, 2001))
    assert client.get_run(handle.run_id).data.tags["state"] == "outage"
    (text,) = server.folder.rglob("outage.txt")
    assert text.read_text() == "kept"


def test_the_server_hangs_for_a_while(server, tmp_path, stored_rows, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    handle = begin(server.uri, tmp_path / "run")
    tracker = track(handle)
    tracker.metrics({"loss": 0.5}, 1)
    assert tracker.flush(60)
    server.signal(signal.SIGSTOP)
    for step in range(2, 301):
        tracker.metrics({"loss": 0.5}, step)
    assert not tracker.flush(2.5)  # requests time out by now, and the server holds them: it takes them twice later
    server.signal(signal.SIGCONT)
    assert tracker.flush(60)
    tracker.close()
    assert stored_rows(server.database, handle.run_id) == spooled_rows(handle)


def test_a_run_killed_during_an_outage_is_completed_by_sync(server, tmp_path, stored_rows):
    handle = begin(server.uri, tmp_path / "run")
    server.kill()
    program = (
        "import os, sys, signal\nfrom pathlib import Path\n"
        "from resnet_dist.tracking.tracker import SpoolTracker\n"
        "tracker = SpoolTracker(Path(sys.argv[1]), sys.argv[2], sys.argv[3])\n"
        "for step in range(1, 201): tracker.metrics({'loss': 1 / step, 'lr': 0.1}, step)\n"
        "tracker.text('notes.txt', 'kept')\n"
        "tracker._spool.persist(60)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    arguments = [str(handle.run_dir), handle.run_id, server.uri]
    killed = subprocess.run([sys.executable, "-c", program, *arguments], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not end_run(handle, "KILLED", answer_limit_s=0.6)
    with pytest.raises(Fault, match="does not answer"):
        begin_again(server.uri, handle.run_dir)
    server.start()
    report = sync(handle.run_dir, server.uri)
    assert (report.num_points, report.num_texts, report.num_rejected) == (400, 1, 0)
    assert report.end_status_sent
    assert stored_rows(server.database, handle.run_id) == spooled_rows(handle)
    assert len(spooled_rows(handle)) == 400
    assert MlflowClient(server.uri).get_run(handle.run_id).info.status == "KILLED"
    again = sync(handle.run_dir, server.uri)
    assert (again.num_points, again.end_status_sent) == (0, False)


def begin_again(uri: str, run_dir: Path):
    return open_run(uri, "exp", "r", run_dir, {}, {}, answer_limit_s=0.6)


class Broken(http.server.BaseHTTPRequestHandler):
    status = 500
    body = b'{"error_code": "INTERNAL_ERROR", "message": "the disk is full"}'
    asked: threading.Semaphore

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.release()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_GET = do_POST = answer  # noqa: N815

    def log_message(self, *args):
        pass


@pytest.fixture
def broken_server():
    handler = type("Handler", (Broken,), {"asked": threading.Semaphore(0)})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        yield handler, f"http://127.0.0.1:{listener.server_port}"
        listener.shutdown()
        thread.join()


@pytest.mark.parametrize("status", [500, 503, 429, 403])
def test_a_server_that_answers_with_errors_keeps_nothing_up_and_loses_nothing(
    broken_server, tmp_path, sqlite_uri, status
):
    handler, uri = broken_server
    handler.status = status
    handle = begin(sqlite_uri, tmp_path / "run")
    tracker = SpoolTracker(handle.run_dir, handle.run_id, uri, close_limit_s=0.1, max_backoff_s=0.1)
    for step in range(1, 51):
        tracker.metrics({"loss": 0.5}, step)
    for _ in range(3):
        assert handler.asked.acquire(timeout=60)  # it is asked again and again
    tracker.close()
    assert sync(handle.run_dir, sqlite_uri).num_points == 50


def test_a_server_that_only_answers_with_500_counts_as_down(broken_server):
    _, uri = broken_server
    with pytest.raises(Fault, match="status 500"):
        require_answer(uri, limit_s=0.6)


def test_a_server_that_refuses_the_host_name_says_how_to_start_it(broken_server):
    handler, uri = broken_server
    handler.status, handler.body = 403, b"Invalid Host header - possible DNS rebinding attack detected"
    with pytest.raises(UserError, match="--allowed-hosts"):
        require_answer(uri)


def test_a_real_server_answers(server):
    require_answer(server.uri, limit_s=10)
    require_answer(server.uri.replace("://", "://me:pw@"), limit_s=10)
