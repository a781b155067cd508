"""A batch: what it holds, the host memory it is decoded into, and its copy to the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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
        sent = replace(batch, images=batch.images.to(self._device), labels=batch.labels.to(self._device))
        return lambda: sent


class CudaBuffers:
    """Two pinned buffers: one is decoded into while the other is copied from, on a separate CUDA stream.

    The scheme of PyTorch's "CUDA semantics" notes, section "Use pinned memory buffers". Never run: there was no GPU.
    """

    def __init__(self, size: int, device: torch.device, batch_size: int) -> None:
        shape = (batch_size, size, size, 3)
        self._buffers = [torch.empty(shape, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copied = [torch.cuda.Event(blocking=True) for _ in self._buffers]
        self._stream = torch.cuda.Stream(device)
        self._device = device
        self._current = 0

    def take(self, num_images: int) -> Tensor:
        """As `HostBuffers.take`; waits until the buffer's last copy has ended."""
        self._current = (self._current + 1) % len(self._buffers)
        self._copied[self._current].synchronize()  # returns at once if it was never recorded
        return self._buffers[self._current][:num_images]

    def send(self, batch: Batch) -> ReceiveBatch:
        """As `HostBuffers.send`."""
        with torch.cuda.stream(self._stream):  # sets this thread's device too
            sent = replace(
                batch,
                images=batch.images.to(self._device, non_blocking=True),
                labels=batch.labels.pin_memory().to(self._device, non_blocking=True),
            )
            self._copied[self._current].record(self._stream)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)

        def receive() -> Batch:
            reader = torch.cuda.current_stream(self._device)
            reader.wait_event(arrived)  # the reader's stream waits, its thread does not
            for tensor in (sent.images, sent.labels):
                tensor.record_stream(reader)  # so that the memory is not used again before the reader is done
            return sent

        return receive


def batch_buffers(size: int, device: torch.device, batch_size: int) -> HostBuffers | CudaBuffers:
    """Buffers for one epoch, used by the one thread that decodes. `size`: height and width of the images, px."""
    return CudaBuffers(size, device, batch_size) if device.type == "cuda" else HostBuffers(size, device)
