"""One of two workers, of which one is asked to stop between two points of the curves. Used by test_vote.py.

Usage: stopping_process.py FOLDER RANK. Prints outcome, step and saved step as JSON.
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
from resnet_dist.training.loop import Trainer
from resnet_dist.training.schedule import RunPlan

PLAN = RunPlan(
    steps_per_epoch=12,
    total_steps=36,
    last_step=36,
    eval_every_epochs=1,
    save_every_epochs=1,
    save_every_steps=None,
    log_every_steps=1000,
)
ASKED_AT_STEP = 2


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ctx = LocalContext(FolderStorage(folder), rank=rank, world_size=2)
    job = Job(recipe("fp32", "fast"), PLAN, Identity("r", "d"), folder, folder, loader_threads=1)
    train, val = Memory(NUM_TRAIN, 4, seed=1), Memory(NUM_VAL, 10, seed=2)
    trainer = Trainer(job, ctx, Points(), Samples(train, NUM_TRAIN), Samples(val, NUM_VAL))
    # Only rank 1 hears of the request.
    ctx.stop_requested = lambda: rank == 1 and trainer.state.step >= ASKED_AT_STEP  # type: ignore[method-assign]
    result = trainer.fit()
    print(json.dumps({"outcome": result.outcome, "step": result.step, "saved": trainer.checkpoints.saved_step}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
