"""How the micro-batches' gradients of one step become one gradient, the same on every worker.

The loss of a step is the mean over its M micro-batches. Three ways: `fast` (DDP, optionally compressed), `exact` (the
same bits for any number of workers), `powersgd` (low-rank factors).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from resnet_dist.config.low_rank import RANK, matrix, sent_as_factors
from resnet_dist.data.order import micro_batch_share
from resnet_dist.training.collectives import Stopwatch

Compression = Literal["none", "bf16", "fp16", "powersgd"]
"""powersgd is not one of DDP's hooks, but a separate reduction."""
_FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16}
_HOOKS = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}
_CHUNK_NUMBERS = 1 << 22
"""How many numbers of the gradient are exchanged at a time: limits the memory of `exact` beyond its sums."""

T = TypeVar("T")


class Reduction(Protocol):
    forward: nn.Module
    """The module to call for a forward pass."""
    wait: Stopwatch
    """Runs while a worker that has its own gradients waits for those of the rest."""

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        """Goes around the forward and backward pass of a micro-batch; `is_last` of this worker's in the step."""

    def backward(self, loss: Tensor, micro_batch: int) -> None:
        """Backward pass of one micro-batch's mean loss."""

    def finish(self) -> None:
        """After the last micro-batch: every parameter's `grad` is the step's gradient, on all workers."""


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
            # The gradient of the first layer comes last; after it, backward only waits for the all-reduce.
            first.register_post_accumulate_grad_hook(lambda _: self.wait.begin() if self._syncs else None)

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        self._syncs = is_last
        return nullcontext() if is_last or self._ddp is None else self._ddp.no_sync()

    def backward(self, loss: Tensor, micro_batch: int) -> None:
        (loss * self._scale).backward()
        self.wait.end()

    def finish(self) -> None:
        """With several workers DDP has reduced the gradients in `backward`."""
        if self._ddp is None:
            round_gradients(self.forward.parameters(), self._compression)


def compress(ddp: DistributedDataParallel, compression: Compression) -> None:
    """Each worker's part of the gradient is rounded, divided by the number of workers and summed in that format."""
    if compression != "none":
        ddp.register_comm_hook(None, _HOOKS[compression])


def round_gradients(parameters: Iterable[nn.Parameter], compression: Compression) -> None:
    """`compress` for one worker: nothing is sent, but the gradients are rounded as for several."""
    for parameter in parameters if compression != "none" else ():
        if parameter.grad is not None:
            parameter.grad.copy_(parameter.grad.to(_FORMATS[compression]))


# The exact reduction


class ExactReduction:
    """Sums the micro-batches' gradients in one fixed tree order: the same bits for any number of workers.

    Workers exchange the sums of their subtrees (some log2(M / W) of them, where `fast` sends two) and each adds them
    up. This costs traffic, none of which overlaps with the backward pass.
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

    def _combine(self, mine: Tensor) -> Tensor:
        """This worker's sums of subtrees [nodes, n] -> the sum of the tree [n]."""
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


# The order of the exact sums. Floating-point addition is not associative, so a sum depends on its order. Here the order
# is a binary tree over the micro-batches 0 .. M-1, fixed by M alone: the left half of a node is the largest power of
# two below its size. A worker with a contiguous share of the micro-batches sums whole subtrees of it; the sums of
# subtrees are then added up in the same tree. Any split over workers gives the same additions, and so the same bits.


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
    """The largest subtrees within `share`, from left to right: those whose sums a worker with that share has."""
    stack: list[Node] = []
    above = parents(num_micro_batches)
    for micro_batch in share:
        stack.append(Node(micro_batch, micro_batch + 1))
        while len(stack) > 1 and (stack[-2], stack[-1]) in above:
            stack[-2:] = [above[stack[-2], stack[-1]]]
    return stack


class Accumulator:
    """Adds up one worker's micro-batches, in order, to the sums of its subtrees; at most log2(M) values at a time."""

    def __init__(self, num_micro_batches: int) -> None:
        self._above = parents(num_micro_batches)

    def add(self, sums: list[tuple[Node, T]], micro_batch: int, value: T, plus: Callable[[T, T], T]) -> None:
        """Pushes `value` of `micro_batch` on the stack `sums` and adds up what now completes a node."""
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


