"""How the micro-batches' gradients of one step become one gradient, the same on every worker.

A step's loss is the mean over its M micro-batches. Batch-norm buffers are nobody's business here: rank 0 owns them
(`collectives.share_buffers`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resnet_dist.data.order import micro_batch_share
from resnet_dist.training.compression import Compression, compress, round_gradients
from resnet_dist.training.powersgd import PowerSgdReduction, gradient_of
from resnet_dist.training.stopwatch import Stopwatch
from resnet_dist.training.tree_sum import Accumulator, Node, subtrees, tree_sum

_CHUNK_NUMBERS = 1 << 22
"""How much of the gradient workers exchange at a time: bounds the memory of `exact` beyond its sums."""


class Reduction(Protocol):
    forward: nn.Module
    wait: Stopwatch
    """Runs while a worker that has its own gradients waits for the others'."""

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        """Around forward and backward pass of one of this worker's micro-batches; `is_last` of the step."""

    def backward(self, loss: Tensor, micro_batch: int) -> None:
        """Backward pass of one micro-batch's mean loss."""

    def finish(self) -> None:
        """After the last micro-batch: every parameter's `grad` is the step's gradient, on all workers."""

    def settle(self) -> None:
        """Before a checkpoint, on all workers together: what they keep from step to step becomes the first one's."""


def build_reduction(
    kind: Literal["fast", "exact"],
    model: nn.Module,
    *,
    rank: int,
    world_size: int,
    num_micro_batches: int,
    compression: Compression = "none",
) -> Reduction:
    if kind == "exact":
        return ExactReduction(model, rank, world_size, num_micro_batches)
    if compression == "powersgd":
        return PowerSgdReduction(model, rank, world_size, num_micro_batches)
    return FastReduction(model, world_size, num_micro_batches, compression)


class FastReduction:
    """DDP's bucketed all-reduce, overlapped with the last local micro-batch's backward pass.

    DDP averages gradients over the W workers, so each micro-batch's loss is scaled by W / M: the sum over all
    micro-batches, divided by W, is then the mean over M, also where the workers' shares differ in size. Equal across
    worker counts up to float rounding.
    """

    def __init__(
        self, model: nn.Module, world_size: int, num_micro_batches: int, compression: Compression = "none"
    ) -> None:
        self._compression = compression
        self._ddp = (
            DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
            if world_size > 1
            else None
        )
        self.forward: nn.Module = self._ddp or model
        self._scale = world_size / num_micro_batches
        self._syncs = False
        first = next(model.parameters())
        self.wait = Stopwatch(first.device)
        if self._ddp is not None:
            compress(self._ddp, compression)
            # The gradient of the first layer comes last; from then on backward only waits for the all-reduce.
            first.register_post_accumulate_grad_hook(lambda _: self.wait.begin() if self._syncs else None)

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        self._syncs = is_last
        return nullcontext() if is_last or self._ddp is None else self._ddp.no_sync()

    def backward(self, loss: Tensor, micro_batch: int) -> None:
        (loss * self._scale).backward()
        self.wait.end()

    def finish(self) -> None:
        """DDP has done it."""
        if self._ddp is None:
            round_gradients(self.forward.parameters(), self._compression)

    def settle(self) -> None:
        """Keeps nothing."""


class ExactReduction:
    """Sums the micro-batches' gradients in one fixed tree order: the same bits for any number of workers.

    Workers exchange the sums of their subtrees (some log2(M / W) of them, against the two that `fast` sends) and add
    them up, each for itself. Costs traffic and no overlap; proves everything else.
    """

    def __init__(self, model: nn.Module, rank: int, world_size: int, num_micro_batches: int) -> None:
        self.forward = model
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.wait = Stopwatch(self._parameters[0].device)
        self._world_size = world_size
        self._root = Node(0, num_micro_batches)
        self._nodes = [
            subtrees(micro_batch_share(num_micro_batches, r, world_size), num_micro_batches) for r in range(world_size)
        ]
        self._accumulator = Accumulator(num_micro_batches)
        self._sums: list[tuple[Node, Tensor]] = []

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor, micro_batch: int) -> None:
        loss.backward()
        gradient = torch.cat([gradient_of(p).reshape(-1) for p in self._parameters])
        for parameter in self._parameters:
            parameter.grad = None
        self._accumulator.add(self._sums, micro_batch, gradient, torch.add)

    def finish(self) -> None:
        mine = torch.stack([value for _, value in self._sums])
        self._sums.clear()
        mean = torch.cat([self._combine(chunk) for chunk in mine.split(_CHUNK_NUMBERS, dim=1)]) / self._root.stop
        offset = 0
        for parameter in self._parameters:
            parameter.grad = mean[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()

    def settle(self) -> None:
        """Keeps nothing."""

    def _combine(self, mine: Tensor) -> Tensor:
        """This worker's subtree sums [nodes, n] -> the tree's sum [n]."""
        everyone = [mine]
        if self._world_size > 1:
            most = max(len(nodes) for nodes in self._nodes)
            padded = mine.new_zeros((most, mine.shape[1]))
            padded[: len(mine)] = mine
            everyone = [torch.empty_like(padded) for _ in range(self._world_size)]
            self.wait.begin()
            dist.all_gather(everyone, padded)
            self.wait.end()
        sums = {
            node: rows[i] for nodes, rows in zip(self._nodes, everyone, strict=True) for i, node in enumerate(nodes)
        }
        return tree_sum(sums, self._root, torch.add)
