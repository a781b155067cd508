"""A real server behind a line that breaks at random: refused, slow, answered with 500, and answers lost on the way."""

from __future__ import annotations

import http.client
import http.server
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from resnet_dist.bench.mlflow_server import MlflowServer
from resnet_dist.tracking.events import Metrics
from resnet_dist.tracking.mlflow_run import open_run
from resnet_dist.tracking.mlflow_tracker import SpoolTracker
from resnet_dist.tracking.segments import SpoolReader, spool_folder

FATES = ("passed", "passed", "refused", "slow", "500", "answer lost", "cut in the middle")


class BadLine(http.server.BaseHTTPRequestHandler):
    """What becomes of a request is drawn; it reaches the server in all cases but `refused` and `500`."""

    server_uri: str
    draws: random.Random
    seen: list[str]
    heals: threading.Event

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fate = "passed" if self.heals.is_set() else self.draws.choice(FATES)
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

    do_GET = do_POST = do_PUT = do_PATCH = answer  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def bad_line(server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[BadLine], str]]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    fates = {"server_uri": server.uri, "draws": random.Random(0), "seen": [], "heals": threading.Event()}
    handler = type("Handler", (BadLine,), fates)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listener:
        listener.handle_error = lambda *args: None  # type: ignore[method-assign]  # a client that hung up
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        yield handler, f"http://127.0.0.1:{listener.server_port}"
        listener.shutdown()
        thread.join()


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
