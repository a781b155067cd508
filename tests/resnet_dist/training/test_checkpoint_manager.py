"""Which checkpoint is resumed, which are kept, which weights are the best; and writes that take long."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_run as small
import torch
from small_run import IDENTITY

from resnet_dist.errors import Fault
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.training import checkpoint_manager
from resnet_dist.training.checkpoint import METADATA, STATE, CheckpointMetadata, checkpoint_name, load_state
from resnet_dist.training.checkpoint_manager import (
    damaged_names,
    keep_if_best,
    list_saved,
    newest_complete,
    newest_first,
    newest_step,
    open_best,
    prune,
)
from resnet_dist.training.context import LocalContext


def tear(run_dir: Path, *steps: int) -> None:
    for step in steps:
        (run_dir / checkpoint_name(step // 10, step) / STATE).write_bytes(b"torn")


def test_newest_is_by_step_not_by_name() -> None:
    names = ["epoch=999-step=00000999", "epoch=1000-step=00001000", "mlflow_run.json"]
    assert newest_first(names) == [names[1], names[0]]


def test_what_is_newer_than_the_newest_complete_one_is_damaged(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path / "run")
    with newest_complete(storage) as found:
        assert found is None
    assert (damaged_names(storage), newest_step(storage)) == ((), 0)
    for step in (10, 20, 30):
        small.save(storage.folder, step)
    tear(storage.folder, 30)
    assert (damaged_names(storage), newest_step(storage)) == ((checkpoint_name(3, 30),), 30)
    tear(storage.folder, 10, 20)
    assert damaged_names(storage) == ()  # the user decides


def test_the_newest_are_kept_without_damaged_ones_and_leftovers(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        small.save(tmp_path, step)
    (tmp_path / ".epoch=005-step=00000050.tmp").mkdir()
    small.save(tmp_path / "best", 10)
    prune(FolderStorage(tmp_path), 2, damaged=[checkpoint_name(4, 40)])
    assert list_saved(FolderStorage(tmp_path)) == [
        "epoch=003-step=00000030",
        "epoch=002-step=00000020",
        "best/epoch=001-step=00000010",
    ]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_state_of_another_net_is_refused_in_one_line(tmp_path: Path) -> None:
    small.save(tmp_path, 10)
    trainer = small.trainer_of(tmp_path, small.recipe())
    with pytest.raises(Fault, match=r"step=00000010: its state is not one of this run .*; remove that checkpoint$"):
        trainer.restore()


@pytest.mark.parametrize(("keep", "saved"), [(2, [12, 8]), (None, [12, 8, 4])])
def test_a_run_keeps_its_newest_checkpoints(tmp_path: Path, keep: int | None, saved: list[int]) -> None:
    context = LocalContext(FolderStorage(tmp_path), keep=keep)
    small.trainer_of(tmp_path, small.recipe(), context=context).fit()
    assert newest_first(context.storage.names()) == [checkpoint_name(step // 4, step) for step in saved]


# The best weights


def test_a_checkpoint_is_written_when_rank_0s_last_one_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without Ray: the clock is the manager's. Step 9 is 4 s after step 5, step 10 is 5 s after it."""
    now_s = [0.0]
    monkeypatch.setattr(checkpoint_manager, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    plan = replace(small.PLAN, save_every_epochs=99)
    trainer = small.trainer_of(tmp_path, small.recipe(), plan, save_every_s=5)
    while trainer.advance() is None:
        now_s[0] = float(trainer.state.step)
    assert newest_first(trainer.ctx.storage.names()) == [checkpoint_name(step // 4, step) for step in (12, 10, 5)]
    assert not trainer.checkpoints.due_by_clock()
    now_s[0] += 5
    assert trainer.checkpoints.due_by_clock()
    trainer.ctx.rank = 1
    assert not trainer.checkpoints.due_by_clock()


def keep_net(run_dir: Path, step: int, top1: float, recipe_hash: str = "recipe") -> bool:
    """Keeps, if it is the best, a net whose weight is `step`."""
    identity = replace(IDENTITY, recipe_hash=recipe_hash)
    metadata = CheckpointMetadata(step // 10, step, identity, {}, {"val/top1": top1}, files={})
    return keep_if_best(FolderStorage(run_dir), {"w": torch.tensor(float(step))}, metadata)


def best_step(run_dir: Path) -> float | None:
    with open_best(FolderStorage(run_dir), IDENTITY) as found:
        return None if found is None else float(load_state(found.directory, torch.device("cpu"))["net"]["w"])


def test_only_better_weights_are_kept(tmp_path: Path) -> None:
    assert best_step(tmp_path) is None
    kept = [keep_net(tmp_path, step, top1) for step, top1 in ((10, 50.0), (20, 50.0), (30, 40.0), (40, 60.0))]
    assert kept == [True, False, False, True]
    assert best_step(tmp_path) == 40
    assert list_saved(FolderStorage(tmp_path)) == ["best/epoch=004-step=00000040"]


def test_a_kill_before_the_old_weights_are_removed_leaves_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    keep_net(tmp_path, 10, 50.0)
    with monkeypatch.context() as patch:
        patch.setattr(FolderStorage, "remove", kill)
        with pytest.raises(KeyboardInterrupt):
            keep_net(tmp_path, 20, 60.0)
    assert best_step(tmp_path) == 20
    keep_net(tmp_path, 30, 70.0)
    assert list_saved(FolderStorage(tmp_path)) == ["best/epoch=003-step=00000030"]


def test_damaged_weights_and_those_of_another_run_are_passed_over(tmp_path: Path) -> None:
    keep_net(tmp_path, 10, 50.0)
    (tmp_path / "best" / checkpoint_name(2, 20)).mkdir()
    os.mkfifo(tmp_path / "best" / checkpoint_name(2, 20) / METADATA)
    assert best_step(tmp_path) == 10
    assert keep_net(tmp_path, 20, 1.0, recipe_hash="other")
    assert best_step(tmp_path) is None
    keep_net(tmp_path, 30, 2.0)
    assert best_step(tmp_path) == 30
    tear(tmp_path / "best", 30)
    assert best_step(tmp_path) is None


class SlowStorage(FolderStorage):
    """Commits nothing before `continues` is set."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.continues = threading.Event()

    def commit(self, name: str, write: Callable[[Path], None], *, last: str) -> None:
        assert self.continues.wait(30)
        super().commit(name, write, last=last)


@pytest.mark.parametrize(("storage_timeout_s", "has_heartbeats"), [(20.0, True), (0.0, False)])
def test_the_watchdog_spares_a_worker_that_waits_for_slow_storage_until_its_limit(
    storage_timeout_s: float, has_heartbeats: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_manager, "_HEARTBEAT_EVERY_S", 0.01)
    storage, heartbeats = SlowStorage(tmp_path), []

    def count() -> None:
        heartbeats.append(1)
        if len(heartbeats) == 3:
            storage.continues.set()

    if not has_heartbeats:
        threading.Timer(0.3, storage.continues.set).start()
    context = LocalContext(storage, on_heartbeat=count, storage_timeout_s=storage_timeout_s)
    trainer = small.trainer_of(tmp_path, small.recipe(), context=context)
    trainer.checkpoints.save_if_best({"val/top1": 50.0})
    trainer.checkpoints.wait()
    assert list_saved(storage) == ["best/epoch=000-step=00000000"]
    assert (len(heartbeats) >= 3) is has_heartbeats
