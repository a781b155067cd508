"""A request that one worker sees is followed by all after the same step, before the next point of the curves.

As a script, the runs of CASES by two workers: test_vote.py FOLDER.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import small_run as small
import torch.distributed as dist

from resnet_dist.storage.folder import FolderStorage
from resnet_dist.training.checkpoint import step_of
from resnet_dist.training.collectives import Vote
from resnet_dist.training.context import LocalContext

pytestmark = pytest.mark.system

PLAN = replace(small.PLAN, eval_every_epochs=2, save_every_epochs=99, log_every_steps=1000)
CASES = {
    "a stop between two points of the curves": (99, 2, [3]),
    "a checkpoint on request, once": (2, 5, [3, 6]),
    "a stop after an evaluation, for which all wait": (99, 8, [8]),
}
"""The steps at which rank 1 is asked to save and to stop, and the steps of the checkpoints."""


def train(rank: int, world_size: int, folder: Path, save_at: int, stop_at: int) -> None:
    """One worker's part of a run. Only rank 1 is asked to save and to stop."""
    context = LocalContext(FolderStorage(folder), rank=rank, world_size=world_size)
    trainer = small.trainer_of(folder, small.recipe(), PLAN, context=context)
    # As in a real run, a request to save lasts until the next checkpoint.
    trainer.checkpoints.due_by_clock = lambda: (  # type: ignore[method-assign]
        rank == 1 and trainer.state.step >= save_at > trainer.checkpoints.saved_step
    )
    context.stop_requested = lambda: rank == 1 and trainer.state.step >= stop_at  # type: ignore[method-assign]
    result = trainer.fit()
    dist.barrier()
    saved = sorted(step for name in context.storage.names() if (step := step_of(name)) is not None)
    found = {"outcome": result.outcome, "step": result.step, "saved": saved}
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    subprocess.run([sys.executable, __file__, str(folder)], check=True, timeout=280)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_all_workers_do_what_one_is_asked_after_the_same_step(runs: Path, name: str) -> None:
    saved = CASES[name][2]
    for rank in range(2):
        found = json.loads((runs / name / f"rank{rank}.json").read_text())
        assert found == {"outcome": "stopped", "step": saved[-1], "saved": saved}


def test_alone_a_request_is_granted_at_once() -> None:
    vote = Vote()
    assert [vote.cast(stop=stop, save=not stop) for stop in (False, True)] == [(False, True), (True, False)]


if __name__ == "__main__":
    for name, (save_at, stop_at, _) in CASES.items():
        run = Path(sys.argv[1]) / name
        run.mkdir()
        assert small.run_group(run / "store", 2, train, run, save_at, stop_at) == [0, 0]
