"""Collectives besides the gradient's: sums, what rank 0 sends to all, the vote on stopping and saving.

Over gloo on CPUs; over NCCL on GPUs, in their memory, so that no connections between CPUs are needed.
"""

from __future__ import annotations

import mmap
import os
import resource
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import BinaryIO, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resnet_dist.errors import Fault

MOST_IN_A_MESH = 64
"""The largest group whose workers are all connected with each other from the start."""
_OTHER_FILES = 256
"""Files that a worker opens besides its connections: betons, libraries, pipes."""
_CHUNK_BYTES = 32 << 20
T = TypeVar("T")


def prepare_connections(rank: int, world_size: int) -> str:
    """Before a process group is made: lets this process open enough connections, and has gloo make few.

    Returns what is wrong with this node, in one line; "" if nothing is.

    gloo connects all pairs of workers when a group is made: 1,000 workers would have 999 connections each. Above
    `MOST_IN_A_MESH` workers it connects two of them when they first exchange something: its rings and trees need some
    2 log2(N) connections a worker. Below, a mesh costs nothing, and shows at once that a worker is gone.
    """
    if world_size > MOST_IN_A_MESH:
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError):  # macOS has no hard limit, and then refuses
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Every worker is connected with the group's store, which is in rank 0's process.
    needed = world_size + _OTHER_FILES if rank == 0 else 0
    if resource.RLIM_INFINITY != hard < needed:
        return (
            f"a process may open {hard:,} files, and rank 0 of {world_size:,} workers needs {needed:,}; raise the hard "
            "limit there (ulimit -Hn, LimitNOFILE)"
        )
    return ""


def sum_over_workers(values: Tensor) -> Tensor:
    """Elementwise sum of a tensor over all workers, in place.

    An element that is zero on all workers but one is exact whatever the number of workers: x + 0 = x.
    """
    if not _alone():
        carried = values.to(_carrier())
        _finish(dist.all_reduce(carried, async_op=True))
        if carried is not values:
            values.copy_(carried)
    return values


@torch.no_grad()
def share_state(module: nn.Module, *, only_buffers: bool = False) -> None:
    """Gives every worker rank 0's weights and buffers, or its buffers alone: batch norm's running statistics, which
    only rank 0 updates.

    One message per dtype. Buffers that are not in the state dict are constants, or set in every step.
    """
    if _alone():
        return
    weights = {name for name, _ in module.named_parameters()} if only_buffers else set()
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for name, tensor in module.state_dict().items():
        if name not in weights:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for tensors in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        parts = from_rank_0(flat).split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)])


def broadcast_object(value: T) -> T:
    """Rank 0's `value`, on every worker; a small one, which is pickled."""
    if _alone():
        return value
    from_rank_0(torch.zeros(1))  # makes the connections within the limit: see `_finish`
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def broadcast_file(file: BinaryIO | None, num_bytes: int) -> BinaryIO:
    """The first `num_bytes` of rank 0's `file`, in the memory of every worker, as a file that can be read.

    Other workers pass None. Raises EOFError on rank 0 if the file is shorter.
    """
    memory = mmap.mmap(-1, num_bytes)
    for chunk in torch.frombuffer(memory, dtype=torch.uint8).split(_CHUNK_BYTES):
        if file is not None and memory.write(file.read(len(chunk))) != len(chunk):
            raise EOFError(f"{file.name} became shorter while it was read")
        from_rank_0(chunk)
    memory.seek(0)
    return cast(BinaryIO, memory)


def from_rank_0(values: Tensor) -> Tensor:
    """Rank 0's values in place of every worker's."""
    carried = values.to(_carrier())
    _finish(dist.broadcast(carried, src=0, async_op=True))
    return values if carried is values else values.copy_(carried)


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def _carrier() -> torch.device:
    """The device between whose copies the group's collectives run."""
    on_gpus = dist.get_backend() == dist.Backend.NCCL
    return torch.device("cuda", torch.cuda.current_device()) if on_gpus else torch.device("cpu")


def _finish(work: dist.Work | None) -> None:
    """Waits for a collective, no longer than the group's limit. Raises Fault at the limit.

    gloo's own limit does not cover a connection that is only made now: if the other worker is gone it waits five times
    as long. With NCCL only the device's stream waits, and NCCL's watchdog ends the process at the limit.
    """
    assert work is not None
    if dist.get_backend() == dist.Backend.NCCL:
        work.wait()
        return
    assert dist.group.WORLD is not None
    limit: timedelta = dist.group.WORLD.get_group_store().timeout  # type: ignore[attr-defined]  # not in the stub
    try:
        work.wait(limit)
    except RuntimeError as error:
        if "timed out" not in str(error).lower():
            raise  # which says more: for example that a connection was closed
        seconds = f"{limit.total_seconds():g} s (failure.collective_timeout_s)"
        raise Fault(f"not all workers took part in an exchange within {seconds}: one is gone or hangs") from error


class Requests(NamedTuple):
    """What at least one worker was asked to do."""

    stop: bool
    save: bool


class Vote:
    """All workers stop, or save, after the same step, although they see the request at different times."""

    def __init__(self) -> None:
        self._sent: FlagCount | None = None
        self._stream: torch.cuda.Stream | None = None

    def cast(self, *, stop: bool, save: bool, wait: bool = False) -> Requests:
        """Sends this worker's flags. All workers call it together.

        Returns what was requested by the call before; with `wait`, or with one worker, what is requested now.
        """
        if _alone():
            return Requests(stop, save)
        # The sum is read one step later: it has arrived by then, during the next step's forward pass, so no worker
        # waits for it.
        before, self._sent = self._sent, self.send([stop, save])
        counted = self._sent if wait else before
        if counted is None:  # the first call
            return Requests(stop=False, save=False)
        return Requests(*(number > 0 for number in counted.result()))

    def send(self, flags: Sequence[bool]) -> FlagCount:
        if self._stream is None and (device := _carrier()).type == "cuda":
            self._stream = torch.cuda.Stream(device)
        return FlagCount(flags, self._stream)


class FlagCount:
    """How many workers raised each flag: a sum that is under way, 4 bytes a flag.

    Args:
        stream: with GPUs, where its total is copied to the host. Not the one that trains, which must not wait for
            slower workers here.
    """

    def __init__(self, flags: Sequence[bool], stream: torch.cuda.Stream | None) -> None:
        self._summed = torch.zeros(len(flags), device=_carrier())
        for i, raised in enumerate(flags):
            if raised:
                self._summed[i] = 1.0  # on a GPU a kernel, not a copy from the host
        self._work = dist.all_reduce(self._summed, async_op=True)
        self._total, self._arrived = self._summed, None
        if stream is not None:
            with torch.cuda.stream(stream):
                _finish(self._work)  # for this stream, not for the host
                self._total = torch.empty(len(flags), pin_memory=True).copy_(self._summed, non_blocking=True)
                self._arrived = torch.cuda.Event(blocking=True)  # the thread that waits for it sleeps
                self._arrived.record()

    def result(self) -> list[float]:
        """Waits until the sum is there. A step later, that is until the device has done the step before: it has a whole
        step to do meanwhile, so it never runs dry."""
        if self._arrived is None:
            _finish(self._work)
        else:
            self._arrived.synchronize()
        return self._total.tolist()
