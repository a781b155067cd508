"""An early stop: the run finishes at an evaluation, with a checkpoint, and again after a restart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import small_run as small

from resnet_dist.storage.folder import FolderStorage
from resnet_dist.tracking.tracker import CONFUSION
from resnet_dist.training.checkpoint_manager import newest_first

EARLY_STOP = {"metric": "val/loss", "patience": 1, "min_delta": 100.0}
"""The first evaluation is the best, so the second, after 8 of 12 steps, is the last."""
RECIPE = small.recipe(train={"early_stop": EARLY_STOP})
PLAN = replace(small.PLAN, save_every_epochs=99)


class Texts(small.Points):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def text(self, name: str, content: str) -> None:
        self.texts.append(name)


def test_a_run_finishes_early_with_a_checkpoint_and_says_why(tmp_path: Path) -> None:
    tracker = Texts()
    result = small.trainer_of(tmp_path, RECIPE, PLAN, tracker=tracker).fit()
    assert (result.outcome, result.step) == ("finished", 8)
    assert result.reason.startswith("val/loss was best at step 4 (")
    assert result.reason.endswith(") and not better by 100 in the evaluation since (train.early_stop)")
    assert newest_first(FolderStorage(tmp_path).names()) == ["epoch=002-step=00000008"]
    assert tracker.texts == [CONFUSION]  # of the last evaluation only

    again = small.trainer_of(tmp_path, RECIPE, PLAN, train=(train := small.Memory(small.NUM_TRAIN, 4, seed=1)))
    again.restore()
    repeated = again.fit()
    assert (repeated.outcome, repeated.step, repeated.reason) == ("finished", 8, result.reason)
    assert repeated.metrics["val/loss"] == result.metrics["val/loss"]
    assert not train.given


def test_a_stop_and_a_restart_change_no_bit(tmp_path: Path) -> None:
    whole, _ = small.trained(tmp_path / "whole", RECIPE)
    small.trained(tmp_path / "parts", RECIPE, until_step=5)
    parts, _ = small.trained(tmp_path / "parts", RECIPE)
    assert whole.state.step == parts.state.step == 8
    assert small.digest(parts.state.state_dict()) == small.digest(whole.state.state_dict())


def test_a_run_that_reaches_its_last_step_did_not_finish_early(tmp_path: Path) -> None:
    result = small.trainer_of(tmp_path, RECIPE, replace(PLAN, last_step=8)).fit()
    assert (result.outcome, result.step, result.reason) == ("finished", 8, "")


def test_statistics_that_are_averaged_at_the_last_step_exclude_it() -> None:
    with pytest.raises(ValueError, match="early_stop and bn_statistics_steps exclude each other"):
        small.recipe(train={"early_stop": EARLY_STOP, "bn_statistics_steps": 2})
