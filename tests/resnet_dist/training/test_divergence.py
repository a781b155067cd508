"""NaN and infinity in training and in evaluation: the run ends, or goes back and leaves a step out, by recipe."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import BatchNorm2d

from resnet_dist.config.recipe import DivergenceConfig, Recipe
from resnet_dist.data.batch import Batch
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.training.checkpoint import Identity
from resnet_dist.training.context import Job, LocalContext
from resnet_dist.training.feed import Samples
from resnet_dist.training.loop import fit, restore, suspects
from resnet_dist.training.schedule import RunPlan
from resnet_dist.training.trainer import Run, assemble

SPEC = importlib.util.spec_from_file_location("worker_process", Path(__file__).with_name("worker_process.py"))
assert SPEC is not None
assert SPEC.loader is not None
small: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(small)
BAD_STEP = 6  # the third step of the second epoch


class Poisoned(small.Memory):
    """Gives NaN images in one micro-batch of BAD_STEP."""

    def epoch(self, epoch: int, sample_ids: NDArray[np.int64]) -> Generator[Batch, None, None]:
        per_step = small.recipe("fp32", "fast").train.num_micro_batches
        first = 4 * per_step - len(sample_ids) // self.batch_size
        for number, batch in enumerate(super().epoch(epoch, sample_ids)):
            step = epoch * 4 + (first + number) // per_step
            if step == BAD_STEP and (first + number) % per_step == 1:
                batch.images = torch.full(batch.images.shape, math.nan)
            yield batch


class NanInValidation(small.Memory):
    """Gives NaN images in the second evaluation, and only there."""

    num_epochs = 0

    def epoch(self, epoch: int, sample_ids: NDArray[np.int64]) -> Generator[Batch, None, None]:
        self.num_epochs += 1
        for batch in super().epoch(epoch, sample_ids):
            if self.num_epochs == 2:
                batch.images = torch.full(batch.images.shape, math.nan)
            yield batch


def train(
    folder: Path,
    divergence: dict[str, Any],
    loader: Any,
    broken_step: int | None = None,
    val: Any = None,
    fitting: Any = fit,
) -> tuple[str, Run, Any]:
    """`broken_step`: the gradient of this step is NaN, its loss is not."""
    folder.mkdir()
    recipe: Recipe = small.recipe("fp32", "fast")
    config = recipe.train.model_copy(update={"divergence": DivergenceConfig.model_validate(divergence)})
    recipe = recipe.model_copy(update={"train": config})
    plan = RunPlan(4, 12, 12, 1, 1, None, log_every_steps=2, save_first=True)
    job = Job(recipe, plan, Identity("r", "d"), folder, folder, loader_threads=1)
    val, points = val or small.Memory(small.NUM_VAL, 10, seed=2), small.Points()
    run = assemble(
        job, LocalContext(FolderStorage(folder)), points, Samples(loader, small.NUM_TRAIN), Samples(val, small.NUM_VAL)
    )
    apply = run.update.apply

    def broken(lr: float, *, measure: bool) -> torch.Tensor | None:
        if run.state.step == broken_step:
            next(run.state.net.parameters()).grad.fill_(math.nan)  # type: ignore[union-attr]
        return apply(lr, measure=measure)

    run.update.apply = broken  # type: ignore[method-assign]
    return fitting(run), run, points


def losses(points: Any) -> dict[int, float]:
    return {step: row["train/loss"] for step, row in points.rows if "train/loss" in row}


def test_stop_ends_the_run_and_saves_nothing_of_it(tmp_path: Path) -> None:
    outcome, run, points = train(tmp_path / "run", {}, Poisoned(small.NUM_TRAIN, 4, seed=1))
    assert outcome == "diverged"
    assert run.saved_step == 4
    assert math.isnan(losses(points)[8])


def test_skip_leaves_the_batch_out_and_goes_on(tmp_path: Path) -> None:
    outcome, run, points = train(tmp_path / "run", {"action": "skip"}, Poisoned(small.NUM_TRAIN, 4, seed=1))
    assert (outcome, run.state.step, run.state.skipped) == ("finished", 12, {BAD_STEP})
    assert all(math.isfinite(loss) for loss in losses(points).values())
    assert all(torch.isfinite(v).all() for v in run.state.net.state_dict().values())
    _, _, clean_points = train(tmp_path / "clean", {}, small.Memory(small.NUM_TRAIN, 4, seed=1))
    same, different = {2, 4, 6}, {8, 10, 12}
    assert {s: v for s, v in losses(points).items() if s in same} == {s: losses(clean_points)[s] for s in same}
    assert all(losses(points)[s] != losses(clean_points)[s] for s in different)


@pytest.mark.parametrize("step", [5, 6, 7, 11])
def test_an_update_that_breaks_the_weights_is_never_saved(tmp_path: Path, step: int) -> None:
    """Also of the step before a checkpoint (7), and of the last (11): a step's loss does not show its own update."""
    outcome, run, _ = train(tmp_path / "run", {}, small.Memory(small.NUM_TRAIN, 4, seed=1), step)
    assert (outcome, run.saved_step) == ("diverged", 8 if step == 11 else 4)
    restore(run)
    assert all(torch.isfinite(value).all() for value in run.state.net.state_dict().values())


