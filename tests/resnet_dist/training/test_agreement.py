"""A wish that one worker hears of is fulfilled by all after the same step, long before the window ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from resnet_dist.training.collectives import Agreement

SCRIPT = Path(__file__).with_name("stopping_process.py")


def test_alone_a_wish_holds_at_once() -> None:
    agreement = Agreement()
    assert [agreement.reached(wish) for wish in (False, True, False)] == [False, True, False]


def test_all_workers_stop_one_step_after_one_was_asked(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(tmp_path), str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    ends = [json.loads(worker.communicate(timeout=120)[0].splitlines()[-1]) for worker in workers]
    assert ends == [{"outcome": "stopped", "step": 3, "saved_step": 3}] * 2
