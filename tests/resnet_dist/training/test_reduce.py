"""The exact reduction's order of additions, the same for every split of the micro-batches; rounding; PowerSGD."""

from __future__ import annotations

from typing import Any

import pytest
import small_run as small
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from resnet_dist.config.low_rank import RANK
from resnet_dist.data.order import micro_batch_share
from resnet_dist.training.reduce import (
    FastReduction,
    PowerSgdReduction,
    Subtree,
    SubtreeSums,
    buckets_of,
    halves,
    subtrees,
    tree_sum,
)


def plus(a: str, b: str) -> str:
    return f"({a}+{b})"


def summed_by_workers(num_micro_batches: int, world_size: int) -> str:
    """The additions done when `world_size` workers share the micro-batches, spelt out."""
    everyone: dict[Subtree, str] = {}
    for rank in range(world_size):
        share = micro_batch_share(num_micro_batches, rank, world_size)
        mine = SubtreeSums[str](num_micro_batches, plus)
        for micro_batch in share:
            mine.add(micro_batch, str(micro_batch))
        assert [tree for tree, _ in mine.sums] == subtrees(share, num_micro_batches)
        everyone |= dict(mine.sums)
    return tree_sum(everyone, Subtree(0, num_micro_batches), plus)


def test_the_tree_of_six() -> None:
    assert halves(Subtree(0, 6)) == (Subtree(0, 4), Subtree(4, 6))
    assert summed_by_workers(6, 1) == summed_by_workers(6, 4) == "(((0+1)+(2+3))+(4+5))"
    assert subtrees(range(1, 6), 6) == [Subtree(1, 2), Subtree(2, 4), Subtree(4, 6)]


@given(st.integers(1, 70), st.data())
def test_every_split_does_the_same_additions(num_micro_batches: int, data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, num_micro_batches))
    single = {Subtree(i, i + 1): str(i) for i in range(num_micro_batches)}
    expected = tree_sum(single, Subtree(0, num_micro_batches), plus)
    assert summed_by_workers(num_micro_batches, world_size) == expected


@pytest.mark.parametrize(("compression", "digits"), [("bf16", 8), ("fp16", 11)])
def test_one_worker_rounds_as_many_do(compression: Any, digits: int) -> None:
    layer = nn.Linear(5, 3)
    reduction = FastReduction(layer, 1, num_micro_batches=1, compression=compression)
    exact, inputs = torch.randn(3, 5), torch.eye(5)
    reduction.start_launch(is_last=True)
    reduction.backward((reduction.forward(inputs) * exact.T).sum().view(1), range(1))
    reduction.finish()
    gradient = layer.weight.grad
    assert gradient is not None
    mantissa, _ = torch.frexp(gradient)
    assert torch.equal(mantissa * 2**digits, (mantissa * 2**digits).round())
    torch.testing.assert_close(gradient, exact, rtol=2.0**-digits, atol=0)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(4, 160))
def test_buckets_hold_every_gradient_once_in_the_parameters_memory_order(sizes: list[int], max_bytes: int) -> None:
    parameters = [nn.Parameter(torch.randn(size, 3, 2, 2)) for size in sizes]
    parameters[0].data = parameters[0].data.contiguous(memory_format=torch.channels_last)
    buckets = buckets_of(parameters, max_bytes)
    assert [p for bucket in buckets for p in bucket.parameters] == parameters[::-1]
    for bucket in buckets:
        assert len(bucket.parameters) == 1 or bucket.flat.nbytes <= max_bytes
        bucket.flat.copy_(torch.cat([p.detach().as_strided((p.numel(),), (1,)) for p in bucket.parameters]))
    for parameter in parameters:
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, parameter)
        assert parameter.grad.stride() == parameter.stride()


@pytest.mark.parametrize(
    ("compression", "change", "reason"),
    [
        ("bf16", {"reduction": "exact"}, "gradient_compression: bf16 needs reduction: fast"),
        ("powersgd", {"reduction": "exact"}, "gradient_compression: powersgd"),
        ("powersgd", {"precision": "fp16"}, "gradient_compression: powersgd"),
    ],
)
def test_compression_that_cannot_be_had_is_refused(compression: str, change: dict[str, str], reason: str) -> None:
    assert small.train_config(gradient_compression=compression).gradient_compression == compression
    with pytest.raises(ValueError, match=reason):
        small.train_config(gradient_compression=compression, **change)


# PowerSGD


@pytest.fixture
def layer() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(40, 50, 3).double()


@pytest.fixture
def reduction(layer: nn.Conv2d) -> PowerSgdReduction:
    return PowerSgdReduction(layer, rank=0, world_size=1, num_micro_batches=1)


def reduced(reduction: PowerSgdReduction, weight: torch.Tensor, bias: torch.Tensor) -> list[torch.Tensor]:
    """What the reduction makes of these gradients."""
    for parameter, gradient in zip(reduction.forward.parameters(), (weight, bias), strict=True):
        parameter.grad = gradient.clone()
    reduction.finish()
    return [p.grad.clone() for p in reduction.forward.parameters() if p.grad is not None]


def test_a_gradient_of_low_rank_is_sent_exactly(layer: nn.Conv2d, reduction: PowerSgdReduction) -> None:
    gradient = (torch.randn(50, RANK).double() @ torch.randn(RANK, 360).double()).view_as(layer.weight)
    bias = torch.randn(50).double()
    for _ in range(2):
        sent = reduced(reduction, gradient, bias)
        torch.testing.assert_close(sent[0], gradient)
        assert torch.equal(sent[1], bias)


def test_what_one_step_loses_is_added_to_the_next(layer: nn.Conv2d, reduction: PowerSgdReduction) -> None:
    given = [torch.randn_like(layer.weight) for _ in range(6)]
    sent = [reduced(reduction, gradient, torch.zeros(50).double())[0] for gradient in given]
    assert all(int(torch.linalg.matrix_rank(s.view(50, -1))) == RANK for s in sent)
    kept = reduction.state_dict()["residuals"][0].view_as(layer.weight)
    torch.testing.assert_close(sum(sent) + kept, sum(given))


def test_a_layer_without_a_gradient_gets_one_later(layer: nn.Conv2d, reduction: PowerSgdReduction) -> None:
    """As with zero-initialised gammas: the first steps' gradients are zero."""
    zero, bias = torch.zeros_like(layer.weight), torch.zeros(50).double()
    for _ in range(2):
        assert not reduced(reduction, zero, bias)[0].any()
    gradient = torch.randn_like(layer.weight)
    first, second = (reduced(reduction, gradient, bias)[0] for _ in range(2))
    assert torch.isfinite(first).all()
    assert float((second * gradient).sum()) > 0  # a way down
