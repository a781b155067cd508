"""What a recipe may have besides: each part does the arithmetic it says, and a stop and a restart change no bit."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from resnet_dist.config.recipe_optim import OptimConfig, PlateauSchedule
from resnet_dist.config.recipe_train import TrainConfig
from resnet_dist.training.losses import training_loss
from resnet_dist.training.optim import build_optimizer
from resnet_dist.training.plateau import Plateau
from resnet_dist.training.state import TrainState
from resnet_dist.training.update import Update

SPEC = importlib.util.spec_from_file_location("worker_process", Path(__file__).with_name("worker_process.py"))
assert SPEC is not None
assert SPEC.loader is not None
small: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(small)


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
    norm = Update(state, clip_grad_norm=limit).apply(0.5, measure=True)
    assert norm is not None
    assert float(norm) == 7.0  # before clipping
    for parameter, was, gradient in zip(layer.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), was - 0.5 * factor * gradient, rtol=1e-6, atol=1e-6)
        assert parameter.grad is None


def test_the_length_is_measured_only_where_it_is_asked_for() -> None:
    layer = nn.Linear(2, 1)
    state = TrainState(layer, build_optimizer(layer, OptimConfig(name="sgd", lr=1.0, weight_decay=0.0)))
    layer(torch.ones(1, 2)).sum().backward()
    assert Update(state, clip_grad_norm=1.0).apply(0.5, measure=False) is None


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


# Together


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_stop_and_a_restart_change_no_bit(tmp_path: Path) -> None:
    """In the middle of an epoch; the whole state, not only the weights."""
    config = small.recipe("fp32", "fast", **small.PARTS)
    straight = small.train(tmp_path / "straight", 0, 1, config, 12)
    first = small.train(tmp_path / "stopped", 0, 1, config, 7)
    second = small.train(tmp_path / "stopped", 0, 1, config, 12)
    assert first["losses"] + second["losses"] == straight["losses"]
    assert second["weights"] == straight["weights"]
    assert second["evaluations"][-1] == straight["evaluations"][-1]
