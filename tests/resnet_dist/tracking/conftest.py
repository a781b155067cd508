"""A tracking store per test: a copy of one sqlite database with MLflow's tables, or one real server that can fail."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from resnet_dist.tracking.store import prepare_store
from resnet_dist.tracking.transport import client_environment

Row = tuple[str, int, int, float, bool]  # key, step, time_ms, value, is_nan


@pytest.fixture(scope="session", autouse=True)
def tracking_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """As a worker's; and whatever falls back to MLflow's process-wide store leaves a trace, which is an error."""
    stray = tmp_path_factory.mktemp("stray") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (client_environment() | {"DO_NOT_TRACK": "true"}).items():
            patch.setenv(name, value)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{stray}")
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


class Server:
    """`mlflow server` on a port of its own, in its own process group (its workers outlive a killed parent)."""

    def __init__(self, folder: Path, database: Path) -> None:
        self.folder = folder
        self.database = database
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[Any] | None = None

    def start(self) -> None:
        if self._process is not None:
            return
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--backend-store-uri", f"sqlite:///{self.database}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline_s = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                assert self._process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
                assert time.monotonic() < deadline_s, "the server does not come up"
                time.sleep(0.1)

    def signal(self, number: int) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def shared_server(template_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    database = folder / "mlflow.db"
    shutil.copy(template_database, database)
    server = Server(folder, database)
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """Up at the start of every test, whatever the one before did to it."""
    shared_server.start()
    try:
        yield shared_server
    finally:
        if shared_server._process is not None:
            shared_server.signal(signal.SIGCONT)
