"""A batch: what it holds, the host memory it is decoded into, and its copy to the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass
class Batch:
    """What the loader gives to training. The tensors belong to the consumer: nothing writes to them later."""

    images: Tensor
    """uint8 [N, size, size, 3], RGB, on the loader's device. Normalising is the model's first operation."""
    labels: Tensor
    """int64 [N], on the loader's device."""
    sample_ids: NDArray[np.int64]
    """Samples that are shown: [N], indices in the beton."""
    num_replaced: int = 0
    """How many of them replace samples that cannot be decoded."""
    numbers: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """int64 [n], on the loader's device: what else the step needs for this batch (`BetonLoader.epoch`)."""
    micro_batches: range = range(1)
    """The micro-batches of the step that are merged in this batch, of N / len(micro_batches) images each. The loader
    does not know of them: `training.feed` sets it."""


ReceiveBatch = Callable[[], Batch]
"""Called on the consumer's thread: the batch on the device, ready for work on that thread's current stream."""


class HostBuffers:
    """For a device that shares the host's memory: every batch is decoded straight into its final memory."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._size = size
        self._device = device

    def take(self, num_images: int) -> Tensor:
        """Host memory for the images of the next batch: uint8 [num_images, size, size, 3]."""
        # numpy's memory, not torch's: numpy asks the system for huge pages, which are faulted in within a fifth of the
        # time.
        return torch.from_numpy(np.empty((num_images, self._size, self._size, 3), np.uint8))

    def send(self, batch: Batch) -> ReceiveBatch:
        """Sends a batch on the host, its images in what `take` returned last, to the device. Does not wait for it."""
        images, labels, numbers = (t.to(self._device) for t in (batch.images, batch.labels, batch.numbers))
        sent = replace(batch, images=images, labels=labels, numbers=numbers)
        return lambda: sent


class CudaBuffers:
    """Two pairs of pinned buffers: one is written to while the other is copied from, on a separate CUDA stream.

    The scheme of PyTorch's "CUDA semantics" notes, section "Use pinned memory buffers". Never run: there was no GPU.
    """

    def __init__(self, size: int, device: torch.device, batch_size: int) -> None:
        shape = (batch_size, size, size, 3)
        self._images = [torch.empty(shape, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        # Labels and numbers in one buffer, which is one copy. It grows: only batches tell how many numbers they have.
        self._integers = [torch.empty(batch_size, dtype=torch.int64, pin_memory=True) for _ in range(2)]
        self._copied = [torch.cuda.Event(blocking=True) for _ in range(2)]
        self._stream = torch.cuda.Stream(device)
        self._device = device
        self._current = 0

    def take(self, num_images: int) -> Tensor:
        """As `HostBuffers.take`; waits until the last copies from these buffers have ended."""
        self._current = 1 - self._current
        self._copied[self._current].synchronize()  # returns at once if it was never recorded
        return self._images[self._current][:num_images]

    def send(self, batch: Batch) -> ReceiveBatch:
        """As `HostBuffers.send`."""
        counts = [len(batch.labels), len(batch.numbers)]
        with torch.cuda.stream(self._stream):  # sets this thread's device too
            if len(self._integers[self._current]) < sum(counts):
                self._integers[self._current] = torch.empty(sum(counts), dtype=torch.int64, pin_memory=True)
            packed = self._integers[self._current][: sum(counts)]  # free since `take`
            torch.cat([batch.labels, batch.numbers], out=packed)
            images = batch.images.to(self._device, non_blocking=True)
            integers = packed.to(self._device, non_blocking=True)
            self._copied[self._current].record(self._stream)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        labels, numbers = integers.split(counts)
        sent = replace(batch, images=images, labels=labels, numbers=numbers)

        def receive() -> Batch:
            reader = torch.cuda.current_stream(self._device)
            reader.wait_event(arrived)  # the reader's stream waits, its thread does not
            for tensor in (images, integers):
                tensor.record_stream(reader)  # so that the memory is not used again before the reader is done
            return sent

        return receive


def batch_buffers(size: int, device: torch.device, batch_size: int) -> HostBuffers | CudaBuffers:
    """Buffers for one epoch, used by the one thread that decodes.

    Args:
        size: height and width of the images, px.
        batch_size: of the largest batch.
    """
    return CudaBuffers(size, device, batch_size) if device.type == "cuda" else HostBuffers(size, device)
