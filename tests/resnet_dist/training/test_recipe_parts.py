"""Optional parts of a recipe: each does the documented arithmetic, and a stop and a restart change no bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import worker_process as small
from torch import nn
from torch.nn.functional import cross_entropy

from resnet_dist.config.recipe import EmaConfig, OptimConfig, PlateauSchedule, TrainConfig
from resnet_dist.data.order import train_order
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.training.checkpoint import Identity, load_state, newest_complete
from resnet_dist.training.checkpoint_manager import open_best
from resnet_dist.training.evaluate import evaluate
from resnet_dist.training.model import Precision, build_classifier, build_optimizer
from resnet_dist.training.schedule import Plateau
from resnet_dist.training.state import MovingAverage, TrainState, evaluated_weights
from resnet_dist.training.step import training_loss, update_weights


def train_config(**changes: object) -> TrainConfig:
    return TrainConfig.model_validate({"global_batch_size": 8, "micro_batch_size": 4, "total_epochs": 1, **changes})


# Losses


def test_cross_entropy_is_the_default() -> None:
    logits, targets = torch.randn(4, 3), torch.eye(3)[[0, 2, 1, 1]]
    expected = cross_entropy(logits, torch.tensor([0, 2, 1, 1]), label_smoothing=0.1)
    torch.testing.assert_close(training_loss(logits, targets, train_config(label_smoothing=0.1)), expected)


@pytest.mark.parametrize(
    ("smoothing", "threshold", "targets"),
    [
        (0.0, None, [0.7, 0.3, 0.0, 0.0]),
        (0.1, None, [0.655, 0.295, 0.025, 0.025]),
        (0.0, 0.2, [1.0, 1.0, 0.0, 0.0]),  # both images of the mix count whole
        (0.0, 0.3, [1.0, 0.0, 0.0, 0.0]),  # the threshold itself does not
        (0.1, 0.2, [1.0, 1.0, 0.0, 0.0]),
    ],
)
def test_binary_cross_entropy_by_hand(smoothing: float, threshold: float | None, targets: list[float]) -> None:
    logits = [1.0, -0.5, 0.25, 2.0]
    terms = [
        -t * math.log(1 / (1 + math.exp(-z))) - (1 - t) * math.log(1 / (1 + math.exp(z)))
        for z, t in zip(logits, targets, strict=True)
    ]
    config = train_config(loss={"kind": "bce", "target_threshold": threshold}, label_smoothing=smoothing)
    mixed = torch.tensor([[0.7, 0.3, 0.0, 0.0]], dtype=torch.float64)
    loss = training_loss(torch.tensor([logits], dtype=torch.float64), mixed, config)
    assert float(loss) == pytest.approx(sum(terms) / 4, rel=1e-12)


def test_losses_are_computed_in_the_targets_format() -> None:
    """Under autocast logits have 8 or 11 bits; sums of a thousand terms of them would be worth little."""
    for loss in ("cross_entropy", "bce"):
        config = train_config(loss={"kind": loss})
        assert training_loss(torch.randn(2, 3).bfloat16(), torch.eye(3)[:2], config).dtype == torch.float32


# Clipping


@pytest.mark.parametrize(("limit", "factor"), [(None, 1.0), (14.0, 1.0), (3.5, 0.5)])
def test_a_gradient_is_clipped_to_a_length_over_all_parameters(limit: float | None, factor: float) -> None:
    layer = nn.Linear(2, 1).double()
    assert layer.bias is not None
    before = [p.detach().clone() for p in layer.parameters()]
    gradients = [torch.tensor([[2.0, 3.0]]).double(), torch.tensor([6.0]).double()]
    for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    config = OptimConfig(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, clip_grad_norm=limit)
    state = TrainState(layer, build_optimizer(layer, config))
    norm = update_weights(state, 0.5, clip_grad_norm=limit, measure_norm=True)
    assert norm is not None
    assert float(norm) == 7.0  # before clipping
    for parameter, was, gradient in zip(layer.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), was - 0.5 * factor * gradient, rtol=1e-6, atol=1e-6)
        assert parameter.grad is None


def test_the_length_is_measured_only_where_it_is_asked_for() -> None:
    layer = nn.Linear(2, 1)
    state = TrainState(layer, build_optimizer(layer, OptimConfig(name="sgd", lr=1.0, weight_decay=0.0)))
    layer(torch.ones(1, 2)).sum().backward()
    assert update_weights(state, 0.5, clip_grad_norm=1.0, measure_norm=False) is None


# Plateau


def test_a_plateau_counts_evaluations_without_a_new_best() -> None:
    schedule = PlateauSchedule(kind="plateau", patience=2, min_improvement=0.5, max_drops=2)
    errors = [50.0, 49.6, 49.5, 49.4, 49.2, 48.0, 48.0, 48.0, 48.0, 48.0, 10.0]
    drops, plateau = [], Plateau()
    for error in errors:
        plateau = plateau.after(error, schedule)
        drops.append(plateau.num_drops)
    #      best  .1   best  .1   .3   best  -    -    -    -  best; max_drops is reached
    assert drops == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert plateau.best_error == 10.0


# Number formats


def test_fp16_leaves_out_a_gradient_that_overflows_and_lowers_the_scale() -> None:
    layer, precision, cpu = nn.Linear(2, 1), Precision("fp16"), torch.device("cpu")
    before = layer.weight.detach().clone()
    config = OptimConfig(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0)
    state = TrainState(layer, build_optimizer(layer, config), scaler=precision.scaler(cpu))
    for factor in (math.inf, 0.5):
        state.scaler.scale(factor * layer.weight.sum()).backward()
        norm = update_weights(state, 0.25, clip_grad_norm=None, measure_norm=True)
    assert norm is not None
    assert float(norm) == pytest.approx(0.5 * math.sqrt(2))  # of the gradient, not of the scaled one
    torch.testing.assert_close(layer.weight.detach(), before - 0.25 * 0.5)
    assert state.state_dict()["scaler"]["scale"] == 2.0**15


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("tf32", torch.float32)]
)
def test_the_forward_pass_has_the_recipes_format(name: Any, dtype: torch.dtype) -> None:
    cpu, layer = torch.device("cpu"), nn.Linear(2, 1)
    with Precision(name).autocast(cpu):
        assert layer(torch.ones(1, 2)).dtype == dtype
    assert Precision(name).weights == torch.float32
    assert Precision(name).scaler(cpu).is_enabled() == (name == "fp16")


# The moving average


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
        average.update(norm, step)
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
    config = small.recipe("fp32", "fast", train={"ema": {"decay": 0.5}})
    small.train(tmp_path, 0, 1, config, 12)
    storage = FolderStorage(tmp_path)
    with newest_complete(storage) as last, open_best(storage, Identity("r", "d")) as best:
        assert last is not None
        assert best is not None
        saved, cpu = load_state(last.directory, torch.device("cpu")), torch.device("cpu")
        averaged = evaluated_weights(saved)
        assert averaged is not saved["net"]
        assert not torch.equal(averaged["conv1.weight"], saved["net"]["conv1.weight"])
        if best.metadata.step == 12:
            assert small.digest(dict(evaluated_weights(load_state(best.directory, cpu)))) == small.digest(
                dict(averaged)
            )
        model = build_classifier(config)
        model.net.load_state_dict(dict(averaged))
        val = small.Memory(small.NUM_VAL, 10, seed=2)
        result = evaluate(
            model,
            lambda ids: val.epoch(0, ids),
            num_samples=small.NUM_VAL,
            batch_size=10,
            rank=0,
            world_size=1,
            device=cpu,
            precision=Precision("fp32"),
        )
        assert result.metrics()["val/loss"] == last.metadata.metrics["val/loss"]


# Batch norm's statistics


def test_statistics_after_training_are_plain_averages(tmp_path: Path) -> None:
    """Of the first norm's input, over two steps of the fourth epoch in micro-batches of 4."""
    config = small.recipe("fp64", "fast", train={"bn_statistics_steps": 2})
    small.train(tmp_path, 0, 1, config, 12)
    with newest_complete(FolderStorage(tmp_path)) as found:
        assert found is not None
        net = load_state(found.directory, torch.device("cpu"))["net"]
    memory = small.Memory(small.NUM_TRAIN, 4, seed=1)
    ids = train_order(small.NUM_TRAIN, seed=5, epoch=3, global_batch_size=24, micro_batch_size=4, rank=0, world_size=1)
    means, variances = [], []
    for batch in memory.epoch(3, ids[:2].reshape(-1)):
        pixels = ((batch.images.double() - 100) / 60).permute(0, 3, 1, 2)
        maps = torch.nn.functional.conv2d(pixels, net["conv1.weight"], padding=1)
        means.append(maps.mean(dim=(0, 2, 3)))
        variances.append(maps.var(dim=(0, 2, 3)))
    assert len(means) == 12
    torch.testing.assert_close(net["bn1.running_mean"], torch.stack(means).mean(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(net["bn1.running_var"], torch.stack(variances).mean(0), rtol=1e-9, atol=1e-9)
    assert int(net["bn1.num_batches_tracked"]) == 12  # of training


# Together


@pytest.mark.parametrize("kind", ["fp32", "fp16", "powersgd"])
def test_a_stop_and_a_restart_change_no_bit(tmp_path: Path, kind: str) -> None:
    """In the middle of an epoch; the whole state, not only the weights."""
    sections = small.RECIPES["powersgd"] if kind == "powersgd" else small.PARTS
    config = small.recipe("fp16" if kind == "fp16" else "fp32", "fast", **sections)
    straight = small.train(tmp_path / "straight", 0, 1, config, 12)
    first = small.train(tmp_path / "stopped", 0, 1, config, 7)
    second = small.train(tmp_path / "stopped", 0, 1, config, 12)
    assert first["losses"] + second["losses"] == straight["losses"]
    assert second["weights"] == straight["weights"]
    assert second["evaluations"][-1] == straight["evaluations"][-1]
