"""NaN and infinity in training and in evaluation: the run ends, or goes back and leaves a step out, by recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_run as small
import torch
from numpy.typing import NDArray
from torch.nn import BatchNorm2d

from resnet_dist.data.batch import Batch
from resnet_dist.training.divergence import suspects
from resnet_dist.training.loop import Trainer

BAD_STEP = 6  # the third step of the second epoch
PLAN = replace(small.PLAN, log_every_steps=2, save_first=True)


class NanInTraining(small.Memory):
    """Gives NaN images in one micro-batch of BAD_STEP."""

    def epoch(self, epoch: int, sample_ids: NDArray[np.int64], **options: Any) -> Generator[Batch, None, None]:
        size = small.recipe().train.global_batch_size
        start = 4 * size - len(sample_ids)
        for batch in super().epoch(epoch, sample_ids, **options):
            images = batch.images.float()
            for place in range(len(images)):
                step, image = divmod(4 * size * epoch + start + place, size)
                if step == BAD_STEP and image // self.batch_size == 1:
                    images[place] = math.nan
                    batch.images = images
            start += len(images)
            yield batch


class NanInValidation(small.Memory):
    """Gives NaN images in the second evaluation, and only there."""

    num_epochs = 0

    def epoch(self, epoch: int, sample_ids: NDArray[np.int64], **options: Any) -> Generator[Batch, None, None]:
        self.num_epochs += 1
        for batch in super().epoch(epoch, sample_ids, **options):
            if self.num_epochs == 2:
                batch.images = torch.full(batch.images.shape, math.nan)
            yield batch


def trainer_of(folder: Path, *, nan_in: str = "", **divergence: Any) -> Trainer:
    """A trainer whose recipe handles divergence as `divergence` says, with NaN in "train", "val" or nowhere."""
    train = NanInTraining(small.NUM_TRAIN, 4, seed=1) if nan_in == "train" else None
    val = NanInValidation(small.NUM_VAL, 10, seed=2) if nan_in == "val" else None
    return small.trainer_of(folder, small.recipe(train={"divergence": divergence}), PLAN, train=train, val=val)


def break_step(trainer: Trainer, step: int, breaks: Callable[[], object]) -> None:
    """Calls `breaks` in step number `step`, after its loss was computed and before the update."""
    finish = trainer.train_step.reduction.finish

    def broken() -> None:
        finish()
        if trainer.state.step == step:
            breaks()

    trainer.train_step.reduction.finish = broken  # type: ignore[method-assign]


def break_gradient(trainer: Trainer, step: int) -> None:
    first = next(trainer.state.net.parameters())
    break_step(trainer, step, lambda: first.grad.fill_(math.nan))  # type: ignore[union-attr]


def is_finite(trainer: Trainer) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in trainer.state.net.state_dict().values())


def losses(trainer: Trainer) -> dict[int, float]:
    assert isinstance(trainer.tracker, small.Points)
    return trainer.tracker.losses()


def evaluations(trainer: Trainer) -> dict[int, float]:
    """Step -> loss of every evaluation that the tracker got, each step once."""
    assert isinstance(trainer.tracker, small.Points)
    rows = [(step, row["val/loss"]) for step, row in trainer.tracker.rows if "val/loss" in row]
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def test_stop_ends_the_run_and_saves_nothing_of_it(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, nan_in="train")
    assert trainer.fit().outcome == "diverged"
    assert trainer.checkpoints.saved_step == 4
    assert math.isnan(losses(trainer)[8])


def test_skip_leaves_the_batch_out_and_continues_and_a_resumed_run_remembers(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "run", nan_in="train", action="skip")
    assert trainer.fit().outcome == "finished"
    assert (trainer.state.step, trainer.state.skipped) == (12, {BAD_STEP})
    assert all(math.isfinite(loss) for loss in losses(trainer).values())
    assert is_finite(trainer)
    clean = trainer_of(tmp_path / "clean")
    clean.fit()
    assert {step for step, loss in losses(trainer).items() if loss == losses(clean)[step]} == {2, 4, 6}
    # Or a kill would give back the skips that were used up, and change where the run ends.
    trainer.state.skipped = set()
    trainer.restore()
    assert (trainer.state.step, trainer.state.skipped) == (12, {BAD_STEP})


@pytest.mark.parametrize("step", [5, 6, 7, 11])
def test_an_update_that_breaks_the_weights_is_never_saved(tmp_path: Path, step: int) -> None:
    """Also of the step before a checkpoint (7), and of the last (11): a step's loss does not show its own update."""
    trainer = trainer_of(tmp_path)
    break_gradient(trainer, step)
    assert trainer.fit().outcome == "diverged"
    assert trainer.checkpoints.saved_step == (8 if step == 11 else 4)
    trainer.restore()
    assert is_finite(trainer)


