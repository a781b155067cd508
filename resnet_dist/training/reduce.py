"""How the gradients of one step's micro-batches become one gradient, the same on every worker.

The loss of a step is the mean over its M micro-batches. Three reductions: `fast` (DDP, optionally compressed), `exact`
(the same bits for any number of workers), `powersgd` (low-rank factors).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from resnet_dist.config.low_rank import RANK, matrix, sent_as_factors
from resnet_dist.data.order import micro_batch_share
from resnet_dist.training.device import DeviceTimer

Compression = Literal["none", "bf16", "fp16", "powersgd"]
"""powersgd is not one of DDP's hooks, but a separate reduction."""
_FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16}
_HOOKS = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}
_CHUNK_NUMBERS = 1 << 22
"""How many numbers of the gradient are exchanged at a time: limits the memory of `exact` beyond its sums."""

T = TypeVar("T")


class Reduction(Protocol):
    """Per step: `forward` and `backward` of each of this worker's micro-batches, in order, then `finish`."""

    forward: nn.Module
    """The module to call for a forward pass."""
    wait: DeviceTimer
    """Runs while a worker that has its own gradients waits for those of the rest."""

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        """Goes around the forward and backward pass of a micro-batch; `is_last` of this worker's in the step."""

    def backward(self, loss: Tensor, micro_batch: int) -> None:
        """Backward pass of one micro-batch's mean loss, a scalar."""

    def finish(self) -> None:
        """After the last micro-batch: every parameter's `grad` is the step's gradient, on all workers."""


def build_reduction(
    kind: Literal["fast", "exact"],
    model: nn.Module,
    *,
    rank: int,
    world_size: int,
    num_micro_batches: int,
    compression: Compression,
) -> Reduction:
    if kind == "exact":
        return ExactReduction(model, rank, world_size, num_micro_batches)
    if compression == "powersgd":
        return PowerSgdReduction(model, rank, world_size, num_micro_batches)
    return FastReduction(model, world_size, num_micro_batches, compression)


