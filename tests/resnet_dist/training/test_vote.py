"""A request that one worker hears of is granted by all after the same step, before the next point of the curves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from resnet_dist.training.collectives import Vote

SCRIPT = Path(__file__).with_name("stopping_process.py")


def test_alone_a_request_is_granted_at_once() -> None:
    vote = Vote()
    assert [vote.cast(stop=stop, save=not stop) for stop in (False, True)] == [(False, True), (True, False)]


def test_all_workers_stop_one_step_after_one_was_asked(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(tmp_path), str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    ends: list[Any] = [json.loads(worker.communicate(timeout=120)[0].splitlines()[-1]) for worker in workers]
    assert ends == [{"outcome": "stopped", "step": 3, "saved": 3}] * 2
