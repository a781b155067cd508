"""A real server behind a line that breaks at random: refused, slow, answered with 500, and answers lost on the way."""

from __future__ import annotations

import http.client
import http.server
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from mlflow import MlflowClient

from resnet_dist.bench.mlflow_server import MlflowServer
from resnet_dist.errors import Fault
from resnet_dist.tracking.mlflow_run import end_run, open_run
from resnet_dist.tracking.spool import Metrics, SpoolReader, spool_folder
from resnet_dist.tracking.tracker import SpoolTracker

FATES = ("passed", "passed", "refused", "slow", "500", "answer lost", "cut in the middle")


class BadLine(http.server.BaseHTTPRequestHandler):
    """What becomes of a request is drawn; it reaches the server in all cases but `refused` and `500`."""

    server_uri: str
    draws: random.Random
    seen: list[str]
    heals: threading.Event

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fate = "passed" if self.heals.is_set() else self.draw()
        self.seen.append(fate)
        if fate == "refused":
            self.close_connection = True
            return
        if fate == "500":
            self.send_error(500)
            return
        if fate == "slow":
            time.sleep(1.5)  # longer than the client waits
        line = http.client.HTTPConnection(urlsplit(self.server_uri).netloc, timeout=30)
        line.request(self.command, self.path, body, {"Content-Type": self.headers.get("Content-Type", "")})
        answer = line.getresponse()
        content = answer.read()
        if fate == "answer lost":
            self.close_connection = True
            return
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.getheader("Content-Type", ""))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if fate == "cut in the middle" else content)
        self.close_connection = self.close_connection or fate == "cut in the middle"

    def draw(self) -> str:
        return self.draws.choice(FATES)

    do_GET = do_POST = do_PUT = do_PATCH = answer  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


class LosesEveryFirstAnswer(BadLine):
    """The server does what it is asked, but of each kind of request only the second is answered."""

    def draw(self) -> str:
        kind = f"{self.command} {urlsplit(self.path).path}"
        return "passed" if kind in self.lost else (self.lost.append(kind) or "answer lost")

    lost: list[str]


@pytest.fixture
def behind(server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Gives the address of a line to the server, whose requests are handled by the class that is passed."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with ExitStack() as ended:

        def line(handler: type[BadLine]) -> str:
            listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
            listener.handle_error = lambda *args: None  # type: ignore[method-assign]  # a client that hung up
            ended.enter_context(listener)
            thread = threading.Thread(target=listener.serve_forever)
            thread.start()
            ended.callback(thread.join)
            ended.callback(listener.shutdown)
            return f"http://127.0.0.1:{listener.server_port}"

        yield line


@pytest.fixture
def bad_line(server: MlflowServer, behind: Callable[..., str]) -> tuple[type[BadLine], str]:
    fates = {"server_uri": server.uri, "draws": random.Random(0), "seen": [], "heals": threading.Event()}
    handler = type("Handler", (BadLine,), fates)
    return handler, behind(handler)


def test_a_run_is_opened_once_over_a_line_that_loses_answers(
    server: MlflowServer, behind: Callable[..., str], tmp_path: Path
) -> None:
    fates = {"server_uri": server.uri, "seen": [], "heals": threading.Event(), "lost": []}
    handler = type("Handler", (LosesEveryFirstAnswer,), fates)
    uri, client = behind(handler), MlflowClient(server.uri)
    handle = open_run(uri, "lossy", "r", tmp_path / "run", {"a": "b"}, {"lr": "0.1"}, answer_limit_s=60)
    assert end_run(handle, "FAILED", "a reason")
    assert {kind.rpartition("/")[2] for kind in handler.lost} >= {"create", "search", "update", "log-batch"}

    handler.lost[:] = ["GET /api/2.0/mlflow/experiments/get-by-name"]
    with pytest.raises(Fault, match="opening the run r failed"):
        open_run(uri, "lossy", "r", tmp_path / "run", {}, {}, answer_limit_s=0.0)
    handler.lost.clear()
    assert open_run(uri, "lossy", "r", tmp_path / "run", {}, {}, answer_limit_s=60) == handle
    (run,) = client.search_runs([handle.experiment_id])
    assert (run.info.run_id, run.info.status) == (handle.run_id, "RUNNING")
    assert (run.data.params, run.data.tags["a"], run.data.tags["resumed"]) == ({"lr": "0.1"}, "b", "1")
    assert "ended" not in run.data.tags


def test_every_point_arrives_once_over_a_bad_line(
    bad_line: tuple[type[BadLine], str], server: MlflowServer, tmp_path: Path, stored_rows
) -> None:
    handler, uri = bad_line
    handle = open_run(server.uri, "exp", "r", tmp_path / "run", {}, {})
    tracker = SpoolTracker(handle.run_dir, handle.run_id, uri, max_backoff_s=0.05)
    step = 0
    while len(set(handler.seen)) < len(set(FATES)) or len(handler.seen) < 25:
        step += 1
        tracker.metrics({"loss": 1.0 / step, "lr": 0.1}, step)
        if step % 20 == 0:
            tracker.text(f"notes/{step}.txt", str(step))
            tracker.flush(0.5)
    handler.heals.set()
    assert tracker.flush(60)
    tracker.close()
    reader, expected = SpoolReader(spool_folder(handle.run_dir, handle.run_id)), []
    while events := reader.read():
        expected += [
            (k, e.step, e.time_ms, v, False) for e in events if isinstance(e, Metrics) for k, v in e.values.items()
        ]
    assert stored_rows(server.database, handle.run_id) == sorted(expected, key=lambda row: (row[1], row[0]))
    assert len(expected) == 2 * step
    notes = {path.stem for path in server.folder.rglob("notes/*.txt")}
    assert {str(k) for k in range(20, step + 1, 20)} <= notes
