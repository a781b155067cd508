"""SIGKILL of any worker at any step: the run that follows has the same bits, and computes the same losses again.

As a script, a run whose workers are killed again and again, at steps and code points that a seed chooses:
test_kills.py FOLDER RECIPE SEED KILLS prints what it did as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import small_run as small

from resnet_dist.storage.folder import FolderStorage
from resnet_dist.tracking.tracker import Tracker
from resnet_dist.training.checkpoint_manager import newest_step
from resnet_dist.training.context import LocalContext
from resnet_dist.training.loop import Trainer

pytestmark = pytest.mark.system

PLAN = replace(small.PLAN, save_every_epochs=1000, save_every_steps=3)
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


class PointsFile(Tracker):
    """Points of the curves, appended to one file so that they outlive their writer."""

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


def work(rank: int, world_size: int, folder: Path, name: str, kill: Kill | None) -> None:
    context = LocalContext(FolderStorage(folder / "run"), rank=rank, world_size=world_size)
    points = PointsFile(folder / ("points.jsonl" if rank == 0 else "others.jsonl"))
    config = small.recipe("fp32", "exact", **small.RECIPES[name])
    trainer = small.trainer_of(folder, config, PLAN, context=context, tracker=points)
    if kill is not None and kill.rank == rank:
        arm(trainer, kill)
    trainer.restore()
    assert trainer.fit().outcome == "finished"
    trainer.checkpoints.wait()
    if rank == 0:
        (folder / "weights").write_text(small.digest(trainer.state.state_dict()))


def main(folder: Path, name: str, seed: int, num_kills: int) -> None:
    dice, lives = random.Random(seed), []
    (folder / "run").mkdir(parents=True)
    for number in range(num_kills):
        resumed_at = newest_step(FolderStorage(folder / "run"))
        if resumed_at == PLAN.last_step:
            break
        world_size, place = dice.randint(1, 3), dice.choice(list(PLACES))
        rank = 0 if place.startswith("checkpoint") else dice.randrange(world_size)
        kill = Kill(rank, dice.randrange(resumed_at, min(resumed_at + 5, PLAN.last_step)), place)
        codes = small.run_group(folder / f"store-{number}", world_size, work, folder, name, kill)
        lives.append({"from": resumed_at, "workers": world_size, **asdict(kill), "codes": codes})
        assert codes[kill.rank] == -signal.SIGKILL, lives
    world_size = 1 if num_kills == 0 else dice.randint(1, 3)
    codes = small.run_group(folder / f"store-{num_kills}", world_size, work, folder, name, None)
    assert codes == [0] * world_size, codes
    print(json.dumps({"lives": lives, "weights": (folder / "weights").read_text()}))


def played(folder: Path, name: str, seed: int, num_kills: int) -> dict[str, Any]:
    command = [sys.executable, __file__, str(folder), name, str(seed), str(num_kills)]
    done = subprocess.run(command, check=True, timeout=280, stdout=subprocess.PIPE, text=True)
    story: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return story


def points(folder: Path) -> list[tuple[int, dict[str, float]]]:
    return [tuple(json.loads(line)) for line in (folder / "points.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "seed"),
    [("eight micro-batches", 1), *(pytest.param("everything", seed, marks=pytest.mark.slow) for seed in (2, 3, 4))],
)
def test_a_run_killed_up_to_eight_times_ends_with_the_same_bits(tmp_path: Path, name: str, seed: int) -> None:
    """Groups of one to three workers; `everything` is a recipe with everything optional."""
    undisturbed = played(tmp_path / "undisturbed", name, seed, 0)
    story = played(tmp_path / "killed", name, seed, 8)
    # Fewer only if the last to fall was not the one that writes, which had the last step whole by then.
    assert len(story["lives"]) == 8 or (len(story["lives"]) >= 4 and story["lives"][-1]["rank"] != 0), story
    assert story["weights"] == undisturbed["weights"], story
    expected: dict[int, dict[str, float]] = {}
    for step, values in points(tmp_path / "undisturbed"):
        expected.setdefault(step, {}).update(values)
    assert len(expected) == 12
    found = points(tmp_path / "killed")
    assert {step for step, _ in found} == set(expected)
    assert len(found) > len(points(tmp_path / "undisturbed"))  # some steps were done again
    for step, values in found:
        assert values.items() <= expected[step].items()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
