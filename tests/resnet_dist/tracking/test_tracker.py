"""The thread of a `SpoolTracker`: it waits for a server that is down or hangs, and delays nobody."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from resnet_dist.tracking.spool import read_history, spool_files, spool_folder
from resnet_dist.tracking.sync import Unavailable, backoff_s
from resnet_dist.tracking.tracker import Spool, SpoolTracker

RUN_ID = "a" * 32


class Server:
    """A server that can be away, and that can hang."""

    def __init__(self) -> None:
        self.is_up = True
        self.answers = threading.Event()
        self.answers.set()
        self.asked = threading.Semaphore(0)
        self.steps: list[int] = []

    def newest_steps(self) -> dict[str, int]:
        return {}

    def send(self, batch) -> None:
        self.asked.release()
        self.answers.wait(60)
        if not self.is_up:
            raise Unavailable("connection refused")
        self.steps += [point.step for point in batch]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setattr("resnet_dist.tracking.tracker.MlflowTransport", lambda uri, run_id: server)
    yield server
    server.answers.set()


@pytest.fixture
def open_tracker(server: Server, tmp_path: Path) -> Iterator[Callable[..., SpoolTracker]]:
    opened: list[SpoolTracker] = []

    def open_tracker(**options) -> SpoolTracker:
        opened.append(SpoolTracker(tmp_path, RUN_ID, "http://unused", **options))
        return opened[-1]

    yield open_tracker
    server.answers.set()
    for tracker in opened:
        tracker.close()


def log(tracker: SpoolTracker, *steps: int) -> None:
    for step in steps:
        tracker.metrics({"loss": 0.0}, step)
    assert tracker.persist(60)


@pytest.mark.parametrize(("num_failures", "most_s"), [(1, 0.5), (2, 1.0), (4, 4.0), (5, 5.0), (10**6, 5.0)])
def test_the_pause_grows_to_its_limit_and_is_spread(num_failures, most_s, monkeypatch):
    monkeypatch.setattr("resnet_dist.tracking.sync._MAX_BACKOFF_S", 5.0)
    pauses = {backoff_s(num_failures) for _ in range(20)}
    assert most_s / 2 <= min(pauses) < max(pauses) <= most_s


def test_an_outage_is_waited_out(open_tracker, server):
    warnings: list[str] = []
    server.is_up = False
    tracker = open_tracker(warn=warnings.append)
    log(tracker, *range(1, 11))
    for _ in range(2):
        assert server.asked.acquire(timeout=60)
    assert not tracker.flush(0.05)
    server.is_up = True
    assert tracker.flush(60)
    assert server.steps == list(range(1, 11))
    assert [line.partition(" (")[0] for line in warnings] == [
        "MLflow does not accept metrics",
        "MLflow accepts metrics again; all that was kept has arrived",
    ]


def test_nothing_is_sent_before_storage_has_it(open_tracker, server, tmp_path, monkeypatch):
    """Else a power cut could leave points at the server that the spool does not know."""
    server.answers.clear()
    tracker = open_tracker()
    log(tracker, 1)
    assert server.asked.acquire(timeout=60)
    storage_answers = threading.Event()
    real_fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (storage_answers.wait(60), real_fsync(fd)))
    tracker.metrics({"loss": 0.0}, 2)
    ((path, _),) = spool_files(spool_folder(tmp_path, RUN_ID))
    while b'"step":2' not in path.read_bytes():
        time.sleep(0.01)
    server.answers.set()
    assert not server.asked.acquire(timeout=0.3)
    assert server.steps == [1]
    storage_answers.set()
    assert tracker.flush(60)
    assert server.steps == [1, 2]


def test_a_hanging_server_delays_nobody(open_tracker, server):
    server.answers.clear()
    tracker = open_tracker()
    log(tracker, 1)
    assert server.asked.acquire(timeout=60)  # the thread hangs in the request now
    log(tracker, *range(2, 100))
    assert not tracker.flush(0.05)
    tracker.close()  # returns although the thread does not
    assert server.steps == []


def test_an_unforeseen_error_ends_the_sending_and_not_the_training(open_tracker, server, tmp_path, caplog):
    server.send = lambda batch: {}["bug"]
    tracker = open_tracker()
    log(tracker, 1)
    assert not tracker.flush(60)
    assert "tracking sync" in caplog.text
    log(tracker, 2)
    assert read_history(tmp_path, RUN_ID).points == {"loss": [(1, 0.0), (2, 0.0)]}


def test_a_successor_ends_the_sending(open_tracker, server, tmp_path, caplog):
    tracker = open_tracker(lease=1)
    log(tracker, 1)
    assert tracker.flush(60)
    successor = Spool(spool_folder(tmp_path, RUN_ID), lease=2)
    log(tracker, 2)
    assert not tracker.flush(60)
    assert "taken over" in caplog.text
    assert server.steps == [1]
    successor.close()