@pytest.mark.parametrize("step", [5, 6, 7, 11])
def test_skip_finds_the_step_whose_update_broke_the_weights(tmp_path: Path, step: int) -> None:
    outcome, run, _ = train(tmp_path / "run", {"action": "skip"}, small.Memory(small.NUM_TRAIN, 4, seed=1), step)
    assert (outcome, run.state.step) == ("finished", 12)
    assert step in run.state.skipped
    assert len(run.state.skipped) <= 3
    assert all(torch.isfinite(value).all() for value in run.state.net.state_dict().values())


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


def test_a_loss_above_the_limit_counts_too(tmp_path: Path) -> None:
    outcome, run, _ = train(tmp_path / "run", {"max_loss": 1e-3}, small.Memory(small.NUM_TRAIN, 4, seed=1))
    assert (outcome, run.state.step) == ("diverged", 2)


def test_skipping_has_a_limit(tmp_path: Path) -> None:
    policy = {"action": "skip", "max_loss": 1e-3, "max_skips": 3}
    outcome, run, _ = train(tmp_path / "run", policy, small.Memory(small.NUM_TRAIN, 4, seed=1))
    assert (outcome, run.state.skipped) == ("diverged", {0, 1, 2})


def test_a_resumed_run_remembers_what_was_skipped(tmp_path: Path) -> None:
    """Or a kill would give back the skips that were used up, and change where the run ends."""
    _, run, _ = train(tmp_path / "run", {"action": "skip"}, Poisoned(small.NUM_TRAIN, 4, seed=1))
    run.state.skipped = set()
    restore(run)
    assert (run.state.step, run.state.skipped) == (12, {BAD_STEP})


def test_nan_in_an_evaluation_ends_the_run_with_a_checkpoint_and_says_so(tmp_path: Path) -> None:
    """The state is finite, so it is saved, and a repeated command evaluates it again before it trains a step."""
    val = NanInValidation(small.NUM_VAL, 10, seed=2)
    outcome, run, points = train(tmp_path / "run", {}, small.Memory(small.NUM_TRAIN, 4, seed=1), val=val)
    assert (outcome, run.state.step, run.saved_step, run.state.evaluated_step) == ("diverged", 8, 8, 4)
    assert run.diverged == "the evaluation gave NaN or infinity at step 8 (for 37 of 37 samples)"
    evaluations = {step: row for step, row in points.rows if "val/top1" in row}
    assert (evaluations[8]["val/top1"], math.isnan(evaluations[8]["val/loss"])) == (0.0, True)
    assert fit(run) == "finished"  # the second look finds numbers


def test_nan_in_an_evaluation_is_skipped_where_the_recipe_says_so(tmp_path: Path) -> None:
    val = NanInValidation(small.NUM_VAL, 10, seed=2)
    policy = {"action": "skip"}
    outcome, run, _ = train(tmp_path / "run", policy, small.Memory(small.NUM_TRAIN, 4, seed=1), val=val)
    assert (outcome, run.state.step, run.state.skipped) == ("finished", 12, {7})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_batch_norms_statistics_are_looked_at_too(tmp_path: Path, value: float) -> None:
    """They are written in training and read in evaluation: no training loss shows them."""

    class Breaking(small.Memory):
        def epoch(self, epoch: int, sample_ids: NDArray[np.int64]) -> Generator[Batch, None, None]:
            for number, batch in enumerate(super().epoch(epoch, sample_ids)):
                if (epoch, number) == (1, 8):
                    next(norm for norm in norms() if isinstance(norm, BatchNorm2d)).running_var.fill_(value)
                yield batch

    made: list[Run] = []

    def norms() -> Any:
        return made[0].state.net.modules()

    def keep(run: Run) -> str:
        made.append(run)
        return fit(run)

    outcome, run, _ = train(tmp_path / "run", {}, Breaking(small.NUM_TRAIN, 4, seed=1), fitting=keep)
    assert (outcome, run.saved_step) == ("diverged", 4)
    assert run.diverged == "the weights or batch norm's running statistics are not finite after step 6"


@pytest.fixture(autouse=True)
def _one_thread() -> Generator[None, None, None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
