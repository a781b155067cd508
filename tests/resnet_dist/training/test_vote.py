"""A request that one worker sees is followed by all after the same step, before the next point of the curves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from resnet_dist.training.collectives import Vote

pytestmark = pytest.mark.system

SCRIPT = Path(__file__).with_name("stopping_process.py")


def test_alone_a_request_is_granted_at_once() -> None:
    vote = Vote()
    assert [vote.cast(stop=stop, save=not stop) for stop in (False, True)] == [(False, True), (True, False)]


@pytest.mark.parametrize(
    ("save_at", "stop_at", "saved"),
    [
        pytest.param(99, 2, [3], id="a stop between two points of the curves"),
        pytest.param(2, 5, [3, 6], id="a checkpoint on request, once"),
        pytest.param(99, 8, [8], id="a stop after an evaluation, for which all wait"),
    ],
)
def test_all_workers_do_what_one_is_asked_after_the_same_step(
    tmp_path: Path, save_at: int, stop_at: int, saved: list[int]
) -> None:
    arguments = [str(save_at), str(stop_at)]
    workers = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(tmp_path), str(rank), *arguments], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    ends: list[Any] = [json.loads(worker.communicate(timeout=120)[0].splitlines()[-1]) for worker in workers]
    assert ends == [{"outcome": "stopped", "step": saved[-1], "saved": saved}] * 2
