"""How the gradients of one step's micro-batches become one gradient, the same on every worker.

The loss of a step is the mean over its M micro-batches. Three reductions: `fast` (all-reduce, optionally compressed),
`exact` (the same bits for any number of workers), `powersgd` (low-rank factors).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resnet_dist.config.low_rank import RANK, matrix, sent_as_factors
from resnet_dist.data.order import micro_batch_share
from resnet_dist.training.device import DeviceTimer

Compression = Literal["none", "bf16", "fp16", "powersgd"]
"""powersgd is a reduction of its own."""
_FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16}
BUCKET_BYTES = 25 << 20
"""As DistributedDataParallel's: an all-reduce of less is slower a byte, and of more starts later."""
_CHUNK_NUMBERS = 1 << 22
"""How many numbers of the gradient are exchanged at a time: limits the memory of `exact` beyond its sums."""

T = TypeVar("T")


class Reduction(Protocol):
    """Per step: `start_launch`, `forward` and `backward` of each of this worker's launches, in order, then `finish`."""

    forward: nn.Module
    """The module to call for a forward pass."""
    wait: DeviceTimer
    """Runs while a worker that has its own gradients waits for those of the rest."""

    def start_launch(self, *, is_last: bool) -> None:
        """Before a launch's forward pass; `is_last` of this worker's in the step."""

    def backward(self, losses: Tensor, micro_batches: range) -> None:
        """Backward pass of a launch. `losses` [k]: the mean loss of each of its micro-batches."""

    def finish(self) -> None:
        """After the last launch: every parameter's `grad` is the step's gradient, on all workers."""

    def clear(self) -> None:
        """After the update: the next step's gradients start from zero."""


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


def drop_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


# fast: all-reduce in buckets


class Bucket:
    """Gradients of consecutive parameters in one flat tensor, of which every `grad` is a view.

    The memory stays the same for the whole training: backward passes add to it, also those of a CUDA graph, and it is
    sent as it is.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        first = parameters[0]
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
        offset = 0
        for parameter in parameters:
            # In the parameter's own memory order, so that the update reads both alike
            parameter.grad = self.flat.as_strided(parameter.shape, parameter.stride(), offset)
            offset += parameter.numel()
        self.num_missing = 0
        """Gradients that this launch's backward pass has not given yet."""
        self.captured: torch.cuda.Event | None = None
        """In a CUDA graph: recorded by the graph when all gradients are there."""
        self.sent: Tensor | None = None
        self.work: dist.Work | None = None


def buckets_of(parameters: Sequence[nn.Parameter], max_bytes: int) -> list[Bucket]:
    """The last parameters first, as backward passes come to them."""
    groups: list[list[nn.Parameter]] = []
    room = 0
    for parameter in reversed(parameters):
        num_bytes = parameter.numel() * parameter.element_size()
        if num_bytes > room or not groups or groups[-1][0].dtype != parameter.dtype:
            groups.append([])
            room = max_bytes
        groups[-1].append(parameter)
        room -= num_bytes
    return [Bucket(group) for group in groups]


