from __future__ import annotations

import os
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.tracking.spool import Spool
from resnet_dist.tracking.sync import Delivery, Point, Unavailable
from resnet_dist.tracking.tracker import Sender, backoff_s


class Line:
    """A server behind a line that can be cut, and that can hang."""

    def __init__(self):
        self.up = threading.Event()
        self.up.set()
        self.hangs = threading.Event()
        self.asked = threading.Semaphore(0)
        self.steps = []

    def newest_steps(self):
        return {}

    def send(self, batch):
        self.asked.release()
        if self.hangs.is_set():
            self.hangs_until.wait(60)
        if not self.up.is_set():
            raise Unavailable("connection refused")
        self.steps += [item.step for item in batch if isinstance(item, Point)]


def sender_of(spool, line):
    return Sender(spool, Delivery(spool.path.parent, line, spool.is_newest))


@pytest.fixture
def line():
    line = Line()
    line.hangs_until = threading.Event()
    yield line
    line.hangs_until.set()


@pytest.fixture
def spool(tmp_path):
    spool = Spool(tmp_path, sync_every_s=0.01)
    yield spool
    spool.close(30)


@given(st.integers(1, 10**6), st.floats(0, 1, exclude_max=True))
def test_the_pause_grows_to_its_limit_and_is_spread(num_failures, draw):
    pause_s = backoff_s(num_failures, draw, max_backoff_s=30.0)
    whole = min(30.0, 0.5 * 2.0 ** min(num_failures - 1, 20))
    assert whole / 2 <= pause_s <= whole


def test_all_arrives_in_order(spool, line):
    sender = sender_of(spool, line)
    for step in range(1, 3001):
        spool.append_metrics({"loss": 0.0}, step)
    assert spool.persist(60)
    assert sender.drain(60)
    assert line.steps == list(range(1, 3001))
    sender.close(30)


def test_an_outage_is_waited_out(spool, line):
    line.up.clear()
    sender = sender_of(spool, line)
    for step in range(1, 11):
        spool.append_metrics({"loss": 0.0}, step)
    for _ in range(2):
        assert line.asked.acquire(timeout=60)
    assert not sender.drain(0.05)
    line.up.set()
    assert sender.drain(60)
    assert line.steps == list(range(1, 11))
    sender.close(30)


def test_nothing_is_sent_before_storage_has_it(spool, line, monkeypatch):
    """Else a power cut could leave points at the server that the spool does not know, and log their steps again."""
    line.hangs.set()
    sender = sender_of(spool, line)
    spool.append_metrics({"loss": 0.0}, 1)
    assert spool.persist(60)
    assert line.asked.acquire(timeout=60)
    storage_answers = threading.Event()
    real_fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (storage_answers.wait(60), real_fsync(fd)))
    spool.append_metrics({"loss": 0.0}, 2)
    while b'"step":2' not in spool.path.read_bytes():
        time.sleep(0.01)
    line.hangs.clear()
    line.hangs_until.set()
    assert not line.asked.acquire(timeout=0.3)
    assert line.steps == [1]
    storage_answers.set()
    assert spool.persist(60)
    assert sender.drain(60)
    assert line.steps == [1, 2]
    sender.close(30)


def test_a_hanging_server_holds_up_nobody(spool, line):
    line.hangs.set()
    sender = sender_of(spool, line)
    spool.append_metrics({"loss": 0.0}, 1)
    assert line.asked.acquire(timeout=60)  # the thread hangs in the request now
    for step in range(2, 100):
        spool.append_metrics({"loss": 0.0}, step)
    assert spool.persist(60)
    assert not sender.drain(0.05)
    sender.close(0.05)  # returns although the thread does not
    assert line.steps == []


def test_an_unforeseen_error_ends_the_sender_and_not_the_training(spool, line, caplog):
    line.send = lambda batch: {}["bug"]
    sender = sender_of(spool, line)
    spool.append_metrics({"loss": 0.0}, 1)
    assert spool.persist(60)
    assert not sender.drain(60)
    assert "tracking sync" in caplog.text
    spool.append_metrics({"loss": 0.0}, 2)
    assert spool.persist(60)
    sender.close(30)


def test_a_successor_ends_the_sender(spool, line, tmp_path, caplog):
    sender = sender_of(spool, line)
    spool.append_metrics({"loss": 0.0}, 1)
    assert spool.persist(60)
    assert sender.drain(60)
    successor = Spool(tmp_path)
    spool.append_metrics({"loss": 0.0}, 2)
    assert spool.persist(60)
    assert not sender.drain(60)
    assert "taken over" in caplog.text
    assert line.steps == [1]
    successor.close(30)
    sender.close(30)


def test_a_backlog_of_an_earlier_attempt_is_sent_first(line, tmp_path):
    old = Spool(tmp_path)
    for step in (1, 2, 3):
        old.append_metrics({"loss": 0.0}, step)
    old.close(30)
    new = Spool(tmp_path)
    sender = sender_of(new, line)
    assert sender.drain(60)
    assert line.steps == [1, 2, 3]
    new.append_metrics({"loss": 0.0}, 4)
    assert new.persist(60)
    assert sender.drain(60)
    assert line.steps == [1, 2, 3, 4]
    new.close(30)
    sender.close(30)
