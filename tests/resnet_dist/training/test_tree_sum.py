"""The fixed order of the exact reduction: the same additions for every split of the micro-batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.data.order import micro_batch_share
from resnet_dist.training.reduce import Accumulator, Node, split, subtrees, tree_sum

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
