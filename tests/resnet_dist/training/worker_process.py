"""Small runs with data in memory: their parts, and groups of real workers (gloo) one after the other.

Usage: worker_process.py FOLDER GROUPS, where GROUPS is a JSON list of {"workers": ..., "legs": [...]}, see `Leg`.

Workers are forked: they need not import all of PyTorch one by one. Until then this process must not compute anything,
since a fork has none of its parent's threads.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from resnet_dist.config.recipe import Recipe
from resnet_dist.data.batch import Batch
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.tracking.tracker import Tracker
from resnet_dist.training.checkpoint import Identity
from resnet_dist.training.context import LocalContext, TrainingJob
from resnet_dist.training.feed import Samples
from resnet_dist.training.loop import Trainer
from resnet_dist.training.schedule import RunPlan

NUM_TRAIN, NUM_VAL, SIZE = 100, 37, 8
PLAN = RunPlan(
    steps_per_epoch=4,
    total_steps=12,
    last_step=12,
    eval_every_epochs=1,
    save_every_epochs=1,
    save_every_steps=None,
    log_every_steps=1,
)
"""Three epochs of four steps, everything logged and saved as often as possible."""

PARTS: dict[str, dict[str, Any]] = {
    "train": {
        "loss": {"kind": "bce", "target_threshold": 0.2},
        "label_smoothing": 0.1,
        "ema": {"decay": 0.8, "every_steps": 2, "start_epochs": 0.5},
        "bn_statistics_steps": 2,
    },
    "data": {"augmentation_repeats": 3, "mixing": {"mixup_alpha": 0.2, "cutmix_alpha": 1.0}},
    "model": {"drop_path": 0.1, "dropout": 0.1},
    "optim": {"clip_grad_norm": 0.5},
    "schedule": {"kind": "plateau", "patience": 1, "warmup": {"epochs": 0.5, "start_factor": 0.1, "shape": "constant"}},
}
"""Everything optional in one recipe."""
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": PARTS,
    "bf16 gradients": {"train": {"gradient_compression": "bf16"}},
    "powersgd": {"train": {"gradient_compression": "powersgd"}},
    "eight micro-batches": {"train": {"micro_batch_size": 3}},
}
"""Of six micro-batches a step, if the name does not say otherwise."""


class Leg(NamedTuple):
    """A part of a run: one group of workers trains it and stops after `until_step`."""

    run: str
    """The folder of the run. A leg resumes what is there."""
    number: int
    recipe: str
    precision: str
    reduction: str
    until_step: int


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
            shown, copies = ids % len(self.labels), ids // len(self.labels)
            images = np.stack(
                [np.roll(self.images[i], epoch + copy, axis=0) for i, copy in zip(shown, copies, strict=True)]
            )
            yield Batch(torch.from_numpy(images), torch.from_numpy(self.labels[shown]), shown)


class Points(Tracker):
    """Keeps the points of the curves."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.rows.append((step, dict(values)))


def recipe(precision: str, reduction: str, **sections: dict[str, Any]) -> Recipe:
    """`sections` are added to the recipe's own; a schedule replaces it."""
    tree: dict[str, Any] = {
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
    for name, section in sections.items():
        tree[name] = section if name == "schedule" else tree[name] | section
    return Recipe.model_validate(tree)


def train(folder: Path, rank: int, world_size: int, config: Recipe, until_step: int) -> dict[str, Any]:
    """One leg of the run in `folder`, in this process."""
    ctx = LocalContext(FolderStorage(folder), rank=rank, world_size=world_size)
    points = Points()
    train, val = Memory(NUM_TRAIN, config.train.micro_batch_size, seed=1), Memory(NUM_VAL, 10, seed=2)
    job = TrainingJob(config, PLAN, Identity("r", "d"), folder, folder, loader_threads=1)
    trainer = Trainer(job, ctx, points, Samples(train, NUM_TRAIN), Samples(val, NUM_VAL))
    asked_at = until_step if world_size == 1 else until_step - 1  # several workers stop one step after they are asked
    ctx.stop_requested = lambda: trainer.state.step >= asked_at  # type: ignore[method-assign]
    trainer.restore()
    result = trainer.fit()
    trainer.checkpoints.wait()
    return {
        "outcome": result.outcome,
        "losses": [row["train/loss"] for _, row in points.rows if "train/loss" in row],
        "evaluations": [row for _, row in points.rows if "val/loss" in row],
        "weights": digest(trainer.state.state_dict()),
        "train": train.given,
        "val": val.given,
    }


def digest(state: Any) -> str:
    """Of all bits of a checkpoint's state."""
    if isinstance(state, torch.Tensor):
        return hashlib.sha256(state.detach().cpu().numpy().tobytes()).hexdigest()
    if isinstance(state, dict):
        state = {key: digest(value) for key, value in state.items()}
    elif isinstance(state, list):
        state = [digest(value) for value in state]
    return hashlib.sha256(repr(state).encode()).hexdigest()


def worker(folder: Path, store: Path, rank: int, world_size: int, legs: list[Leg]) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    for leg in legs:
        place = folder / leg.run
        place.mkdir(exist_ok=True)
        config = recipe(leg.precision, leg.reduction, **RECIPES[leg.recipe])
        result = train(place, rank, world_size, config, leg.until_step)
        (place / f"leg{leg.number}-rank{rank}.json").write_text(json.dumps(result))
    if world_size > 1:
        dist.destroy_process_group()


def main(folder: Path, groups: list[dict[str, Any]]) -> None:
    fork = multiprocessing.get_context("fork")
    for number, group in enumerate(groups):
        store, world_size, legs = folder / f"store-{number}", group["workers"], [Leg(*leg) for leg in group["legs"]]
        workers = [
            fork.Process(target=worker, args=(folder, store, rank, world_size, legs), daemon=True)
            for rank in range(world_size)
        ]
        for process in workers:
            process.start()
        for process in workers:
            process.join(200)
        if any(process.exitcode != 0 for process in workers):
            raise SystemExit(f"group {number}: exit codes {[process.exitcode for process in workers]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
