"""What a run remembers: its moving average, snapshots of the state, and a restart that changes no bit."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock, patch

import pytest
import small_run as small
import torch
from fake_cuda import fake_cuda
from torch import nn

from resnet_dist.config.recipe import EmaConfig
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.training.checkpoint import load_state
from resnet_dist.training.checkpoint_manager import newest_complete, open_best
from resnet_dist.training.evaluate import evaluate
from resnet_dist.training.model import Precision, build_classifier
from resnet_dist.training.state import HostCopies, MovingAverage, TrainState, evaluated_weights

CPU = torch.device("cpu")


def test_the_moving_average_by_hand() -> None:
    """Every second step, from the third on; until then the weights themselves."""
    norm = nn.BatchNorm1d(1)
    average = MovingAverage(norm, EmaConfig(decay=0.75, every_steps=2, start_epochs=1.5), steps_per_epoch=2)
    seen = []
    for step in range(1, 9):
        with torch.no_grad():
            norm.weight.fill_(float(step))
            norm.running_mean.fill_(float(10 * step))  # type: ignore[union-attr]
            norm.num_batches_tracked.fill_(step)  # type: ignore[union-attr]
        average.update(step)
        net = average.net
        seen.append([float(net.weight), float(net.running_mean), int(net.num_batches_tracked)])  # type: ignore[arg-type]
    second, fourth = 2.0, 0.75 * 2 + 0.25 * 4
    sixth = 0.75 * fourth + 0.25 * 6
    eighth = 0.75 * sixth + 0.25 * 8
    values = [1.0, second, second, fourth, fourth, sixth, sixth, eighth]
    assert [row[0] for row in seen] == pytest.approx(values)
    assert [row[1] for row in seen] == pytest.approx([0.0, *(10 * v for v in values[1:])])
    assert [row[2] for row in seen] == [0, 2, 2, 4, 4, 6, 6, 8]
    assert all(p.grad is None and not p.requires_grad for p in average.net.parameters())


def test_the_moving_average_is_evaluated_kept_and_published(tmp_path: Path) -> None:
    config = small.recipe(train={"ema": {"decay": 0.5}})
    small.trained(tmp_path, config)
    storage = FolderStorage(tmp_path)
    with newest_complete(storage) as last, open_best(storage, small.IDENTITY) as best:
        assert last is not None
        assert best is not None
        saved = load_state(last.directory, CPU)
        averaged = evaluated_weights(saved)
        assert not torch.equal(averaged["conv1.weight"], saved["net"]["conv1.weight"])
        if best.metadata.step == 12:
            kept = evaluated_weights(load_state(best.directory, CPU))
            assert small.digest(kept) == small.digest(averaged)
        model = build_classifier(config)
        model.net.load_state_dict(dict(averaged))
        result = evaluate(
            model,
            partial(small.Memory(small.NUM_VAL, 10, seed=2).epoch, 0),
            num_samples=small.NUM_VAL,
            batch_size=10,
            rank=0,
            world_size=1,
            device=CPU,
            precision=Precision("fp32"),
            num_classes=4,
        )
        assert result.metrics()["val/loss"] == last.metadata.metrics["val/loss"]


def test_a_snapshot_is_not_changed_by_further_training() -> None:
    def new_state() -> TrainState:
        net = nn.Linear(2, 1)
        return TrainState(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))

    def train_once(state: TrainState) -> None:
        state.optimizer.zero_grad()
        state.net(torch.ones(1, 2)).sum().backward()
        state.optimizer.step()
        state.step += 1

    state, restored = new_state(), new_state()
    train_once(state)
    snapshot = state.snapshot()
    before = copy.deepcopy(snapshot)
    train_once(state)
    torch.testing.assert_close(snapshot, before, rtol=0, atol=0)
    restored.load_state_dict(snapshot)
    train_once(restored)
    assert small.digest(restored.state_dict()) == small.digest(state.state_dict())


def test_copies_of_a_gpus_state_use_the_same_memory_in_turns() -> None:
    synchronised = MagicMock()
    with fake_cuda(), patch("torch.cuda.current_stream", synchronised):
        weights = {"weight": torch.zeros((2, 3, 3, 3)).contiguous(memory_format=torch.channels_last)}
        state = {"net": weights, "list": [torch.zeros(2, dtype=torch.int64)], "step": 3}
        copies = HostCopies()
        first, second, third = (copies.take(state) for _ in range(3))
        assert third["net"]["weight"] is first["net"]["weight"]
        assert third["list"][0] is first["list"][0]
        assert second["net"]["weight"] is not first["net"]["weight"]
        assert first["net"]["weight"].device.type == "cpu"
        assert first["net"]["weight"].stride() == weights["weight"].stride()
        assert third["step"] == 3
    assert synchronised.return_value.synchronize.call_count == 3


def test_copies_of_a_cpus_state_are_the_callers_alone() -> None:
    copies, weight = HostCopies(), torch.zeros(2)
    taken = [copies.take({"weight": weight})["weight"] for _ in range(3)]
    assert len({copy.data_ptr() for copy in [weight, *taken]}) == 4


@pytest.mark.parametrize("kind", ["fp32", "fp16", "powersgd"])
def test_a_stop_and_a_restart_change_no_bit(tmp_path: Path, kind: str) -> None:
    """In the middle of an epoch; the whole state, not only the weights."""
    sections = small.RECIPES["powersgd"] if kind == "powersgd" else small.PARTS
    config = small.recipe("fp16" if kind == "fp16" else "fp32", **sections)
    _, straight = small.trained(tmp_path / "straight", config)
    _, first = small.trained(tmp_path / "stopped", config, until_step=7)
    _, second = small.trained(tmp_path / "stopped", config)
    assert first["losses"] + second["losses"] == straight["losses"]
    assert second["weights"] == straight["weights"]
    assert second["evaluations"][-1] == straight["evaluations"][-1]


def test_a_run_on_one_batch_sees_its_pixels_in_every_step_also_after_a_restart(tmp_path: Path) -> None:
    config = small.recipe("fp64", "exact", **small.RECIPES["one batch"])
    whole, result = small.trained(tmp_path / "whole", config)
    assert result["train"] == 12 * result["train"][:6]
    assert result["losses"][-1] < 0.3 * result["losses"][0]
    small.trained(tmp_path / "parts", config, until_step=6)
    parts, _ = small.trained(tmp_path / "parts", config)
    assert small.digest(parts.state.state_dict()) == small.digest(whole.state.state_dict())
