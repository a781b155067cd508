"""The arithmetic of one step: losses, number formats, clipping, and the scale of fp16's loss."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import small_run as small
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from resnet_dist.config.recipe import OptimConfig
from resnet_dist.training.model import Precision, build_optimizer
from resnet_dist.training.state import TrainState
from resnet_dist.training.step import training_loss, update_weights


def test_cross_entropy_is_the_default() -> None:
    logits, targets = torch.randn(4, 3), torch.eye(3)[[0, 2, 1, 1]]
    expected = cross_entropy(logits, torch.tensor([0, 2, 1, 1]), label_smoothing=0.1)
    torch.testing.assert_close(training_loss(logits, targets, small.train_config(label_smoothing=0.1)), expected)


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
    config = small.train_config(loss={"kind": "bce", "target_threshold": threshold}, label_smoothing=smoothing)
    mixed = torch.tensor([[0.7, 0.3, 0.0, 0.0]], dtype=torch.float64)
    loss = training_loss(torch.tensor([logits], dtype=torch.float64), mixed, config)
    assert float(loss) == pytest.approx(sum(terms) / 4, rel=1e-12)


def test_class_weights_multiply_each_images_loss_and_divide_by_the_number_of_images() -> None:
    logits, labels, weights = torch.randn(5, 3).double(), torch.tensor([0, 2, 1, 1, 0]), torch.tensor([0.5, 1, 20.0])
    targets = torch.eye(3).double()[labels]
    loss = training_loss(logits, targets, small.train_config(), weights)
    expected = cross_entropy(logits, labels, weight=weights.double(), reduction="sum") / 5
    torch.testing.assert_close(loss, expected)
    alone = [training_loss(logits[i : i + 1], targets[i : i + 1], small.train_config(), weights) for i in range(5)]
    torch.testing.assert_close(loss, torch.stack(alone).mean())  # the rest of the micro-batch does not matter


@pytest.mark.parametrize("loss", [{"kind": "cross_entropy"}, {"kind": "bce"}, {"kind": "bce", "target_threshold": 0.2}])
def test_a_mixed_image_has_the_mean_weight_of_its_classes_and_smoothing_changes_none(loss: dict[str, Any]) -> None:
    config = small.train_config(loss=loss, label_smoothing=0.1)
    logits, mixed = torch.randn(1, 3).double(), torch.tensor([[0.7, 0.3, 0.0]]).double()
    weights = torch.tensor([0.5, 2.0, 1000.0]).double()  # the last would pull with its share of the smoothing
    expected = (0.7 * 0.5 + 0.3 * 2.0) * training_loss(logits, mixed, config)
    torch.testing.assert_close(training_loss(logits, mixed, config, weights), expected)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_losses_are_computed_in_the_targets_format(loss: str) -> None:
    config = small.train_config(loss={"kind": loss})
    assert training_loss(torch.randn(2, 3).bfloat16(), torch.eye(3)[:2], config).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("tf32", torch.float32)]
)
def test_the_forward_pass_has_the_recipes_format(name: Any, dtype: torch.dtype) -> None:
    cpu, layer = torch.device("cpu"), nn.Linear(2, 1)
    with Precision(name).autocast(cpu):
        assert layer(torch.ones(1, 2)).dtype == dtype
    assert Precision(name).weights == torch.float32
    assert Precision(name).scaler(cpu).is_enabled() == (name == "fp16")


def state_of(layer: nn.Module, precision: Literal["fp32", "fp16"] = "fp32") -> TrainState:
    config = OptimConfig(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0)
    return TrainState(layer, build_optimizer(layer, config), scaler=Precision(precision).scaler(torch.device("cpu")))


@pytest.mark.parametrize(("limit", "factor"), [(None, 1.0), (14.0, 1.0), (3.5, 0.5)])
def test_a_gradient_is_clipped_to_a_length_over_all_parameters(limit: float | None, factor: float) -> None:
    layer = nn.Linear(2, 1).double()
    before = [p.detach().clone() for p in layer.parameters()]
    gradients = [torch.tensor([[2.0, 3.0]]).double(), torch.tensor([6.0]).double()]
    for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = update_weights(state_of(layer), 0.5, clip_grad_norm=limit, measure_norm=True)
    assert norm is not None
    assert float(norm) == 7.0  # before clipping
    for parameter, was, gradient in zip(layer.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), was - 0.5 * factor * gradient, rtol=1e-6, atol=1e-6)


def test_the_length_is_measured_only_where_it_is_asked_for() -> None:
    layer = nn.Linear(2, 1)
    layer(torch.ones(1, 2)).sum().backward()
    assert update_weights(state_of(layer), 0.5, clip_grad_norm=1.0, measure_norm=False) is None


def test_fp16_leaves_out_a_gradient_that_overflows_and_lowers_the_scale() -> None:
    layer = nn.Linear(2, 1)
    before, state = layer.weight.detach().clone(), state_of(layer, "fp16")
    for factor in (math.inf, 0.5):
        layer.zero_grad()
        state.scaler.scale(factor * layer.weight.sum()).backward()
        norm = update_weights(state, 0.25, clip_grad_norm=None, measure_norm=True)
    assert norm is not None
    assert float(norm) == pytest.approx(0.5 * math.sqrt(2))  # of the gradient, not of the scaled one
    torch.testing.assert_close(layer.weight.detach(), before - 0.25 * 0.5)
    assert state.state_dict()["scaler"]["scale"] == 2.0**15
