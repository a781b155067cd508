"""One of two workers, of which only rank 1 is asked to save and to stop. Used by test_vote.py.

Usage: stopping_process.py FOLDER RANK SAVE_AT STOP_AT. Prints outcome, step and the steps of all checkpoints as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from worker_process import NUM_TRAIN, NUM_VAL, Memory, Points, recipe

from resnet_dist.storage.folder import FolderStorage
from resnet_dist.training.checkpoint import Identity, step_of
from resnet_dist.training.context import LocalContext, TrainingJob
from resnet_dist.training.feed import Samples
from resnet_dist.training.loop import Trainer
from resnet_dist.training.schedule import RunPlan

PLAN = RunPlan(
    steps_per_epoch=4,
    total_steps=12,
    last_step=12,
    eval_every_epochs=2,
    save_every_epochs=99,
    save_every_steps=None,
    log_every_steps=1000,
)


def main(folder: Path, rank: int, save_at: int, stop_at: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ctx = LocalContext(FolderStorage(folder), rank=rank, world_size=2)
    job = TrainingJob(recipe("fp32", "fast"), PLAN, Identity("r", "d"), folder, folder, loader_threads=1)
    train, val = Memory(NUM_TRAIN, 4, seed=1), Memory(NUM_VAL, 10, seed=2)
    trainer = Trainer(job, ctx, Points(), Samples(train, NUM_TRAIN), Samples(val, NUM_VAL))
    # As in a real run, a request to save lasts until the next checkpoint.
    ctx.save_requested = lambda: (  # type: ignore[method-assign]
        rank == 1 and trainer.state.step >= save_at > trainer.checkpoints.saved_step
    )
    ctx.stop_requested = lambda: rank == 1 and trainer.state.step >= stop_at  # type: ignore[method-assign]
    result = trainer.fit()
    dist.barrier()
    saved = sorted(step for name in ctx.storage.names() if (step := step_of(name)) is not None)
    print(json.dumps({"outcome": result.outcome, "step": result.step, "saved": saved}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
