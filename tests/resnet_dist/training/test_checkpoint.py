"""Checkpoints: complete or detected, of this run or refused, and never more trusted than plain tensors."""

from __future__ import annotations

import copy
import errno
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import worker_process as small

import resnet_dist
from resnet_dist.config.loading import load_recipe
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.preflight import require_none_written
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.tracking.tracker import Tracker
from resnet_dist.training import checkpoint, checkpoint_manager
from resnet_dist.training.checkpoint import (
    STATE,
    CheckpointMetadata,
    Damaged,
    Identity,
    checkpoint_name,
    damaged_names,
    load_state,
    newest_complete,
    newest_first,
    newest_step,
    require_same,
    step_of,
    verify_checkpoint,
    write_checkpoint,
)
from resnet_dist.training.checkpoint_manager import keep_if_best, open_best
from resnet_dist.training.context import LocalContext, TrainingJob
from resnet_dist.training.feed import Samples
from resnet_dist.training.loop import Trainer
from resnet_dist.training.schedule import RunPlan
from resnet_dist.training.state import TrainState

IDENTITY = Identity("a" * 16, "train=1 val=2")


def save(run_dir: Path, step: int) -> Path:
    directory = run_dir / checkpoint_name(step // 10, step)
    directory.mkdir(parents=True)
    metadata = CheckpointMetadata(step // 10, step, IDENTITY, {"seed": 1}, {"val/top1": 97.5}, files={})
    write_checkpoint(directory, state={"net": {"w": torch.arange(3.0)}, "step": step}, metadata=metadata)
    return directory


def nothing_complete(run_dir: Path) -> bool:
    with newest_complete(FolderStorage(run_dir)) as found:
        return found is None


def test_round_trip(tmp_path: Path) -> None:
    directory = save(tmp_path, 25)
    metadata = verify_checkpoint(directory)
    assert (metadata.epoch, metadata.step, metadata.identity, metadata.metrics) == (2, 25, IDENTITY, {"val/top1": 97.5})
    state = load_state(directory, torch.device("cpu"))
    assert state["step"] == 25
    assert torch.equal(state["net"]["w"], torch.arange(3.0))


def test_names() -> None:
    assert checkpoint_name(7, 12345) == "epoch=007-step=00012345"
    assert step_of("epoch=007-step=00012345") == 12345
    assert step_of("epoch=1234-step=123456789") == 123456789
    assert [step_of(n) for n in ("epoch=7", "recipe.yaml", "epoch=007-step=00012345.tmp")] == [None] * 3


def test_newest_is_by_step_not_by_name(tmp_path: Path) -> None:
    names = ["epoch=999-step=00000999", "epoch=1000-step=00001000", "mlflow_run.json"]
    assert newest_first(names) == [names[1], names[0]]


def test_a_damaged_newest_gives_way_to_the_one_before_with_a_warning(tmp_path: Path) -> None:
    good, bad = save(tmp_path, 10), save(tmp_path, 20)
    state = bytearray((bad / STATE).read_bytes())
    state[len(state) // 2] ^= 1
    (bad / STATE).write_bytes(state)
    with newest_complete(FolderStorage(tmp_path)) as found:
        assert found is not None
        assert found.directory == good
        (warning,) = found.warnings
    assert "step=00000020" in warning
    assert "damaged" in warning


@pytest.mark.parametrize("missing", ["checkpoint.json", STATE])
def test_a_half_copied_checkpoint_is_not_complete(tmp_path: Path, missing: str) -> None:
    directory = save(tmp_path, 10)
    (directory / missing).unlink()
    with pytest.raises(Fault, match=r"incomplete|damaged"):
        verify_checkpoint(directory)
    assert nothing_complete(tmp_path)


def test_torn_metadata_is_not_complete(tmp_path: Path) -> None:
    metadata = save(tmp_path, 10) / "checkpoint.json"
    metadata.write_text(metadata.read_text()[:40])
    assert nothing_complete(tmp_path)


def test_no_run_yet(tmp_path: Path) -> None:
    assert nothing_complete(tmp_path / "none")


def test_another_recipe_or_other_data_are_refused_naming_the_difference() -> None:
    recipe = load_recipe(Path(resnet_dist.__file__).parent / "recipes/digits_resnet20.yaml")
    found = CheckpointMetadata(1, 10, IDENTITY, recipe.model_dump(mode="json"), {}, files={})
    faster = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"lr": 0.02})})
    require_same(found, Identity("a" * 16, "train=1 val=2"), recipe, "runs/r")
    with pytest.raises(UserError, match=r"runs/r: .*optim\.lr 0\.1 -> 0\.02 .*aaaa.*bbbb.*new --name"):
        require_same(found, Identity("b" * 16, "train=1 val=2"), faster, "runs/r")
    with pytest.raises(UserError, match=r"train=1 val=2.*train=9 val=2"):
        require_same(found, Identity("a" * 16, "train=9 val=2"), recipe, "runs/r")


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("a checkpoint ran code",))


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    torch.save({"net": _Evil()}, tmp_path / STATE)
    with pytest.raises(Damaged, match=r"refers to '[\w.]+ (safe_)?print'"):
        load_state(tmp_path, torch.device("cpu"))


