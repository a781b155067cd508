"""Collectives besides the gradient's: sums, what rank 0 gives to all, the vote on stopping and saving.

On CPUs they run over gloo. On GPUs they run over NCCL, in the device's memory: the workers need no connections besides
NCCL's own rings and trees, where gloo by default connects every worker with every other one.
"""

from __future__ import annotations

import logging
import mmap
import os
import resource
from collections.abc import Sequence
from datetime import timedelta
from typing import BinaryIO, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resnet_dist.errors import Fault

MOST_IN_A_MESH = 64
"""The largest group whose workers are all connected with each other from the start."""
_LAZY = "TORCH_GLOO_LAZY_INIT"
_OTHER_FILES = 256
"""Files that a worker opens besides its connections: betons, libraries, pipes."""
_CHUNK_BYTES = 32 << 20
T = TypeVar("T")
_log = logging.getLogger(__name__)


def prepare_connections(world_size: int) -> None:
    """Before a process group of this size is made: lets this process open enough connections, and has gloo make few.

    gloo connects all pairs of workers when a group is made: 1,000 workers would have 999 connections each. Above
    `MOST_IN_A_MESH` it connects two workers when they first exchange something: its rings and trees need some
    2 log2(N) per worker. Below, a mesh costs nothing and notices a dead worker a little earlier.
    """
    if world_size > MOST_IN_A_MESH:
        os.environ.setdefault(_LAZY, "1")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = world_size + _OTHER_FILES  # every worker is connected with rank 0's store
    if hard != resource.RLIM_INFINITY and hard < needed:
        _log.warning(
            "a process may open %s files here, and the first of %s workers needs some %s: raise the node's limit "
            "(ulimit -Hn, LimitNOFILE)",
            f"{hard:,}",
            f"{world_size:,}",
            f"{needed:,}",
        )


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
def share_buffers(module: nn.Module) -> None:
    """Gives every worker rank 0's buffers: batch norm's running statistics, which only rank 0 updates.

    One message per dtype. Buffers that are not in the state dict are constants, or set in every step.
    """
    if _alone():
        return
    saved = module.state_dict().keys()
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for name, buffer in module.named_buffers():
        if name in saved:
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
    for buffers in by_dtype.values():
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
        parts = _from_rank_0(flat).split([buffer.numel() for buffer in buffers])
        torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)])


def broadcast_object(value: T) -> T:
    """Rank 0's `value`, on every worker; a small one, which is pickled."""
    if _alone():
        return value
    _from_rank_0(torch.zeros(1))  # makes the connections within the limit: see `_finish`
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
        _from_rank_0(chunk)
    memory.seek(0)
    return cast(BinaryIO, memory)


def _from_rank_0(values: Tensor) -> Tensor:
    """Broadcast in place."""
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
        self._sent: _Count | None = None

    def cast(self, *, stop: bool, save: bool, wait: bool = False) -> Requests:
        """Sends this worker's flags. All workers call it together.

        Returns what was requested by the call before; with `wait`, or with one worker, what is requested now.
        """
        if _alone():
            return Requests(stop, save)
        # 8 bytes. The sum is read one step later: it has arrived by then, during the next step's forward pass, so no
        # worker waits for it.
        before, self._sent = self._sent, _Count([stop, save])
        counted = self._sent if wait else before
        if counted is None:  # the first call
            return Requests(stop=False, save=False)
        return Requests(*(number > 0 for number in counted.result()))


class _Count:
    """How many workers raised each flag: a sum that is under way."""

    def __init__(self, flags: Sequence[bool]) -> None:
        self._total = torch.zeros(len(flags), device=_carrier())
        for i, raised in enumerate(flags):
            if raised:
                self._total[i] = 1.0  # on a GPU a kernel, not a copy from the host
        self._work = dist.all_reduce(self._total, async_op=True)
        self._arrived: torch.cuda.Event | None = None
        if self._total.is_cuda:
            # On a stream of its own, since the one that trains must not wait for slower workers here. The event comes
            # when this worker has done the step before, while the device has a whole step to do: it never runs dry.
            on_device = self._total
            with torch.cuda.stream(torch.cuda.Stream(on_device.device)):
                _finish(self._work)
                self._total = torch.empty(len(flags), pin_memory=True).copy_(on_device, non_blocking=True)
                self._arrived = torch.cuda.Event(blocking=True)  # the waiting thread sleeps
                self._arrived.record()
            self._on_device = on_device  # its memory is in use until then

    def result(self) -> list[float]:
        if self._arrived is None:
            _finish(self._work)
        else:
            self._arrived.synchronize()
        return self._total.tolist()
