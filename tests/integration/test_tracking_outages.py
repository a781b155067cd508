"""A training on two nodes, in a bucket, whose MLflow server, with passwords, is killed again and again, then for good.

Only this test combines two raylets, credentials that only the driver has, `sync` from a machine that knows
nothing but the bucket, and every point of the spool compared with the server's database.
"""

from __future__ import annotations

import math
import random
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from resnet_dist.bench.mlflow_server import MlflowServer
from resnet_dist.storage.locations import open_storage
from resnet_dist.tracking.spool import Metrics, read_events, spool_folders

PASSWORD = "correct-horse-battery"  # of a server that lives as long as the test
LAST_STEP = 66
DIES_AT_STEP = 30
TRAINING_LIMIT_S = 900.0  # beside other work; a minute on a free machine
SETTINGS = (
    *("--set", "model.name=resnet8", "--set", "train.total_epochs=6"),
    *("--profile-set", "log_every_steps=1", "--profile-set", "checkpoint.every_epochs=2"),
    *("--profile-set", "workers=2", "--profile-set", "storage=s3://runs/outages"),
)
Row = tuple[str, int, int, float]  # key, step, time_ms, value


@pytest.fixture
def bucket(object_store: Any) -> Any:
    """A client of the object store that has the run's bucket."""
    object_store.create_bucket(Bucket="runs")
    return object_store


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[MlflowServer]:
    folder = tmp_path / "server"
    folder.mkdir()
    settings = folder / "auth.ini"
    settings.write_text(
        f"[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = sqlite:///{folder}/users.db\n"
        "admin_username = admin\nauthorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    server = MlflowServer(
        folder,
        options=["--app-name", "basic-auth"],
        environment={
            "MLFLOW_AUTH_CONFIG_PATH": str(settings),
            "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "of this test",
        },
    )
    server.start()
    yield server
    server.kill()


@pytest.fixture
def two_nodes(bucket: Any, small_head: Any) -> Iterator[Any]:
    with small_head.another_node("127.0.0.2"):
        yield small_head


class Tormentor(threading.Thread):
    """Kills the server at random moments and starts it again, until told to stop or to leave it dead."""

    def __init__(self, server: MlflowServer) -> None:
        super().__init__(daemon=True)
        self.num_kills = 0
        self._server = server
        self._draws = random.Random(1)
        self._done = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._done.wait(self._draws.uniform(0.5, 4.0)):
            self._server.kill()
            self.num_kills += 1
            time.sleep(self._draws.uniform(0.0, 3.0))
            if not self._done.is_set():
                self._server.start()

    def leave_it_dead(self) -> None:
        self._done.set()
        self.join()
        self._server.kill()


def stored(server: MlflowServer) -> list[Row]:
    with closing(sqlite3.connect(server.database)) as connection:
        rows = connection.execute("select key, step, timestamp, value, is_nan from metrics").fetchall()
    return sorted((k, s, t, math.nan if nan else v) for k, s, t, v, nan in rows)


def spooled() -> list[Row]:
    """What the bucket holds, read as on a machine that has nothing else."""
    storage = open_storage("s3://runs/outages/r")
    storage.pull()
    rows: list[Row] = []
    for spool in spool_folders(storage.folder):
        events = [event for event in read_events(spool) if isinstance(event, Metrics)]
        rows += [(k, e.step, e.time_ms, v) for e in events for k, v in e.values.items()]
    return sorted(rows)


def trained(rows: list[Row]) -> list[Row]:
    return [row for row in rows if not row[0].startswith("system/")]


def objects(bucket: Any) -> Iterator[bytes]:
    """The content of everything in the bucket."""
    for page in bucket.get_paginator("list_objects_v2").paginate(Bucket="runs"):
        for entry in page["Contents"]:
            yield bucket.get_object(Bucket="runs", Key=entry["Key"])["Body"].read()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_point_of_a_run_whose_server_kept_dying(
    cli: Any, two_nodes: Any, bucket: Any, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    login = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": PASSWORD}
    there = ("--profile-set", f"tracking_uri={mlflow_server.uri}", "--json")
    command = cli.train_command(*SETTINGS, *there, name="r")

    refused = cli.run(command, RAY_ADDRESS=two_nodes.address)
    assert refused.returncode == 2, refused.stderr
    assert "refuses this user" in refused.stderr

    process = cli.start(command, RAY_ADDRESS=two_nodes.address, **login)
    tormentor: Tormentor | None = None
    deadline = time.monotonic() + TRAINING_LIMIT_S
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"no training: {process.communicate()}")
        step = max((row[1] for row in stored(mlflow_server)), default=0)
        if tormentor is None and step >= 3:
            tormentor = Tormentor(mlflow_server)
        if step >= DIES_AT_STEP and tormentor is not None and tormentor.num_kills >= 2:
            break
        time.sleep(0.3)
    tormentor.leave_it_dead()
    out, err = process.communicate(timeout=TRAINING_LIMIT_S)
    assert process.returncode == 1, err  # trained to the end, but nobody took the model
    assert "training finished after step" in err, err
    assert err.count("does not respond") == 1, err

    mlflow_server.start()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    sync = [sys.executable, "-m", "resnet_dist", "tracking", "sync", "s3://runs/outages/r"]
    done = cli.run([*sync, "--tracking-uri", mlflow_server.uri], HOME=str(elsewhere), **login)
    assert done.returncode == 0, done.stderr
    assert "is complete in MLflow and marked FINISHED" in done.stdout
    expected = spooled()
    assert stored(mlflow_server) == expected
    assert [step for key, step, _, _ in expected if key == "train/loss"] == list(range(1, LAST_STEP + 1))
    nodes = Counter(key.split("/")[1] for key, *_ in expected if key.startswith("system/"))
    assert set(nodes) == {"node-0", "node-1"}

    finished = cli.run(command, RAY_ADDRESS=two_nodes.address, **login)
    assert finished.returncode == 0, finished.stderr
    final = stored(mlflow_server)
    assert trained(final) == trained(expected)  # nothing was trained again
    assert max(Counter((key, step) for key, step, _, _ in final).values()) == 1
    with closing(sqlite3.connect(mlflow_server.database)) as connection:
        assert connection.execute("select status from runs").fetchall() == [("FINISHED",)]
    said = [out, err, done.stdout, done.stderr, finished.stderr, finished.stdout]
    assert not [text for text in said if PASSWORD in text]
    assert not [content for content in objects(bucket) if PASSWORD.encode() in content]
