"""A run whose workers are killed again and again, at steps and code points that a seed chooses. See test_kills.py.

Usage: killed_process.py FOLDER NAME SEED KILLS. Prints what it did as JSON. NAME: as in worker_process.py.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from worker_process import NUM_TRAIN, NUM_VAL, RECIPES, Memory, digest, recipe
from worker_process import PLAN as EVERY_STEP

from resnet_dist.storage.folder import FolderStorage
from resnet_dist.tracking.tracker import Tracker
from resnet_dist.training.checkpoint import Identity, newest_first, step_of
from resnet_dist.training.context import LocalContext, TrainingJob
from resnet_dist.training.feed import Samples
from resnet_dist.training.loop import Trainer

PLAN = replace(EVERY_STEP, save_every_epochs=1000, save_every_steps=3)
"""Three epochs of four steps; a checkpoint every three steps, most of them in the middle of an epoch."""
PLACES: dict[str, Callable[[Trainer], tuple[Any, str]]] = {
    "before the forward passes": lambda trainer: (trainer.train_step.noise, "set_keys"),
    "before the sum of gradients": lambda trainer: (trainer.train_step.reduction, "finish"),
    "before the update": lambda trainer: (trainer.state.optimizer, "step"),
    "before a checkpoint": lambda trainer: (trainer.ctx, "save_checkpoint"),
    "checkpoint written, not yet named": lambda trainer: (trainer.ctx.storage, "commit"),
}
"""The call that a kill goes before; in the last one rank 0 dies in the call."""


@dataclass(frozen=True)
class Kill:
    rank: int
    step: int
    """Not before this many steps are done."""
    place: str


class Points(Tracker):
    """Appended to one file, so that they outlive their writer."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        kept = {key: value for key, value in values.items() if key == "train/loss" or key.startswith("val/")}
        with self._file.open("a") as opened:
            opened.write(json.dumps([step, kept]) + "\n")


def arm(trainer: Trainer, kill: Kill) -> None:
    """Makes this process die where `kill` says."""
    owner, name = PLACES[kill.place](trainer)
    original = getattr(owner, name)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def call(*args: Any, **keywords: Any) -> Any:
        if trainer.state.step >= kill.step:
            if name != "commit":
                die()
            folder_name, write = args
            return original(folder_name, lambda folder: (write(folder), die()), **keywords)
        return original(*args, **keywords)

    setattr(owner, name, call)


def worker(folder: Path, name: str, store: Path, rank: int, world_size: int, kill: Kill | None) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    ctx = LocalContext(FolderStorage(folder / "run"), rank=rank, world_size=world_size)
    config = recipe("fp32", "exact", **RECIPES[name])
    train, val = Memory(NUM_TRAIN, config.train.micro_batch_size, seed=1), Memory(NUM_VAL, 10, seed=2)
    job = TrainingJob(config, PLAN, Identity("r", "d"), folder, folder, loader_threads=1)
    points = Points(folder / ("points.jsonl" if rank == 0 else "others.jsonl"))
    trainer = Trainer(job, ctx, points, Samples(train, NUM_TRAIN), Samples(val, NUM_VAL))
    if kill is not None and kill.rank == rank:
        arm(trainer, kill)
    trainer.restore()
    assert trainer.fit().outcome == "finished"
    trainer.checkpoints.wait()
    if rank == 0:
        (folder / "weights").write_text(digest(trainer.state.state_dict()))
    if world_size > 1:
        dist.destroy_process_group()


def life(folder: Path, name: str, number: int, world_size: int, kill: Kill | None) -> list[int | None]:
    """One group of workers: as soon as one is gone, so are the others, as Ray has it. Their exit codes."""
    fork = multiprocessing.get_context("fork")
    store = folder / f"store-{number}"
    workers = [
        fork.Process(target=worker, args=(folder, name, store, rank, world_size, kill), daemon=True)
        for rank in range(world_size)
    ]
    for process in workers:
        process.start()
    waiting = {process.sentinel: process for process in workers}
    while waiting:
        ended = [waiting.pop(sentinel) for sentinel in wait(list(waiting), timeout=120)]  # type: ignore[call-overload]
        for process in ended:
            process.join(30)
        if not ended or any(process.exitcode != 0 for process in ended):
            for process in workers:
                process.kill()
            break
    for process in workers:
        process.join(30)
    return [process.exitcode for process in workers]


def main(folder: Path, name: str, seed: int, num_kills: int) -> None:
    dice, lives = random.Random(seed), []
    (folder / "run").mkdir(parents=True)
    for number in range(num_kills):
        newest = newest_first(FolderStorage(folder / "run").names())
        stands = (step_of(newest[0]) or 0) if newest else 0
        if stands == PLAN.last_step:
            break
        world_size, place = dice.randint(1, 3), dice.choice(list(PLACES))
        rank = 0 if place.startswith("checkpoint") else dice.randrange(world_size)
        kill = Kill(rank, dice.randrange(stands, min(stands + 5, PLAN.last_step)), place)
        codes = life(folder, name, number, world_size, kill)
        lives.append({"from": stands, "workers": world_size, **asdict(kill), "codes": codes})
        assert codes[kill.rank] == -signal.SIGKILL, lives
    codes = life(folder, name, num_kills, 1 if num_kills == 0 else dice.randint(1, 3), None)
    assert codes == [0] * len(codes), codes
    print(json.dumps({"lives": lives, "weights": (folder / "weights").read_text()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
