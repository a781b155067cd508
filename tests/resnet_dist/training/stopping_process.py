"""One of two workers, of which one is asked to stop in the middle of a window: used by test_agreement.py.

Usage: stopping_process.py FOLDER RANK. Prints outcome and step as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from worker_process import NUM_TRAIN, NUM_VAL, Memory, Points, recipe

from resnet_dist.storage.folder import FolderStorage
from resnet_dist.training.checkpoint import Identity
from resnet_dist.training.context import Job, LocalContext
from resnet_dist.training.feed import Samples
from resnet_dist.training.loop import fit
from resnet_dist.training.schedule import RunPlan
from resnet_dist.training.trainer import assemble

ASKED_AT_STEP = 2


class Asked(LocalContext):
    """Rank 1 hears of the wish to stop once it has trained for two steps; rank 0 never does."""

    num_calls = 0

    def stop_requested(self) -> bool:
        self.num_calls += 1
        return self.rank == 1 and self.num_calls >= ASKED_AT_STEP


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ctx = Asked(FolderStorage(folder), rank=rank, world_size=2)
    plan = RunPlan(12, 36, 36, 1, 1, None, log_every_steps=1000)
    job = Job(recipe("fp32", "fast"), plan, Identity("r", "d"), folder, folder, loader_threads=1)
    train, val = Memory(NUM_TRAIN, 4, seed=1), Memory(NUM_VAL, 10, seed=2)
    run = assemble(job, ctx, Points(), Samples(train, NUM_TRAIN), Samples(val, NUM_VAL))
    print(json.dumps({"outcome": fit(run), "step": run.state.step, "saved_step": run.saved_step}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
