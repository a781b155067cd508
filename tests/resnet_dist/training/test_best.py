from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resnet_dist.storage.folder import FolderStorage
from resnet_dist.training.checkpoint import STATE, CheckpointMetadata, Identity, load_state, newest_whole
from resnet_dist.training.checkpoint_manager import keep_if_best, open_best

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
    with newest_whole(FolderStorage(tmp_path)) as found:
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
