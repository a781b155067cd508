"""A real server that is killed, returns nonsense or has a full disk; and a connection that breaks at random."""

from __future__ import annotations

import http.client
import http.server
import math
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from mlflow import MlflowClient

from resnet_dist.bench.mlflow_server import MlflowServer
from resnet_dist.errors import Fault
from resnet_dist.tracking.mlflow_run import RunHandle, end_run, open_run
from resnet_dist.tracking.sync import sync
from resnet_dist.tracking.tracker import SpoolTracker

pytestmark = pytest.mark.system

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


def test_a_run_is_opened_once_over_a_connection_that_loses_responses(
    server: MlflowServer, behind: Callable[..., str], tmp_path: Path
) -> None:
    fates = {"server_uri": server.uri, "seen": [], "heals": threading.Event(), "lost": []}
    handler = type("Handler", (LosesEveryFirstAnswer,), fates)
    uri, client = behind(handler), MlflowClient(server.uri)
    handle = open_run(uri, "lossy", "r", tmp_path / "run", {"a": "b"}, {"lr": "0.1"}, limit_s=60)
    assert end_run(handle, "FAILED", "a reason")
    assert {kind.rpartition("/")[2] for kind in handler.lost} >= {"create", "search", "update", "log-batch"}

    handler.lost[:] = ["GET /api/2.0/mlflow/experiments/get-by-name"]
    with pytest.raises(Fault, match="opening the run r failed"):
        open_run(uri, "lossy", "r", tmp_path / "run", {}, {}, limit_s=0.0)
    handler.lost.clear()
    assert open_run(uri, "lossy", "r", tmp_path / "run", {}, {}, limit_s=60) == handle
    (run,) = client.search_runs([handle.experiment_id])
    assert (run.info.run_id, run.info.status) == (handle.run_id, "RUNNING")
    assert (run.data.params, run.data.tags["a"], run.data.tags["resumed"]) == ({"lr": "0.1"}, "b", "1")
    assert "ended" not in run.data.tags


def test_every_point_arrives_once_over_a_bad_line(
    bad_line: tuple[type[BadLine], str], server: MlflowServer, tmp_path: Path, stored_rows, spooled_rows
) -> None:
    handler, uri = bad_line
    handle = open_run(server.uri, "exp", "r", tmp_path / "run", {}, {})
    tracker = SpoolTracker(handle.run_dir, handle.run_id, uri)
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
    assert stored_rows(server.database, handle.run_id) == spooled_rows(handle)
    assert len(spooled_rows(handle)) == 2 * step
    notes = {path.stem for path in server.folder.rglob("notes/*.txt")}
    assert {str(k) for k in range(20, step + 1, 20)} <= notes


def begin(uri: str, run_dir: Path):
    return open_run(uri, "exp", "r", run_dir, {}, {})


def test_the_server_is_killed_and_comes_back(server, tmp_path, stored_rows, spooled_rows):
    handle = begin(server.uri, tmp_path / "run")
    tracker = SpoolTracker(handle.run_dir, handle.run_id, handle.tracking_uri)
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


def test_a_run_killed_during_an_outage_is_completed_by_sync(server, tmp_path, stored_rows, spooled_rows):
    handle = begin(server.uri, tmp_path / "run")
    server.kill()
    program = (
        "import os, sys, signal\nfrom pathlib import Path\n"
        "from resnet_dist.tracking.tracker import SpoolTracker\n"
        "tracker = SpoolTracker(Path(sys.argv[1]), sys.argv[2], sys.argv[3])\n"
        "for step in range(1, 201): tracker.metrics({'loss': 1 / step, 'lr': 0.1}, step)\n"
        "tracker.text('notes.txt', 'kept')\n"
        "tracker.persist(60)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    arguments = [str(handle.run_dir), handle.run_id, server.uri]
    killed = subprocess.run([sys.executable, "-c", program, *arguments], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not end_run(handle, "KILLED", limit_s=0.6)
    with pytest.raises(Fault, match="does not respond"):
        open_run(server.uri, "exp", "r", handle.run_dir, {}, {}, limit_s=0.6)
    server.start()
    report = sync(handle.run_dir, server.uri)
    assert (report.num_points, report.num_rejected) == (400, 0)
    assert report.end_status_sent
    assert stored_rows(server.database, handle.run_id) == spooled_rows(handle)
    assert len(spooled_rows(handle)) == 400
    assert MlflowClient(server.uri).get_run(handle.run_id).info.status == "KILLED"
    again = sync(handle.run_dir, server.uri)
    assert (again.num_points, again.end_status_sent) == (0, False)


@pytest.mark.parametrize("status", [500, 429, 403])
def test_a_server_that_returns_errors_delays_and_loses_nothing(broken_server, tmp_path, sqlite_uri, status):
    handler, uri = broken_server
    handler.status = status
    handle = begin(sqlite_uri, tmp_path / "run")
    tracker = SpoolTracker(handle.run_dir, handle.run_id, uri)
    for step in range(1, 51):
        tracker.metrics({"loss": 0.5}, step)
    for _ in range(3):
        assert handler.asked.acquire(timeout=60)  # it is asked again and again
    tracker.close()
    assert sync(handle.run_dir, sqlite_uri).num_points == 50


# A server whose disks are full: small disks of its own, in a mount namespace that ends with it.


NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
NEW_DISKS = """
for disk in database artifacts; do mount -t tmpfs -o size=6m small "$1/$disk"; done
cp "$2" "$1/database/mlflow.db"; shift 2; exec "$@"
"""
MAY_MOUNT = (
    shutil.which("unshare") is not None
    and subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "x", "/mnt"], capture_output=True).returncode == 0
)
with_own_disks = pytest.mark.skipif(not MAY_MOUNT, reason="may not mount a disk of its own here")


