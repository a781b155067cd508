"""A worker without progress ends itself and says where it hung; one with progress is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_dist.training.watchdog import EXIT_CODE

pytestmark = pytest.mark.system

PROGRAM = """
import sys, time
from pathlib import Path
from resnet_dist.training.watchdog import Watchdog

def hang_here():
    time.sleep(60)

watchdog = Watchdog(float(sys.argv[2]), Path(sys.argv[1]) / "stacks" / "rank0.txt")
for _ in range(10):
    time.sleep(0.05)
    watchdog.heartbeat()
if sys.argv[3] == "hang":
    hang_here()
watchdog.close()
"""


def run(folder: Path, limit_s: float, end: str) -> int:
    command = [sys.executable, "-c", PROGRAM, str(folder), str(limit_s), end]
    return subprocess.run(command, timeout=50, check=False).returncode


def test_a_hung_worker_ends_and_leaves_its_stacks(tmp_path: Path) -> None:
    assert run(tmp_path, 5.0, "hang") == EXIT_CODE
    stacks = (tmp_path / "stacks" / "rank0.txt").read_text()
    assert "no progress for" in stacks
    assert "in hang_here" in stacks


def test_a_worker_that_makes_progress_or_has_closed_is_left_alone(tmp_path: Path) -> None:
    assert run(tmp_path, 20.0, "end") == 0
    assert list(tmp_path.iterdir()) == []


def test_a_storage_that_refuses_the_dump_delays_nobody(tmp_path: Path) -> None:
    (tmp_path / "stacks").mkdir()
    os.mkfifo(tmp_path / "stacks" / "rank0.txt")  # opened for writing, it waits for a reader
    assert run(tmp_path, 1.0, "hang") == EXIT_CODE
