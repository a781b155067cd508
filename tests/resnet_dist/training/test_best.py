from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from resnet_dist.training import best
from resnet_dist.training.best import best_folder, keep_if_best, read_best
from resnet_dist.training.checkpoint import STATE, Card, Identity, load_state, newest_whole

MINE = Identity("recipe", "data")


def card(step: int, top1: float) -> Card:
    return Card(step // 10, step, MINE, {}, {"val/top1": top1}, files={})


def net(value: float) -> nn.Module:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, value)
    return module


def kept_weight(run_dir: Path) -> float:
    found = read_best(run_dir, MINE)
    assert found is not None
    return float(load_state(found[0], torch.device("cpu"))["net"]["weight"])


def test_only_a_better_one_is_kept(tmp_path: Path) -> None:
    assert read_best(tmp_path, MINE) is None
    for step, top1, is_kept in ((10, 50.0, True), (20, 50.0, False), (30, 40.0, False), (40, 60.0, True)):
        assert keep_if_best(tmp_path, net(step), card(step, top1)) is is_kept
    assert kept_weight(tmp_path) == 40.0
    assert [path.name for path in best_folder(tmp_path).iterdir()] == ["epoch=004-step=00000040"]
    assert newest_whole(tmp_path) is None  # nothing to resume from


def test_a_kill_before_the_old_one_is_removed_leaves_a_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    keep_if_best(tmp_path, net(1), card(10, 50.0))
    with monkeypatch.context() as patch:
        patch.setattr(best.shutil, "rmtree", kill)
        with pytest.raises(KeyboardInterrupt):
            keep_if_best(tmp_path, net(2), card(20, 60.0))
    assert kept_weight(tmp_path) in (1.0, 2.0)
    keep_if_best(tmp_path, net(3), card(30, 70.0))
    assert kept_weight(tmp_path) == 3.0
    assert len(list(best_folder(tmp_path).iterdir())) == 1


def test_a_damaged_one_and_anothers_are_not_taken(tmp_path: Path) -> None:
    keep_if_best(tmp_path, net(1), card(10, 50.0))
    other = replace(card(20, 1.0), identity=Identity("other", "data"))
    assert keep_if_best(tmp_path, net(2), other)
    assert read_best(tmp_path, MINE) is None
    keep_if_best(tmp_path, net(3), card(30, 2.0))
    assert kept_weight(tmp_path) == 3.0
    found = read_best(tmp_path, MINE)
    assert found is not None
    (found[0] / STATE).write_bytes(b"torn")
    assert read_best(tmp_path, MINE) is None