def gradient_of(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


# fast: DDP


class FastReduction:
    """DDP's bucketed all-reduce, overlapped with the last local micro-batch's backward pass.

    Equal across worker counts up to float rounding.
    """

    def __init__(self, model: nn.Module, world_size: int, num_micro_batches: int, compression: Compression) -> None:
        self._compression = compression
        self._ddp = (
            DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
            if world_size > 1
            else None
        )
        self.forward: nn.Module = self._ddp or model
        # DDP averages over the W workers. With each micro-batch's loss scaled by W / M, the sum over all micro-batches
        # divided by W is the mean over M, also where the workers' shares differ in size.
        self._scale = world_size / num_micro_batches
        self._syncs = False
        first = next(model.parameters())
        self.wait = DeviceTimer(first.device)
        if self._ddp is not None:
            if compression != "none":
                # Each worker's part of the gradient is rounded, divided by W and summed in that format.
                self._ddp.register_comm_hook(None, _HOOKS[compression])
            # The gradient of the first layer comes last; after it, backward only waits for the all-reduce.
            first.register_post_accumulate_grad_hook(lambda _: self.wait.begin() if self._syncs else None)

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        self._syncs = is_last
        return nullcontext() if is_last or self._ddp is None else self._ddp.no_sync()

    def backward(self, loss: Tensor, micro_batch: int) -> None:
        (loss * self._scale).backward()
        self.wait.end()

    def finish(self) -> None:
        # With several workers DDP has reduced the gradients in `backward`.
        if self._ddp is None:
            round_gradients(self.forward.parameters(), self._compression)


def round_gradients(parameters: Iterable[nn.Parameter], compression: Compression) -> None:
    """What compression does to a single worker: nothing is sent, but the gradients are rounded as for several."""
    for parameter in parameters if compression != "none" else ():
        if parameter.grad is not None:
            parameter.grad.copy_(parameter.grad.to(_FORMATS[compression]))


# exact: sums in one order
#
# Floating-point addition is not associative, so a sum depends on its order. Here the order is a binary tree over the
# micro-batches 0 .. M-1, fixed by M alone: the left half of a subtree is the largest power of two below its size. For
# M = 6: ((0 + 1) + (2 + 3)) + (4 + 5). A worker with a contiguous share of the micro-batches adds up whole subtrees;
# then every worker adds the sums of all subtrees in the same tree. Any split over workers gives the same additions, and
# so the same bits.


class Subtree(NamedTuple):
    """The micro-batches start .. stop-1."""

    start: int
    stop: int


def halves(tree: Subtree) -> tuple[Subtree, Subtree]:
    """The left and the right half of a subtree of two or more micro-batches."""
    left = 1 << (tree.stop - tree.start - 1).bit_length() - 1
    return Subtree(tree.start, tree.start + left), Subtree(tree.start + left, tree.stop)


class SubtreeSums(Generic[T]):
    """The sums of the largest subtrees within the micro-batches so far; at most log2(M) + 1 values at a time."""

    def __init__(self, num_micro_batches: int, plus: Callable[[T, T], T]) -> None:
        self.sums: list[tuple[Subtree, T]] = []
        """From left to right."""
        self._plus = plus
        self._parents: dict[tuple[Subtree, Subtree], Subtree] = {}
        pending = [Subtree(0, num_micro_batches)]
        while pending:
            tree = pending.pop()
            if tree.stop - tree.start > 1:
                self._parents[halves(tree)] = tree
                pending.extend(halves(tree))

    def add(self, micro_batch: int, value: T) -> None:
        """Micro-batches come in order, without gaps."""
        self.sums.append((Subtree(micro_batch, micro_batch + 1), value))
        while len(self.sums) > 1:
            (left, a), (right, b) = self.sums[-2:]
            if (left, right) not in self._parents:
                return
            self.sums[-2:] = [(self._parents[left, right], self._plus(a, b))]


def subtrees(share: range, num_micro_batches: int) -> list[Subtree]:
    """The subtrees whose sums a worker with that share of the micro-batches has, from left to right."""
    sums = SubtreeSums[None](num_micro_batches, lambda a, b: None)
    for micro_batch in share:
        sums.add(micro_batch, None)
    return [tree for tree, _ in sums.sums]


def tree_sum(sums: Mapping[Subtree, T], tree: Subtree, plus: Callable[[T, T], T]) -> T:
    """The sum of `tree` from the sums of subtrees that cover it without overlap."""
    if tree in sums:
        return sums[tree]
    left, right = halves(tree)
    return plus(tree_sum(sums, left, plus), tree_sum(sums, right, plus))


class ExactReduction:
    """Sums the micro-batches' gradients in one fixed tree order: the same bits for any number of workers.

    Workers exchange the sums of their subtrees (some log2(M / W) of them, where `fast` sends two). None of this traffic
    overlaps with the backward pass.
    """

    def __init__(self, model: nn.Module, rank: int, world_size: int, num_micro_batches: int) -> None:
        self.forward = model
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.wait = DeviceTimer(self._parameters[0].device)
        self._num_micro_batches, self._world_size = num_micro_batches, world_size
        self._subtrees_of_rank = [
            subtrees(micro_batch_share(num_micro_batches, r, world_size), num_micro_batches) for r in range(world_size)
        ]
        self._sums = SubtreeSums[Tensor](num_micro_batches, torch.add)

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor, micro_batch: int) -> None:
        loss.backward()
        gradient = torch.cat([gradient_of(p).reshape(-1) for p in self._parameters])
        for parameter in self._parameters:
            parameter.grad = None  # or the next backward pass would add to it, in the order of the micro-batches
        self._sums.add(micro_batch, gradient)

    def finish(self) -> None:
        mine = torch.stack([value for _, value in self._sums.sums])  # [subtrees, all parameters]
        self._sums.sums.clear()
        chunks = [self._sum_over_workers(chunk) for chunk in mine.split(_CHUNK_NUMBERS, dim=1)]
        mean = torch.cat(chunks) / self._num_micro_batches
        offset = 0
        for parameter in self._parameters:
            parameter.grad = mean[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()

    def _sum_over_workers(self, mine: Tensor) -> Tensor:
        """This worker's sums of subtrees [subtrees, n] -> the sum over all micro-batches [n]."""
        everyone = [mine]
        if self._world_size > 1:
            most = max(len(trees) for trees in self._subtrees_of_rank)  # all-gather needs equal shapes
            padded = mine.new_zeros((most, mine.shape[1]))
            padded[: len(mine)] = mine
            everyone = [torch.empty_like(padded) for _ in range(self._world_size)]
            self.wait.begin()
            dist.all_gather(everyone, padded)
            self.wait.end()
        sums = {
            tree: rows[i]
            for trees, rows in zip(self._subtrees_of_rank, everyone, strict=True)
            for i, tree in enumerate(trees)
        }
        return tree_sum(sums, Subtree(0, self._num_micro_batches), torch.add)


# powersgd: low-rank factors


class PowerSgdReduction:
    """PowerSGD (Vogels et al. 2019, algorithm 1): workers send low-rank factors of the gradient, after backward.

    The gradient of a layer, as a matrix [outputs, inputs x kernel], becomes P Q^T with P [outputs, rank] and
    Q [inputs x kernel, rank]: one step of power iteration from the Q of the previous step. The error of that
    approximation is added to the next step's gradient.

    torch's own hook keeps its memory by DDP bucket, loses it with the process, and does nothing with one worker.
    """

    def __init__(self, model: nn.Module, rank: int, world_size: int, num_micro_batches: int) -> None:
        self.forward = model
        self._is_first, self._world_size, self._scale = rank == 0, world_size, 1.0 / num_micro_batches
        self._uncompressed: list[nn.Parameter] = []
        by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}
        for parameter in (p for p in model.parameters() if p.requires_grad):
            if sent_as_factors(tuple(parameter.shape)):
                by_shape.setdefault(matrix(tuple(parameter.shape)), []).append(parameter)
            else:
                self._uncompressed.append(parameter)
        self._groups = list(by_shape.values())
        """The parameters that are sent as factors, grouped by shape: a group is one batched product."""
        first = next(model.parameters())
        self.wait = DeviceTimer(first.device)
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
        # All of it is linear in the gradients, so only their sum over the workers matters, and that of the residuals:
        # the result is equal for any number of workers up to float rounding, also for one.
        gradients = [torch.stack([gradient_of(p).reshape(len(p), -1) for p in group]) for group in self._groups]
        mine = [gradient + residual for gradient, residual in zip(gradients, self._residuals, strict=True)]
        # First message: P = M Q of the compressed gradients, and the others whole
        left = [m @ q for m, q in zip(mine, self._queries, strict=True)]
        sums = self._sum_over_workers(left + [gradient_of(p) for p in self._uncompressed])
        bases = [torch.linalg.qr(p).Q for p in sums[: len(mine)]]
        # Second message: Q = M^T P. What P Q^T lacks of this worker's M waits for the next step.
        right = [m.mT @ p for m, p in zip(mine, bases, strict=True)]
        self._residuals = [m - p @ q.mT for m, p, q in zip(mine, bases, right, strict=True)]
        self._queries = self._sum_over_workers(right)
        for group, basis, query in zip(self._groups, bases, self._queries, strict=True):
            for parameter, gradient in zip(group, basis @ query.mT, strict=True):
                parameter.grad = gradient.view_as(parameter)
        for parameter, gradient in zip(self._uncompressed, sums[len(mine) :], strict=True):
            parameter.grad = gradient

    def gather(self) -> None:
        """Before a checkpoint: rank 0, which writes it, gets all workers' residuals. All workers call it together."""
        sums = self._sum_over_workers(self._residuals)
        self._residuals = sums if self._is_first else [torch.zeros_like(residual) for residual in sums]

    def state_dict(self) -> dict[str, Any]:
        return {"queries": list(self._queries), "residuals": list(self._residuals)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._queries, self._residuals = list(saved["queries"]), list(saved["residuals"])
        if not self._is_first:
            self._residuals = [torch.zeros_like(residual) for residual in self._residuals]

    def _sum_over_workers(self, tensors: list[Tensor]) -> list[Tensor]:
        """In one message."""
        if self._world_size == 1:
            return tensors
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self.wait.begin()
        dist.all_reduce(flat)
        self.wait.end()
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
