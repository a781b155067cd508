"""A tracking store per test: a copy of one sqlite database with MLflow's tables, or one real server that can fail."""

from __future__ import annotations

import http.server
import json
import shutil
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from resnet_dist.bench.mlflow_server import MlflowServer
from resnet_dist.tracking.connection import client_environment, prepare_store
from resnet_dist.tracking.mlflow_run import RunHandle, open_run
from resnet_dist.tracking.spool import Metrics, read_events, spool_folder
from resnet_dist.tracking.tracker import CONFUSION, SpoolTracker

Row = tuple[str, int, int, float, bool]  # key, step, time_ms, value, is_nan


@pytest.fixture(scope="session", autouse=True)
def tracking_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """As a worker's; and whatever falls back to MLflow's process-wide store leaves a trace, which is an error."""
    stray = tmp_path_factory.mktemp("stray") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (client_environment() | {"DO_NOT_TRACK": "true"}).items():
            patch.setenv(name, value)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{stray}")
        # No test waits long for a server that is away, nor does a tracker that is closed then.
        patch.setattr("resnet_dist.tracking.sync._MAX_BACKOFF_S", 0.5)
        patch.setattr("resnet_dist.tracking.tracker._SERVER_LIMIT_S", 0.2)
        yield
    assert not stray.exists(), "something used the process-wide tracking URI"


@pytest.fixture(scope="session")
def template_database(tmp_path_factory: pytest.TempPathFactory, tracking_environment: None) -> Path:
    """MLflow takes seconds to create its tables: once is enough."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    prepare_store(f"sqlite:///{path}")
    return path


@pytest.fixture
def sqlite_uri(template_database: Path, tmp_path: Path) -> str:
    path = tmp_path / "store" / "mlflow.db"
    path.parent.mkdir()
    shutil.copy(template_database, path)
    return f"sqlite:///{path}"


@pytest.fixture
def stored_rows() -> Callable[[Path, str], list[Row]]:
    """Every row of a run's metrics as it stands in MLflow's database: duplicates would show."""

    def read(database: Path, run_id: str) -> list[Row]:
        with sqlite3.connect(database) as connection:
            query = "select key, step, timestamp, value, is_nan from metrics where run_uuid = ? order by step, key"
            return [(k, s, t, v, bool(n)) for k, s, t, v, n in connection.execute(query, (run_id,))]

    return read


@pytest.fixture(scope="session")
def shared_server(template_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    shutil.copy(template_database, server.database)
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def server(shared_server: MlflowServer) -> Iterator[MlflowServer]:
    """Up at the start of every test, whatever the one before did to it."""
    shared_server.start()
    try:
        yield shared_server
    finally:
        if shared_server.is_up:
            shared_server.signal(signal.SIGCONT)


@pytest.fixture
def logged_run() -> Callable[..., RunHandle]:
    """Makes a run with some points in its spool and at the server."""

    def logged_run(uri: str, run_dir: Path, name: str = "r", **params: str) -> RunHandle:
        handle = open_run(uri, "exp", name, run_dir, {"workers": "2"}, params)
        tracker = SpoolTracker(run_dir, handle.run_id, uri)
        for step in (10, 20):
            tracker.metrics({"train/top1_error": 100.0 - step, "train/lr": 0.1, "speed/images_per_s": 50.0}, step)
        tracker.metrics({"val/top1": 70.0, "val/top1_error": 30.0, "val/top5_error": float("nan")}, 20)
        tracker.text(CONFUSION, json.dumps({"num_classes": 2, "counts": [[0, 0, 3], [1, 0, 1], [1, 1, 4]]}))
        assert tracker.flush(60)
        tracker.close()
        return handle

    return logged_run


@pytest.fixture
def spooled_rows() -> Callable[[RunHandle], list[Row]]:
    """What the spool of rank 0 says that MLflow's table must hold, row by row (MLflow keeps NaN as 0 with a mark)."""

    def read(handle: RunHandle) -> list[Row]:
        events = read_events(spool_folder(handle.run_dir, handle.run_id))
        points = [(e, k, v) for e in events if isinstance(e, Metrics) for k, v in e.values.items()]
        rows = [(key, e.step, e.time_ms, 0.0 if v != v else v, v != v) for e, key, v in points]
        return sorted(rows, key=lambda row: (row[1], row[0]))

    return read


class Broken(http.server.BaseHTTPRequestHandler):
    """An MLflow server that gives every request the same error."""

    status = 500
    body = b'{"error_code": "INTERNAL_ERROR", "message": "the disk is full"}'
    asked: threading.Semaphore

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.release()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_GET = do_POST = answer  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def broken_server() -> Iterator[tuple[type[Broken], str]]:
    """The handler, whose status and body a test may change, and the address."""
    handler = type("Handler", (Broken,), {"asked": threading.Semaphore(0)})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        yield handler, f"http://127.0.0.1:{listener.server_port}"
        listener.shutdown()
        thread.join()
