from __future__ import annotations

import socket

import pytest

from resnet_dist.tracking.connection import first_line, root_reason
from resnet_dist.tracking.sync import Batch, MlflowTransport, Point, Unavailable


def test_the_first_line_without_secrets():
    assert first_line(ValueError("\n  http://me:hunter2@host is bad\nmore")) == "http://***@host is bad"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line(ValueError("x" * 5000))) == 300


def test_the_root_is_what_happened_first():
    wrapped = RuntimeError("a long story")
    wrapped.__context__ = OSError("disk full")  # as `raise` inside an `except` leaves it
    assert root_reason(wrapped) == "disk full"
    looped = ValueError("a")
    looped.__cause__ = KeyError("b")
    looped.__cause__.__cause__ = looped
    assert root_reason(looped) == "'b'"


def test_a_dead_server_is_two_words():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    transport = MlflowTransport(f"http://me:hunter2@127.0.0.1:{port}", "a" * 32)
    with pytest.raises(Unavailable, match=r"^Connection refused$"):
        transport.send(Batch(points=(Point("loss", 1.0, 0, 1),)))
    with pytest.raises(Unavailable, match=r"^Connection refused$"):
        transport.newest_steps()
