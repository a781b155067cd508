"""Small runs with data in memory: their recipe, their trainer, and groups of real workers (gloo)."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import cycle
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from resnet_dist.config.recipe import Recipe, TrainConfig
from resnet_dist.data.batch import Batch
from resnet_dist.data.loader import Numbers
from resnet_dist.data.order import ClassSampling, sampling_weights
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.tracking.tracker import Tracker
from resnet_dist.training.checkpoint import CheckpointMetadata, Identity, checkpoint_name, write_checkpoint
from resnet_dist.training.context import LocalContext, TrainingJob
from resnet_dist.training.feed import OpenSplit
from resnet_dist.training.loop import Trainer
from resnet_dist.training.schedule import RunPlan

NUM_TRAIN, NUM_VAL, SIZE = 100, 37, 8
CLASSES = ("ant", "bee", "cat", "dog")
IDENTITY = Identity("recipe", "data", ("ant", "bee"))
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
        "loss": {"kind": "bce", "target_threshold": 0.2, "class_weights": [1, 3, 0.5, 1]},
        "label_smoothing": 0.1,
        "ema": {"decay": 0.8, "every_steps": 2, "start_epochs": 0.5},
        "bn_statistics_steps": 2,
    },
    "data": {
        "augmentation_repeats": 3,
        "mixing": {"mixup_alpha": 0.2, "cutmix_alpha": 1.0},
        "sampling": {"kind": "weighted", "weights": {"ant": 20.0, "dog": 0.3}},
    },
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
    "fine-tuning": {
        "optim": {"freeze": ["stem", "layer1"], "lr_factors": {"layer2": 0.5}, "layer_decay": 0.8},
        "train": {"ema": {"decay": 0.8}, "early_stop": {"metric": "val/loss", "patience": 9}},
        "model": {"drop_path": 0.1, "dropout": 0.1},
    },
    "one batch": {"data": {"overfit_batch": True}},
    "frozen statistics": {"train": {"freeze_bn_statistics": True}},
    "cooldown": {
        "fork": {"checkpoint": "parent", "schedule": "cooldown", "cooldown": 0.75, "step": 4},
        "train": {"ema": {"decay": 0.8}, "bn_statistics_steps": 2},
    },
}
"""Of six micro-batches a step, if the name does not say otherwise."""


class Memory:
    """A loader over images in memory; records which samples it gave."""

    def __init__(self, num_samples: int, batch_size: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.labels = random.integers(0, 4, num_samples)
        noise = random.integers(0, 96, (num_samples, SIZE, SIZE, 3))
        self.images = (noise + 40 * self.labels[:, None, None, None]).astype(np.uint8)
        self.batch_size = batch_size
        self.given: list[list[int]] = []

    def epoch(
        self,
        epoch: int,
        sample_ids: NDArray[np.int64],
        *,
        sizes: Sequence[int] | None = None,
        numbers: Numbers | None = None,
    ) -> Generator[Batch, None, None]:
        start = 0
        for index, size in enumerate(cycle(sizes or [self.batch_size])):
            ids = sample_ids[start : start + size]
            if not len(ids):
                return
            start += size
            self.given += [ids[i : i + self.batch_size].tolist() for i in range(0, len(ids), self.batch_size)]
            shown, copies = ids % len(self.labels), ids // len(self.labels)
            images = np.stack(
                [np.roll(self.images[i], epoch + copy, axis=0) for i, copy in zip(shown, copies, strict=True)]
            )
            drawn = torch.from_numpy(numbers(index) if numbers else np.zeros(0, np.int64))
            yield Batch(torch.from_numpy(images), torch.from_numpy(self.labels[shown]), shown, numbers=drawn)


class Points(Tracker):
    """Keeps the points of the curves."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.rows.append((step, dict(values)))

    def losses(self) -> dict[int, float]:
        """By step."""
        return {step: row["train/loss"] for step, row in self.rows if "train/loss" in row}


def recipe(precision: str = "fp32", reduction: str = "fast", **sections: dict[str, Any]) -> Recipe:
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
        tree[name] = section if name == "schedule" else tree.get(name, {}) | section
    return Recipe.model_validate(tree)


def train_config(**changes: object) -> TrainConfig:
    return TrainConfig.model_validate({"global_batch_size": 8, "micro_batch_size": 4, "total_epochs": 1, **changes})


