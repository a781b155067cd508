"""How the micro-batches' gradients of one step become one gradient on every worker."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class FastReduction:
    """DDP's bucketed all-reduce, overlapped with the last local micro-batch's backward pass.

    A step's loss is the mean over its M micro-batches. DDP averages gradients over the W workers, so each micro-batch's
    loss is scaled by W / M: the sum over all micro-batches, divided by W, is then the mean over M, also where the
    workers' shares differ in size.

    Buffers are not broadcast: rank 0 owns the batch-norm statistics (`collectives.share_buffers`).
    """

    def __init__(self, model: nn.Module, world_size: int, num_micro_batches: int) -> None:
        self._ddp = (
            DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
            if world_size > 1
            else None
        )
        self.forward: nn.Module = self._ddp or model
        self._scale = world_size / num_micro_batches

    def backward(self, loss: Tensor) -> None:
        (loss * self._scale).backward()

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        """Wraps forward and backward of one local micro-batch; gradients travel with the last one only."""
        return nullcontext() if is_last or self._ddp is None else self._ddp.no_sync()