def test_a_snapshot_is_not_changed_by_training_on() -> None:
    net = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    state = TrainState(net, optimizer)
    train_once(state)
    snapshot = state.snapshot()
    before = copy.deepcopy(snapshot)
    train_once(state)
    torch.testing.assert_close(snapshot, before, rtol=0, atol=0)
    assert not torch.equal(snapshot["net"]["weight"], net.weight)
    again = TrainState(torch.nn.Linear(2, 1), torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    again.load_state_dict(snapshot)
    assert again.step == 1


def train_once(state: TrainState) -> None:
    state.optimizer.zero_grad()
    state.net(torch.ones(1, 2)).sum().backward()
    state.optimizer.step()
    state.step += 1


def test_a_full_disk_is_reported_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's zip writer hides it; /dev/full gives what a full disk gives."""
    monkeypatch.setattr(checkpoint, "create", lambda path: Path("/dev/full").open("wb"))  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(
            tmp_path,
            state={"net": {"w": torch.zeros(100_000)}},
            metadata=CheckpointMetadata(0, 1, IDENTITY, {}, {}, files={}),
        )


def test_what_is_newer_than_the_newest_complete_one_is_damaged(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    assert (damaged_names(storage), newest_step(storage)) == ((), 0)
    for step in (10, 20, 30):
        save(tmp_path, step)
    (tmp_path / checkpoint_name(3, 30) / STATE).write_bytes(b"torn")
    assert (damaged_names(storage), newest_step(storage)) == ((checkpoint_name(3, 30),), 30)
    for step in (10, 20):
        (tmp_path / checkpoint_name(step // 10, step) / STATE).write_bytes(b"torn")
    assert damaged_names(storage) == ()


@pytest.mark.parametrize(("error", "expected"), [(errno.ESTALE, Fault), (errno.EACCES, Fault), (errno.EIO, Damaged)])
def test_storage_that_does_not_respond_condemns_no_checkpoint(
    error: int, expected: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save(tmp_path, 10)
    monkeypatch.setattr(checkpoint, "read_small", lambda *_: (_ for _ in ()).throw(OSError(error, os.strerror(error))))
    with pytest.raises(expected, match="cannot be read"):
        verify_checkpoint(directory)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again_in_silence(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    (tmp_path / checkpoint_name(1, 10)).mkdir()
    require_none_written(storage, newest_first(storage.names()))  # killed in an upload: its metadata comes last
    save(tmp_path, 20)
    (tmp_path / checkpoint_name(2, 20) / STATE).write_bytes(b"torn")
    with pytest.raises(
        UserError, match=r"none of its 2 checkpoints is complete \(newest: epoch=002-step=00000020\); see"
    ):
        require_none_written(storage, newest_first(storage.names()))


# The best weights


MINE = Identity("recipe", "data")


def metadata_of(step: int, top1: float) -> CheckpointMetadata:
    return CheckpointMetadata(step // 10, step, MINE, {}, {"val/top1": top1}, files={})


def net(value: float) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((1, 1), float(value))}


def is_there(run_dir: Path) -> bool:
    with open_best(FolderStorage(run_dir), MINE) as found:
        return found is not None


def kept_weight(run_dir: Path) -> float:
    with open_best(FolderStorage(run_dir), MINE) as found:
        assert found is not None
        return float(load_state(found.directory, torch.device("cpu"))["net"]["weight"])


def test_only_a_better_one_is_kept(tmp_path: Path) -> None:
    assert not is_there(tmp_path)
    for step, top1, is_kept in ((10, 50.0, True), (20, 50.0, False), (30, 40.0, False), (40, 60.0, True)):
        assert keep_if_best(FolderStorage(tmp_path), net(step), metadata_of(step, top1)) is is_kept
    assert kept_weight(tmp_path) == 40.0
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["epoch=004-step=00000040"]
    with newest_complete(FolderStorage(tmp_path)) as found:
        assert found is None  # nothing to resume from


def test_a_kill_before_the_old_one_is_removed_leaves_a_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    keep_if_best(FolderStorage(tmp_path), net(1), metadata_of(10, 50.0))
    with monkeypatch.context() as patch:
        patch.setattr(FolderStorage, "remove", kill)
        with pytest.raises(KeyboardInterrupt):
            keep_if_best(FolderStorage(tmp_path), net(2), metadata_of(20, 60.0))
    assert kept_weight(tmp_path) in (1.0, 2.0)
    keep_if_best(FolderStorage(tmp_path), net(3), metadata_of(30, 70.0))
    assert kept_weight(tmp_path) == 3.0
    assert len(list((tmp_path / "best").iterdir())) == 1


def test_a_damaged_one_and_anothers_are_not_taken(tmp_path: Path) -> None:
    keep_if_best(FolderStorage(tmp_path), net(1), metadata_of(10, 50.0))
    other = replace(metadata_of(20, 1.0), identity=Identity("other", "data"))
    assert keep_if_best(FolderStorage(tmp_path), net(2), other)
    assert not is_there(tmp_path)
    keep_if_best(FolderStorage(tmp_path), net(3), metadata_of(30, 2.0))
    assert kept_weight(tmp_path) == 3.0
    (tmp_path / "best" / "epoch=003-step=00000030" / STATE).write_bytes(b"torn")
    assert not is_there(tmp_path)


class SlowStorage(FolderStorage):
    """Commits nothing before `goes_on` is set."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.goes_on = threading.Event()

    def commit(self, name: str, write: Callable[[Path], None], *, last: str) -> None:
        assert self.goes_on.wait(30)
        super().commit(name, write, last=last)


@pytest.mark.parametrize(("storage_timeout_s", "has_heartbeats"), [(20.0, True), (0.0, False)])
def test_the_watchdog_spares_a_worker_that_waits_for_slow_storage_until_its_limit(
    storage_timeout_s: float, has_heartbeats: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_manager, "_HEARTBEAT_EVERY_S", 0.01)
    storage, num_heartbeats = SlowStorage(tmp_path), 0

    def count() -> None:
        nonlocal num_heartbeats
        num_heartbeats += 1
        if num_heartbeats == 3:
            storage.goes_on.set()

    if not has_heartbeats:
        threading.Timer(0.3, storage.goes_on.set).start()
    plan = RunPlan(
        steps_per_epoch=4,
        total_steps=4,
        last_step=4,
        eval_every_epochs=1,
        save_every_epochs=1,
        save_every_steps=None,
        log_every_steps=2,
    )
    job = TrainingJob(small.recipe("fp32", "fast"), plan, MINE, tmp_path, tmp_path, loader_threads=1)
    train, val = small.Memory(small.NUM_TRAIN, 4, seed=1), small.Memory(small.NUM_VAL, 10, seed=2)
    ctx = LocalContext(storage, on_heartbeat=count, storage_timeout_s=storage_timeout_s)
    trainer = Trainer(job, ctx, Tracker(), Samples(train, small.NUM_TRAIN), Samples(val, small.NUM_VAL))
    trainer.checkpoints.save_if_best({"val/top1": 50.0})
    trainer.checkpoints.wait()
    assert is_there(tmp_path)
    assert (num_heartbeats >= 3) is has_heartbeats