@dataclass(frozen=True)
class Disk:
    """6 MB, as the server sees them; nobody else does."""

    path: Path

    def fill(self) -> None:
        with (self.path / "ballast").open("wb", buffering=0) as ballast:
            try:
                while True:
                    ballast.write(b"\0" * 4096)
            except OSError:
                return

    def empty(self) -> None:
        (self.path / "ballast").unlink()


@dataclass(frozen=True)
class SmallServer:
    uri: str
    log: Path
    database: Disk
    artifacts: Disk


@pytest.fixture(scope="module")
def small(template_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallServer]:
    folder = tmp_path_factory.mktemp("small")
    for disk in ("database", "artifacts"):
        (folder / disk).mkdir()
    server = MlflowServer(
        folder, wrapper=[*NAMESPACE, "sh", "-ec", NEW_DISKS, "sh", str(folder), str(template_database)]
    )
    server.database = folder / "database" / "mlflow.db"
    server.start()
    seen = Path(f"/proc/{server.pid}/root{folder}")
    yield SmallServer(server.uri, folder / "server.log", Disk(seen / "database"), Disk(seen / "artifacts"))
    server.kill()


def stored(handle: RunHandle, *keys: str) -> list[tuple[str, int, float]]:
    client = MlflowClient(handle.tracking_uri)
    return [(m.key, m.step, m.value) for key in keys for m in client.get_metric_history(handle.run_id, key)]


@with_own_disks
def test_a_full_database(small: SmallServer, tmp_path: Path, spooled_rows) -> None:
    """Points wait until there is room again; what had gone in before is neither lost nor doubled."""
    handle = open_run(small.uri, "exp", "r", tmp_path / "run", {}, {})
    tracker = SpoolTracker(handle.run_dir, handle.run_id, small.uri)
    for step in range(1, 51):
        tracker.metrics({"loss": 1.0 / step, "lr": 0.1}, step)
    assert tracker.flush(60)
    small.database.fill()
    for step in range(51, 3001):
        tracker.metrics({"loss": 1.0 / step, "lr": 0.1}, step)
    assert not tracker.flush(3.0)
    tracker.close()
    assert not end_run(handle, "KILLED", "ended while the database was full")
    with pytest.raises(Fault, match="run the same command again"):
        sync(handle.run_dir, small.uri)
    assert "database or disk is full" in small.log.read_text()
    small.database.empty()
    assert sync(handle.run_dir, small.uri).end_status_sent
    spooled = [(key, step, value) for key, step, _, value, _ in spooled_rows(handle)]
    assert sorted(stored(handle, "loss", "lr")) == sorted(spooled)
    assert len(spooled) == 6000
    run = MlflowClient(small.uri).get_run(handle.run_id)
    assert (run.info.status, run.data.tags["ended"]) == ("KILLED", "ended while the database was full")


@with_own_disks
def test_a_full_artifact_store(small: SmallServer, tmp_path: Path) -> None:
    """Texts wait, points do not."""
    handle = open_run(small.uri, "exp", "r", tmp_path / "run", {}, {})
    tracker = SpoolTracker(handle.run_dir, handle.run_id, small.uri)
    small.artifacts.fill()
    tracker.text("notes/small.txt", "kept" * 2000)
    tracker.metrics({"loss": 0.5}, 1)
    tracker.tags({"seen": "yes"})
    assert not tracker.flush(3.0)
    assert "No space left on device" in small.log.read_text()
    client = MlflowClient(small.uri)
    assert stored(handle, "loss") == [("loss", 1, 0.5)]
    assert client.get_run(handle.run_id).data.tags["seen"] == "yes"
    small.artifacts.empty()
    assert tracker.flush(60)
    tracker.close()
    target = client.download_artifacts(handle.run_id, "notes/small.txt", str(tmp_path))
    assert Path(target).read_text() == "kept" * 2000