@pytest.mark.parametrize("step", [5, 6, 7, 11])
def test_skip_finds_the_step_whose_update_broke_the_weights(tmp_path: Path, step: int) -> None:
    trainer = trainer_of(tmp_path, action="skip")
    break_gradient(trainer, step)
    assert trainer.fit().outcome == "finished"
    assert trainer.state.step == 12
    assert step in trainer.state.skipped
    assert len(trainer.state.skipped) <= 3
    assert is_finite(trainer)


@pytest.mark.parametrize(
    ("diverged_step", "skipped", "next_step", "expected"),
    [
        (5, set(), 8, {5}),
        (5, {3}, 8, {5}),
        (6, {5}, 8, {4, 6}),
        (7, {4, 5, 6}, 8, {3, 7}),
        (8, set(), 8, {7}),
        (8, {6, 7}, 8, {5}),
        (0, set(), 2, {0}),
        (1, {0}, 2, {1}),
        (2, {0, 1}, 2, set()),
    ],
)
def test_suspects(diverged_step: int, skipped: set[int], next_step: int, expected: set[int]) -> None:
    assert suspects(diverged_step, skipped, next_step) == expected


def test_a_loss_above_the_limit_counts_too_and_skipping_has_a_limit(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "stop", max_loss=1e-3)
    assert (trainer.fit().outcome, trainer.state.step) == ("diverged", 2)
    trainer = trainer_of(tmp_path / "skip", max_loss=1e-3, action="skip", max_skips=3)
    assert (trainer.fit().outcome, trainer.state.skipped) == ("diverged", {0, 1, 2})


def test_nan_in_an_evaluation_ends_the_run_with_a_checkpoint_and_says_so(tmp_path: Path) -> None:
    """The state is finite, so it is saved, and a repeated command evaluates it again before it trains a step."""
    trainer = trainer_of(tmp_path, nan_in="val")
    result = trainer.fit()
    assert (result.outcome, result.step) == ("diverged", 8)
    assert (trainer.checkpoints.saved_step, trainer.state.evaluated_step) == (8, 4)
    assert result.reason == "the evaluation gave NaN or infinity at step 8 (for 37 of 37 samples)"
    assert list(evaluations(trainer)) == [4]
    assert trainer.fit().outcome == "finished"  # the second evaluation is finite


def test_nan_in_an_evaluation_is_skipped_where_the_recipe_says_so(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, nan_in="val", action="skip")
    assert trainer.fit().outcome == "finished"
    assert (trainer.state.step, trainer.state.skipped) == (12, {7})


@pytest.mark.parametrize("action", ["skip", "stop"])
def test_an_evaluation_that_is_done_again_is_reported_once(tmp_path: Path, action: str) -> None:
    """The spool and the ledger keep the first value of a step, so nothing of the repeated one may come before it."""
    trainer = trainer_of(tmp_path, nan_in="val", action=action)
    observed: list[tuple[int, float]] = []
    trainer.ctx.evaluated = lambda step, metrics: observed.append(  # type: ignore[method-assign]
        (step, metrics["val/loss"])
    )
    if action == "stop":
        assert trainer.fit().outcome == "diverged"
    assert trainer.fit().outcome == "finished"
    assert [step for step, _ in observed] == list(evaluations(trainer)) == [4, 8, 12]
    assert all(math.isfinite(loss) for loss in evaluations(trainer).values())
    assert [loss for _, loss in observed] == list(evaluations(trainer).values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_batch_norms_statistics_are_checked_too(tmp_path: Path, value: float) -> None:
    """They are written in training and read in evaluation: no training loss shows them."""
    trainer = trainer_of(tmp_path)
    norm = next(module for module in trainer.state.net.modules() if isinstance(module, BatchNorm2d))
    break_step(trainer, 5, lambda: norm.running_var.fill_(value))  # type: ignore[union-attr]
    result = trainer.fit()
    assert (result.outcome, trainer.checkpoints.saved_step) == ("diverged", 4)
    assert result.reason == "the weights or batch norm's running statistics are not finite after step 6"
