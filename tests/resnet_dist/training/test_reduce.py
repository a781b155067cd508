"""The exact reduction's order of additions, the same for every split of the micro-batches; and PowerSGD."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from resnet_dist.config.low_rank import RANK
from resnet_dist.config.recipe import TrainConfig
from resnet_dist.data.order import micro_batch_share
from resnet_dist.training.reduce import Accumulator, Node, PowerSgdReduction, split, subtrees, tree_sum

T = TypeVar("T")


def total(values: Sequence[T], plus: Callable[[T, T], T]) -> T:
    """One worker's sum of all micro-batches."""
    return tree_sum({Node(i, i + 1): value for i, value in enumerate(values)}, Node(0, len(values)), plus)


def plus(a: str, b: str) -> str:
    return f"({a}+{b})"


def summed_by_workers(num_micro_batches: int, world_size: int) -> str:
    """The additions done when `world_size` workers share the micro-batches, spelt out."""
    everyone: dict[Node, str] = {}
    for rank in range(world_size):
        share = micro_batch_share(num_micro_batches, rank, world_size)
        mine: list[tuple[Node, str]] = []
        for micro_batch in share:
            Accumulator(num_micro_batches).add(mine, micro_batch, str(micro_batch), plus)
        assert [node for node, _ in mine] == subtrees(share, num_micro_batches)
        everyone |= dict(mine)
    return tree_sum(everyone, Node(0, num_micro_batches), plus)


def test_the_tree_of_six() -> None:
    assert split(Node(0, 6)) == (Node(0, 4), Node(4, 6))
    assert total("abcdef", plus) == "(((a+b)+(c+d))+(e+f))"
    assert subtrees(range(1, 6), 6) == [Node(1, 2), Node(2, 4), Node(4, 6)]


@given(st.integers(1, 70), st.data())
def test_every_split_does_the_same_additions(num_micro_batches: int, data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, num_micro_batches))
    alone = total([str(i) for i in range(num_micro_batches)], plus)
    assert summed_by_workers(num_micro_batches, world_size) == alone


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_floats_come_out_to_the_last_bit(world_size: int) -> None:
    values = [random.Random(i).uniform(-1, 1) * 10 ** (i % 7) for i in range(8)]
    sums: dict[Node, float] = {}
    for rank in range(world_size):
        mine: list[tuple[Node, float]] = []
        for i in micro_batch_share(8, rank, world_size):
            Accumulator(8).add(mine, i, values[i], lambda a, b: a + b)
        sums |= dict(mine)
    assert tree_sum(sums, Node(0, 8), lambda a, b: a + b) == total(values, lambda a, b: a + b)


# PowerSGD


def step(reduction: PowerSgdReduction, layer: nn.Module, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """What the reduction makes of these gradients."""
    for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    reduction.finish()
    return [p.grad.clone() for p in layer.parameters() if p.grad is not None]


@pytest.fixture
def layer() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(40, 50, 3).double()


def test_a_gradient_of_low_rank_is_sent_exactly(layer: nn.Conv2d) -> None:
    reduction = PowerSgdReduction(layer, rank=0, world_size=1, num_micro_batches=1)
    gradient = (torch.randn(50, RANK).double() @ torch.randn(RANK, 360).double()).view_as(layer.weight)
    bias = torch.randn(50).double()
    for _ in range(2):
        sent = step(reduction, layer, [gradient, bias])
        torch.testing.assert_close(sent[0], gradient)
        assert torch.equal(sent[1], bias)


def test_what_one_step_loses_is_added_to_the_next(layer: nn.Conv2d) -> None:
    reduction = PowerSgdReduction(layer, rank=0, world_size=1, num_micro_batches=1)
    given, sent = [], []
    for _ in range(6):
        gradient = torch.randn_like(layer.weight)
        given.append(gradient)
        sent.append(step(reduction, layer, [gradient, torch.zeros(50).double()])[0])
    assert all(int(torch.linalg.matrix_rank(s.view(50, -1))) == RANK for s in sent)
    kept = reduction.state_dict()["residuals"][0].view_as(layer.weight)
    torch.testing.assert_close(sum(sent) + kept, sum(given))


def test_a_layer_without_a_gradient_gets_one_later(layer: nn.Conv2d) -> None:
    """As with zero-initialised gammas: the first steps' gradients are zero."""
    reduction = PowerSgdReduction(layer, rank=0, world_size=1, num_micro_batches=1)
    zero, bias = torch.zeros_like(layer.weight), torch.zeros(50).double()
    for _ in range(2):
        assert not step(reduction, layer, [zero, bias])[0].any()
    gradient = torch.randn_like(layer.weight)
    first, second = (step(reduction, layer, [gradient, bias])[0] for _ in range(2))
    assert torch.isfinite(first).all()
    assert float((second * gradient).sum()) > 0  # a way down


@pytest.mark.parametrize("change", [{"reduction": "exact"}, {"precision": "fp16"}])
def test_refused(change: dict[str, str]) -> None:
    train = {"global_batch_size": 8, "micro_batch_size": 4, "total_epochs": 1, "gradient_compression": "powersgd"}
    assert TrainConfig.model_validate(train).gradient_compression == "powersgd"
    with pytest.raises(ValueError, match="gradient_compression: powersgd"):
        TrainConfig.model_validate({**train, **change})
