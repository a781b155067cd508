"""What reduction and update cost on a GPU: launches and waits for the device, counted on fake CUDA tensors.

Of ResNet-50, whose 161 parameters are laid out as NHWC, so one launch for each of them would show.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

import pytest
import small_run as small
import torch
from fake_cuda import Operations, fake_cuda, launches, on_fake_cuda

from resnet_dist.config.recipe import EmaConfig
from resnet_dist.training.model import Precision, build_optimizer
from resnet_dist.training.reduce import ExactReduction, PowerSgdReduction
from resnet_dist.training.state import MovingAverage, TrainState
from resnet_dist.training.step import update_weights


def give_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Laid out as autograd does it."""
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)


def update(optim: dict[str, Any], precision: str) -> Operations:
    """The third update."""
    recipe = small.recipe(precision, model={"name": "resnet50", "num_classes": 1000}, optim=optim)
    with fake_cuda() as device:
        classifier = on_fake_cuda(recipe)
        scaler = Precision(precision).scaler(device)  # type: ignore[arg-type]
        state = TrainState(classifier.net, build_optimizer(classifier, recipe.optim), scaler=scaler)
        for _ in range(3):
            scaler.scale(torch.zeros(()))
            give_gradients(state.parameters)
            with Operations() as operations:
                update_weights(state, 0.1, clip_grad_norm=recipe.optim.clip_grad_norm, measure_norm=False)
    return operations


@pytest.mark.parametrize(
    ("optim", "precision", "num_launches", "num_waits"),
    [
        ({}, "bf16", 2, 0),  # weights with weight decay; biases and norms without
        ({"clip_grad_norm": 1.0}, "bf16", 10, 0),
        ({}, "fp16", 11, 0),
        ({"clip_grad_norm": 1.0}, "fp16", 19, 0),
        # The 54 weights' trust ratios are numbers on the device, which torch does not take in one launch.
        ({"name": "lamb", "lr": 0.1}, "bf16", 81, 0),
        ({"name": "lamb", "lr": 0.1}, "fp16", 89, 1),  # whether the gradient overflowed
    ],
)
def test_an_update(optim: dict[str, Any], precision: str, num_launches: int, num_waits: int) -> None:
    operations = update(optim, precision)
    assert sum(operations.launches.values()) <= num_launches, operations.launches
    assert sum(operations.syncs.values()) == num_waits, operations.syncs


def test_a_moving_average_takes_two_launches() -> None:
    recipe = small.recipe(model={"name": "resnet50", "num_classes": 1000})
    with fake_cuda():
        classifier = on_fake_cuda(recipe)
        average = MovingAverage(classifier.net, EmaConfig(decay=0.9), steps_per_epoch=1)
        with Operations() as operations:
            average.update(num_steps=2)
    assert operations.launches == Counter({"_foreach_lerp_": 1, "_foreach_copy_": 1})


@pytest.mark.parametrize(
    ("kind", "per_micro_batch", "at_the_end"),
    [
        # The losses' sum, one concatenation, and the additions of the tree; at the end the mean
        (ExactReduction, [["sum", "cat"], ["sum", "cat", "add"], ["sum", "cat"], ["sum", "cat", "add", "add"]], 3),
        # The scale of the loss; at the end 21 groups of equal shape, and 17 layouts of 3x3 weights each way
        (PowerSgdReduction, [["sum", "mul"]] * 4, 202),
    ],
)
def test_a_reduction(
    kind: type[ExactReduction | PowerSgdReduction], per_micro_batch: list[list[str]], at_the_end: int
) -> None:
    """Its gradients have their parameters' strides, which the fused update needs."""
    recipe = small.recipe(model={"name": "resnet50", "num_classes": 1000})
    with fake_cuda():
        classifier = on_fake_cuda(recipe)
        reduction, losses = kind(classifier, 0, 1, num_micro_batches=4), torch.zeros(1)
        with patch.object(torch.Tensor, "backward", lambda _: give_gradients(classifier.parameters())):
            for micro_batch, expected in enumerate(per_micro_batch):
                with Operations() as operations:
                    reduction.backward(losses, range(micro_batch, micro_batch + 1))
                assert operations.launches == Counter(expected)
        with Operations() as operations:
            reduction.finish()
        assert sum(operations.launches.values()) <= at_the_end, operations.launches
        assert not operations.syncs
        assert all(launches(([p.grad], [p])) == 1 for p in classifier.parameters())


def test_a_fused_update_has_its_momentum_before_the_first_step() -> None:
    """Which may be skipped: with it the memory of torch's own would stay uninitialised."""
    recipe = small.recipe()
    with fake_cuda():
        net = on_fake_cuda(recipe).net
        optimizer, other = build_optimizer(net, recipe.optim), build_optimizer(net, recipe.optim)
        assert all(optimizer.state[p]["momentum_buffer"].stride() == p.stride() for p in net.parameters())
        saved = {"state": {}, "param_groups": optimizer.state_dict()["param_groups"]}  # before the first step, of a CPU
        for group in saved["param_groups"]:
            group["fused"] = None
        other.load_state_dict(saved)
        assert all("momentum_buffer" in other.state[p] for p in net.parameters())
        assert all(group["fused"] for group in other.param_groups)


def test_momentum_of_a_checkpoint_gets_the_parameters_memory_order() -> None:
    """The fused kernel needs it; earlier versions of `exact` wrote NCHW for NHWC weights."""
    recipe = small.recipe()
    with fake_cuda():
        net = on_fake_cuda(recipe).net
        optimizer = build_optimizer(net, recipe.optim)
        saved = optimizer.state_dict()
        for state in saved["state"].values():
            state["momentum_buffer"] = state["momentum_buffer"].contiguous()
        optimizer.load_state_dict(saved)
        assert all(optimizer.state[p]["momentum_buffer"].stride() == p.stride() for p in net.parameters())


def test_a_checkpoint_of_a_gpu_trains_unfused_on_a_cpu() -> None:
    net = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(net, small.recipe().optim)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["fused"] = True
    optimizer.load_state_dict(saved)
    assert all(group["fused"] is None for group in optimizer.param_groups)