class FastReduction:
    """One all-reduce a bucket, which starts during the last launch's backward pass, as soon as the bucket is complete.

    What torch's DistributedDataParallel does, but in memory that a CUDA graph can write to, and without its copies from
    gradients to buckets. Equal across worker counts up to float rounding.
    """

    def __init__(
        self,
        model: nn.Module,
        world_size: int,
        num_micro_batches: int,
        compression: Literal["none", "bf16", "fp16"],
        *,
        in_buckets: bool | None = None,
    ) -> None:
        """`in_buckets`: whether gradients are in flat memory. None: where that is needed or pays."""
        self.forward = model
        self._world_size, self._scale = world_size, 1.0 / num_micro_batches
        self._format = _FORMATS.get(compression)
        parameters = [p for p in model.parameters() if p.requires_grad]
        self._device = parameters[0].device
        self.wait = DeviceTimer(self._device)
        # A single worker on a CPU needs no flat memory, and adding to it would cost a pass over the gradients.
        if in_buckets is None:
            in_buckets = world_size > 1 or self._format is not None or self._device.type == "cuda"
        self._buckets = buckets_of(parameters, BUCKET_BYTES) if in_buckets else []
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, bucket))
        self._is_last = False
        self._unsent: deque[Bucket] = deque()
        """In order: all workers send the buckets in the same order."""
        self._stream: torch.cuda.Stream | None = None
        """On which buckets are sent while a graph still runs."""
        self._events_are_early = False

    def start_launch(self, *, is_last: bool) -> None:
        self._is_last = is_last
        self._unsent = deque(self._buckets)
        for bucket in self._buckets:
            bucket.num_missing = len(bucket.parameters)

    def backward(self, losses: Tensor, micro_batches: range) -> None:
        (losses.sum() * self._scale).backward()

    def _arrived(self, bucket: Bucket, _: Tensor) -> None:
        """Autograd has added to one gradient of the bucket."""
        bucket.num_missing -= 1
        if bucket.num_missing:
            return
        if bucket.captured is not None and torch.cuda.is_current_stream_capturing():
            bucket.captured.record()
        elif self._is_last:
            while self._unsent and not self._unsent[0].num_missing:
                self._send(self._unsent.popleft())

    def _send(self, bucket: Bucket) -> None:
        # Each worker's part of the gradient is rounded to the format and summed in it.
        bucket.sent = bucket.flat if self._format is None else bucket.flat.to(self._format)
        bucket.work = dist.all_reduce(bucket.sent, async_op=True) if self._world_size > 1 else None

    def finish(self) -> None:
        # Replaying a CUDA graph calls no hook: what it has computed is sent here, each bucket as soon as the graph has
        # recorded its event, while the graph still runs.
        for bucket in self._unsent:
            with self._after(bucket):
                self._send(bucket)
        self._unsent.clear()
        if self._stream is not None:
            # It rounds, if gradients are compressed; with one worker there is no all-reduce to wait for.
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        if self._world_size > 1:
            self.wait.begin()
        for bucket in self._buckets:
            if bucket.work is not None:
                bucket.work.wait()
            if bucket.sent is not None and bucket.sent is not bucket.flat:
                bucket.flat.copy_(bucket.sent)
            bucket.sent = bucket.work = None
        self.wait.end()

    def clear(self) -> None:
        for bucket in self._buckets:
            bucket.flat.zero_()
        if not self._buckets:
            drop_gradients(self.forward)

    # With CUDA graphs

    def start_graphs(self) -> None:
        """From now on, graphs that are captured record when each bucket is complete. Call it before a capture."""
        if self._stream is not None or self._events_are_early or self._device.type != "cuda":
            return
        for bucket in self._buckets:
            bucket.captured = torch.cuda.Event(external=True)  # a node of the graph that others outside can wait for
        self._stream = torch.cuda.Stream(self._device)

    def end_graphs(self) -> None:
        """From now on, buckets are sent when a whole graph has run. Graphs keep recording the events."""
        self._stream, self._events_are_early = None, True

    def is_recorded_in_time(self, replay: Callable[[], object]) -> bool:
        """Whether a wait for a bucket's event, begun while the graph runs, ends after the bucket is complete."""
        if self._stream is None:
            return True
        self.clear()
        replay()
        seen = []
        for bucket in self._buckets:
            with self._after(bucket):
                seen.append(bucket.flat.clone())
        torch.cuda.synchronize(self._device)
        # As bits: NaN, which fp16 gives where it overflows, is not equal to itself.
        complete = all(
            torch.equal(early.view(torch.uint8), bucket.flat.view(torch.uint8))
            for early, bucket in zip(seen, self._buckets, strict=True)
        )
        self.clear()
        return complete

    def _after(self, bucket: Bucket) -> AbstractContextManager[object]:
        """Within the context: what is enqueued runs as soon as the last graph has completed the bucket."""
        if self._stream is None or bucket.captured is None:
            return nullcontext()
        self._stream.wait_event(bucket.captured)
        return torch.cuda.stream(self._stream)


def flattened(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient's numbers in the order of the parameter's in memory: a view, unless the strides differ."""
    outermost_first = sorted(range(parameter.dim()), key=parameter.stride, reverse=True)
    return gradient.permute(outermost_first).reshape(-1)


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

    def start_launch(self, *, is_last: bool) -> None:
        return

    def backward(self, losses: Tensor, micro_batches: range) -> None:
        (micro_batch,) = micro_batches  # their gradients are needed one by one
        losses.sum().backward()
        gradient = torch.cat([flattened(gradient_of(p), p) for p in self._parameters])
        drop_gradients(self.forward)  # or the next backward pass would add to it, in the order of the micro-batches
        self._sums.add(micro_batch, gradient)

    def clear(self) -> None:
        drop_gradients(self.forward)
        self._sums.sums.clear()

    def finish(self) -> None:
        mine = torch.stack([value for _, value in self._sums.sums])  # [subtrees, all parameters]
        self._sums.sums.clear()
        chunks = [self._sum_over_workers(chunk) for chunk in mine.split(_CHUNK_NUMBERS, dim=1)]
        mean = torch.cat(chunks) / self._num_micro_batches
        offset = 0
        for parameter in self._parameters:
            # A view of the sum with the parameter's strides, without which optimizers take a launch per parameter
            parameter.grad = mean.as_strided(parameter.shape, parameter.stride(), offset)
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

    torch's own hook for DistributedDataParallel keeps its memory by bucket, loses it with the process, and does nothing
    with one worker.
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

    def start_launch(self, *, is_last: bool) -> None:
        return

    def backward(self, losses: Tensor, micro_batches: range) -> None:
        (losses.sum() * self._scale).backward()

    def clear(self) -> None:
        drop_gradients(self.forward)

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
                is_nhwc = parameter.is_contiguous(memory_format=torch.channels_last)
                layout = torch.channels_last if is_nhwc else torch.contiguous_format
                parameter.grad = gradient.view_as(parameter).contiguous(memory_format=layout)
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
        """In one message. The results have the strides of `tensors`."""
        if self._world_size == 1:
            return tensors
        flat = torch.cat([flattened(tensor, tensor) for tensor in tensors])
        self.wait.begin()
        dist.all_reduce(flat)
        self.wait.end()
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [
            part.as_strided(tensor.shape, tensor.stride(), part.storage_offset())
            for part, tensor in zip(parts, tensors, strict=True)
        ]