# PowerSGD


class PowerSgdReduction:
    """PowerSGD (Vogels et al. 2019, algorithm 1): workers send low-rank factors of the gradient, after backward.

    The gradient of a layer, as a matrix [outputs, inputs x kernel], becomes P Q^T with P [outputs, rank] and
    Q [.., rank]: one step of power iteration from the Q of the previous step. The error of that approximation is added
    to the next step's gradient.

    All of it is linear in the gradients, so only their sum over the workers matters, and the sum of the residuals: the
    result is equal for any number of workers up to float rounding, also for one. torch's own hook keeps its memory by
    DDP bucket, loses it with the process, and does nothing with one worker.
    """

    def __init__(self, model: nn.Module, rank: int, world_size: int, num_micro_batches: int) -> None:
        self.forward = model
        self._is_first, self._world_size, self._scale = rank == 0, world_size, 1.0 / num_micro_batches
        self._groups: list[list[nn.Parameter]] = []
        """The parameters that are sent as factors, grouped by shape."""
        self._whole: list[nn.Parameter] = []
        by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}
        for parameter in (p for p in model.parameters() if p.requires_grad):
            if sent_as_factors(tuple(parameter.shape)):
                by_shape.setdefault(matrix(tuple(parameter.shape)), []).append(parameter)
            else:
                self._whole.append(parameter)
        self._groups = list(by_shape.values())
        first = next(model.parameters())
        self.wait = Stopwatch(first.device)
        draws = torch.Generator().manual_seed(0)
        self._queries: list[Tensor] = []
        """Q of every group: [layers, columns, rank], equal on all workers."""
        self._residuals: list[Tensor] = []
        """What this worker has not sent of its gradient, [layers, rows, columns]; only the sum over workers matters."""
        for (rows, columns), group in by_shape.items():
            query = torch.randn((len(group), columns, RANK), generator=draws, dtype=first.dtype)
            self._queries.append(query.to(first.device))
            self._residuals.append(torch.zeros((len(group), rows, columns), dtype=first.dtype, device=first.device))

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor, micro_batch: int) -> None:
        (loss * self._scale).backward()

    @torch.no_grad()
    def finish(self) -> None:
        """Every parameter's `grad` becomes the step's, on all workers."""
        stacked = [torch.stack([_matrix(p) for p in group]) for group in self._groups]
        mine = [gradient + residual for gradient, residual in zip(stacked, self._residuals, strict=True)]
        whole = [gradient_of(p) for p in self._whole]
        sums = self._summed([m @ q for m, q in zip(mine, self._queries, strict=True)] + whole)
        bases = [torch.linalg.qr(p).Q for p in sums[: len(mine)]]
        shares = [m.mT @ b for m, b in zip(mine, bases, strict=True)]
        self._residuals = [m - b @ s.mT for m, b, s in zip(mine, bases, shares, strict=True)]
        self._queries = self._summed(shares)
        for group, basis, query in zip(self._groups, bases, self._queries, strict=True):
            for parameter, gradient in zip(group, basis @ query.mT, strict=True):
                parameter.grad = gradient.view_as(parameter)
        for parameter, gradient in zip(self._whole, sums[len(mine) :], strict=True):
            parameter.grad = gradient

    def gather(self) -> None:
        """Before a checkpoint: rank 0, which writes it, gets all workers' residuals. All workers call it together."""
        sums = self._summed(self._residuals)
        self._residuals = sums if self._is_first else [torch.zeros_like(residual) for residual in sums]

    def state_dict(self) -> dict[str, Any]:
        return {"queries": list(self._queries), "residuals": list(self._residuals)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._queries, self._residuals = list(saved["queries"]), list(saved["residuals"])
        if not self._is_first:
            self._residuals = [torch.zeros_like(residual) for residual in self._residuals]

    def _summed(self, tensors: list[Tensor]) -> list[Tensor]:
        """The sums over the workers, in one message."""
        if self._world_size == 1:
            return tensors
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self.wait.begin()
        dist.all_reduce(flat)
        self.wait.end()
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def gradient_of(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _matrix(parameter: nn.Parameter) -> Tensor:
    return gradient_of(parameter).reshape(len(parameter), -1)
