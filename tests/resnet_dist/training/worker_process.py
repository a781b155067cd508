"""One worker of a small run as a process of its own: gloo over a file, data in memory. Started by test_invariance.py.

Usage: worker_process.py FOLDER RANK WORLD_SIZE PRECISION REDUCTION MAX_STEPS; writes FOLDER/rank<R>.json.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Generator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from resnet_dist.config.recipe import Recipe
from resnet_dist.data.batch import Batch
from resnet_dist.training.assemble import assemble, restore
from resnet_dist.training.checkpoint import Identity
from resnet_dist.training.context import LocalContext
from resnet_dist.training.job import Job
from resnet_dist.training.loop import Samples, fit
from resnet_dist.training.plan import RunPlan

NUM_TRAIN, NUM_VAL, SIZE = 100, 37, 8


class Memory:
    """A loader over images in memory; notes what it gave out."""

    def __init__(self, num_samples: int, batch_size: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.labels = random.integers(0, 4, num_samples)
        noise = random.integers(0, 96, (num_samples, SIZE, SIZE, 3))
        self.images = (noise + 40 * self.labels[:, None, None, None]).astype(np.uint8)
        self.batch_size = batch_size
        self.given: list[list[int]] = []

    def epoch(self, epoch: int, sample_ids: NDArray[np.int64]) -> Generator[Batch, None, None]:
        for start in range(0, len(sample_ids), self.batch_size):
            ids = sample_ids[start : start + self.batch_size]
            self.given.append(ids.tolist())
            images = np.roll(self.images[ids], epoch, axis=1)
            yield Batch(torch.from_numpy(images), torch.from_numpy(self.labels[ids]), ids)


class Points:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.rows.append((step, dict(values)))


def recipe(precision: str, reduction: str) -> Recipe:
    tree = {
        "seed": 5,
        "model": {"name": "resnet20", "num_classes": 4},
        "data": {
            "dataset": "memory",
            "train": {"kind": "pad_crop", "size": SIZE},
            "eval": {"kind": "center_crop", "size": SIZE, "resize": SIZE},
            "mean": [100, 100, 100],
            "std": [60, 60, 60],
        },
        "train": {"global_batch_size": 24, "micro_batch_size": 4, "total_epochs": 3, "precision": precision}
        | {"reduction": reduction},
        "optim": {"name": "sgd", "lr": 0.05, "weight_decay": 1e-4},
        "schedule": {"kind": "cosine", "warmup": {"epochs": 1}},
        "eval": {"batch_size": 10},
    }
    return Recipe.model_validate(tree)


def main(folder: Path, rank: int, world_size: int, precision: str, reduction: str, max_steps: int) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    plan = RunPlan(4, 12, max_steps, 1, 1, None, log_every_steps=1)
    ctx = LocalContext(folder, rank=rank, world_size=world_size)
    points, config = Points(), recipe(precision, reduction)
    train, val = Memory(NUM_TRAIN, 4, seed=1), Memory(NUM_VAL, 10, seed=2)
    job = Job(config, plan, Identity("r", "d"), folder, folder, loader_threads=1)
    run = assemble(job, ctx, points, Samples(train, NUM_TRAIN), Samples(val, NUM_VAL))
    restore(run)
    outcome = fit(run)
    losses = [row["train/loss"] for _, row in points.rows if "train/loss" in row]
    evaluations = [row for _, row in points.rows if "val/loss" in row]
    weights = hashlib.sha256(b"".join(v.numpy().tobytes() for v in run.state.net.state_dict().values())).hexdigest()
    result = {
        "weights": weights,
        "outcome": outcome,
        "losses": losses,
        "evaluations": evaluations,
        "train": train.given,
        "val": val.given,
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5], int(sys.argv[6]))
