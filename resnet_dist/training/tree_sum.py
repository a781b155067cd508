"""Sums over a step's micro-batches in one fixed order, however the micro-batches are shared out.

Floating-point addition is not associative, so a sum depends on its order. Here the order is a binary tree over the
micro-batches 0 .. M-1, fixed by M alone: the left half of a node is the largest power of two below its size. A worker
that holds a contiguous run of micro-batches sums whole subtrees of it; the sums of subtrees are then added up the same
tree. Any split of the run over workers gives the same additions, hence the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Node(NamedTuple):
    """The micro-batches start .. stop-1, a subtree of the tree."""

    start: int
    stop: int


def split(node: Node) -> tuple[Node, Node]:
    """The two halves of a node of two or more micro-batches."""
    left = 1 << (node.stop - node.start - 1).bit_length() - 1
    return Node(node.start, node.start + left), Node(node.start + left, node.stop)


def parents(num_micro_batches: int) -> dict[tuple[Node, Node], Node]:
    """Every pair of halves in the tree, with the node they make."""
    found: dict[tuple[Node, Node], Node] = {}
    pending = [Node(0, num_micro_batches)]
    while pending:
        node = pending.pop()
        if node.stop - node.start > 1:
            found[split(node)] = node
            pending.extend(split(node))
    return found


def subtrees(share: range, num_micro_batches: int) -> list[Node]:
    """The largest subtrees that lie in `share`, from left to right: what a worker with that share ends up with."""
    stack: list[Node] = []
    above = parents(num_micro_batches)
    for micro_batch in share:
        stack.append(Node(micro_batch, micro_batch + 1))
        while len(stack) > 1 and (stack[-2], stack[-1]) in above:
            stack[-2:] = [above[stack[-2], stack[-1]]]
    return stack


class Accumulator:
    """Adds one worker's micro-batches, in their order, into the sums of its subtrees; holds log2(M) values at most."""

    def __init__(self, num_micro_batches: int) -> None:
        self._above = parents(num_micro_batches)

    def add(self, sums: list[tuple[Node, T]], micro_batch: int, value: T, plus: Callable[[T, T], T]) -> None:
        """Puts `value` of `micro_batch` on the stack `sums` and adds up what now makes whole nodes."""
        sums.append((Node(micro_batch, micro_batch + 1), value))
        while len(sums) > 1 and (sums[-2][0], sums[-1][0]) in self._above:
            (left, a), (right, b) = sums[-2:]
            sums[-2:] = [(self._above[left, right], plus(a, b))]


def tree_sum(values: Mapping[Node, T], root: Node, plus: Callable[[T, T], T]) -> T:
    """The sum at `root` from the sums of subtrees that cover it without overlap."""
    if root in values:
        return values[root]
    left, right = split(root)
    return plus(tree_sum(values, left, plus), tree_sum(values, right, plus))
