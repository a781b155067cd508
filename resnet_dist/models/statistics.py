"""Which micro-batches count for batch norm's running statistics.

A step's micro-batches are shared between however many workers there are, so only micro-batch 0 may move the running
statistics: then they do not depend on the number of workers. The others still normalise with their own statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class BatchNormStatistics:
    """The batch norms of a model, found once; a switch costs one attribute write per norm (155 in ResNet-152)."""

    def __init__(self, model: nn.Module) -> None:
        self._norms = [norm for norm in model.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]

    @contextmanager
    def updating(self, update: bool) -> Iterator[None]:
        """Whether forward passes in training mode, while this lasts, move the running statistics.

        With `update=False` they leave `running_mean`, `running_var` and `num_batches_tracked` untouched bit for bit.
        Outputs and gradients are the same either way; evaluation mode is not affected.
        """
        # torch consults this flag in training mode only, and then hands its kernel no buffers at all.
        for norm in self._norms:
            norm.track_running_stats = update
        try:
            yield
        finally:
            for norm in self._norms:
                norm.track_running_stats = True

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """While this lasts, forward passes see and move copies, which are then thrown away.

        For doing a forward pass again: it then takes the same way as the first time, which it would not under
        `updating(False)` (autograd keeps the statistics that a norm was given).
        """
        kept = [dict(norm._buffers) for norm in self._norms]
        for norm in self._norms:
            norm._buffers.update({key: None if b is None else b.clone() for key, b in norm._buffers.items()})
        try:
            yield
        finally:
            for norm, buffers in zip(self._norms, kept, strict=True):
                norm._buffers.update(buffers)
