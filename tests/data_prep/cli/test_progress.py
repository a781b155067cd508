"""Lines for a log, a bar for a terminal."""

from __future__ import annotations

import sys

import pytest

from data_prep.cli import progress as module
from data_prep.cli.progress import progress_on_stderr


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_lines_come_every_few_seconds_and_at_the_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_on_stderr() as progress:
        progress.encoded(100, 1000, 0, 0, {})  # taken over from an earlier run
        for second in range(1, 10):
            clock.now_s = 100 + second
            by_node = {"one": 75 * second, "two": 25 * second} if second > 5 else {"one": 100 * second}
            progress.encoded(100 + 100 * second, 1000, second * 2_000_000, second // 5, by_node)
        progress.log("a note")
        clock.now_s = 111
        progress.written(1_000_000, 3_000_000, {"one": 1_000_000})
        clock.now_s = 115
        progress.written(2_000_000, 3_000_000, {"one": 2_000_000})
        progress.written(3_000_000, 3_000_000, {"one": 2_600_000, "two": 400_000})
        progress.decoded(5, 9)
        clock.now_s = 121
        progress.decoded(6, 9)
    assert capsys.readouterr().err.splitlines() == [
        # The first unit starts the clock: 400 images in 4 s since.
        "encode: 600/1,000 images, 100 images/s, 2.0 MB/s, 4 s left, 1 bad",
        "encode: 1,000/1,000 images, 100 images/s, 2.0 MB/s, 0 s left, 1 bad, one 72/s; two 28/s",
        "a note",
        "write: 1/3 MB",
        "write: 3/3 MB, 0.5 MB/s, 0 s left, one 0.4 MB/s; two 0.1 MB/s",
        "decode: 6/9 images",
    ]


def test_a_rewritten_file_is_timed_again(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_on_stderr() as progress:
        for step in range(1, 101):
            clock.now_s = 100 + step
            progress.written(step * 64_000_000, None)
        for step in range(1, 12):
            clock.now_s = 200 + 10 * step
            progress.written(step * 64_000_000, 704_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "write: 320 MB, 64.0 MB/s"
    assert lines[20] == "write: 64/704 MB"
    assert lines[-1] == "write: 704/704 MB, 6.4 MB/s, 0 s left"


def test_a_terminal_gets_bars(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_on_stderr() as progress:
        progress.log("a [note]")
        progress.encoded(5, 10, 100, 0, {})
        progress.written(500_000, None)
        assert not progress._bars.tasks[1].finished  # the size is not known yet
        progress.written(1_000_000, 2_000_000)
        progress.decoded(3, 4)
    shown = capsys.readouterr().err
    assert "a [note]" in shown
    for text in ("5/10 images", "1/2 MB", "3/4 images"):
        assert text in shown