def trainer_of(
    folder: Path,
    config: Recipe,
    plan: RunPlan = PLAN,
    *,
    context: LocalContext | None = None,
    tracker: Tracker | None = None,
    train: Memory | None = None,
    val: Memory | None = None,
    recompute_activations: bool = False,
    micro_batches_per_launch: int | None = None,
    save_every_s: float | None = None,
) -> Trainer:
    """One worker's trainer of the run in `folder`, by default the only worker's."""
    train = train or Memory(NUM_TRAIN, config.train.micro_batch_size, seed=1)
    val = val or Memory(NUM_VAL, 10, seed=2)
    job = TrainingJob(
        config,
        plan,
        IDENTITY,
        folder,
        folder,
        loader_threads=1,
        recompute_activations=recompute_activations,
        micro_batches_per_launch=micro_batches_per_launch,
        save_every_s=save_every_s,
    )
    context = context or LocalContext(FolderStorage(folder))
    sampling = None
    if config.data.sampling is not None:
        counts = np.bincount(train.labels, minlength=len(CLASSES)).tolist()
        sampling = ClassSampling(train.labels, sampling_weights(config.data.sampling, CLASSES, counts), config.seed)
    splits = OpenSplit(train, NUM_TRAIN, sampling=sampling), OpenSplit(val, NUM_VAL)
    return Trainer(job, context, tracker or Points(), *splits)


def trained(
    folder: Path,
    config: Recipe,
    *,
    plan: RunPlan = PLAN,
    until_step: int = 12,
    rank: int = 0,
    world_size: int = 1,
    micro_batches_per_launch: int | None = None,
) -> tuple[Trainer, dict[str, Any]]:
    """Trains the run in `folder` from where it is until after `until_step`: the trainer, and what happened as JSON."""
    context, points = LocalContext(FolderStorage(folder), rank=rank, world_size=world_size), Points()
    train, val = Memory(NUM_TRAIN, config.train.micro_batch_size, seed=1), Memory(NUM_VAL, 10, seed=2)
    trainer = trainer_of(
        folder,
        config,
        plan,
        context=context,
        tracker=points,
        train=train,
        val=val,
        micro_batches_per_launch=micro_batches_per_launch,
    )
    asked_at = until_step if world_size == 1 else until_step - 1  # several workers stop one step after they are asked
    context.stop_requested = lambda: trainer.state.step >= asked_at  # type: ignore[method-assign]
    trainer.restore()
    trainer.fit()
    trainer.checkpoints.wait()
    return trainer, {
        "losses": list(points.losses().values()),
        "evaluations": [row for _, row in points.rows if "val/loss" in row],
        "weights": digest(trainer.state.state_dict()),
        "train": train.given,
        "val": val.given,
    }


def digest(state: Any) -> str:
    """Of all bits of a checkpoint's state."""
    if isinstance(state, torch.Tensor):
        return hashlib.sha256(state.detach().cpu().numpy().tobytes()).hexdigest()
    if isinstance(state, Mapping):
        state = {key: digest(value) for key, value in state.items()}
    elif isinstance(state, list):
        state = [digest(value) for value in state]
    return hashlib.sha256(repr(state).encode()).hexdigest()


def save(run_dir: Path, step: int, *, identity: Identity = IDENTITY, **metrics: float) -> Path:
    """A small checkpoint of ten steps an epoch."""
    directory = run_dir / checkpoint_name(step // 10, step)
    directory.mkdir(parents=True)
    metadata = CheckpointMetadata(step // 10, step, identity, {"seed": 1}, metrics, files={})
    write_checkpoint(directory, state={"net": {"w": torch.arange(3.0)}, "step": step}, metadata=metadata)
    return directory


def run_group(store: Path, world_size: int, work: Callable[..., None], *args: Any) -> list[int | None]:
    """Calls work(rank, world_size, *args) in a group of workers. As soon as one is gone, so are the others, as in Ray.

    Returns their exit codes. Workers are forked, so that they need not import all of PyTorch one by one. Until then
    this process must not compute anything, since a fork has none of its parent's threads.
    """
    fork = multiprocessing.get_context("fork")
    arguments = [(store, rank, world_size, work, args) for rank in range(world_size)]
    workers = [fork.Process(target=_work, args=each, daemon=True) for each in arguments]
    for process in workers:
        process.start()
    running = {process.sentinel: process for process in workers}
    while running:
        ended = [running.pop(sentinel) for sentinel in wait(list(running), timeout=200)]  # type: ignore[call-overload]
        for process in ended:
            process.join(30)
        if not ended or any(process.exitcode != 0 for process in ended):
            for process in workers:
                process.kill()
            break
    for process in workers:
        process.join(30)
    return [process.exitcode for process in workers]


def _work(store: Path, rank: int, world_size: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    work(rank, world_size, *args)
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()
