"""What a loader hands to training. Apart from the loader, because ffcv and numba take seconds to import."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass
class Batch:
    images: torch.Tensor
    """uint8 [N, size, size, 3], RGB, on the loader's device."""
    labels: torch.Tensor
    """int64 [N], on the loader's device."""
    sample_ids: NDArray[np.int64]
    """[N]: indices in the beton, of the samples that are shown."""
    num_replaced: int = 0
    """How many of them stand for samples that cannot be decoded."""


# Where batches are decoded to, and how they get to the device: straight into their own memory, or by pinned buffers.


_PINNED_BUFFERS = 2
"""One is decoded to while the other is copied from."""


class Placed(NamedTuple):
    """A batch on its way to the device."""

    batch: Batch
    arrive: Callable[[], None] | None = None

    def received(self) -> Batch:
        """The batch, for work on the calling thread's current stream."""
        if self.arrive:
            self.arrive()
        return self.batch


class BatchPlaces(Protocol):
    """Used by one thread, for one epoch."""

    def take(self, num_images: int) -> Tensor:
        """Host memory for the images of the next batch: uint8 [num_images, size, size, 3]."""

    def send(
        self, images: Tensor, labels: NDArray[np.int64], sample_ids: NDArray[np.int64], num_replaced: int
    ) -> Placed:
        """The batch in `images`, which `take` gave, to the device. Does not wait for it."""


class HostPlaces:
    """For a device that shares the host's memory: every batch is decoded to where it stays."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._size = size
        self._device = device

    def take(self, num_images: int) -> Tensor:
        # numpy's memory, not torch's: numpy asks the system for huge pages, which are ready in a fifth of the time.
        return torch.from_numpy(np.empty((num_images, self._size, self._size, 3), np.uint8))

    def send(
        self, images: Tensor, labels: NDArray[np.int64], sample_ids: NDArray[np.int64], num_replaced: int
    ) -> Placed:
        on_device = images.to(self._device), torch.from_numpy(labels).to(self._device)
        return Placed(Batch(*on_device, sample_ids, num_replaced))


class CudaPlaces:
    """Two pinned buffers, copied from on a stream of their own while the next batch is decoded. Untested."""

    def __init__(self, size: int, device: torch.device, batch_size: int) -> None:
        shape = (batch_size, size, size, 3)
        self._buffers = [torch.empty(shape, dtype=torch.uint8, pin_memory=True) for _ in range(_PINNED_BUFFERS)]
        self._copied = [torch.cuda.Event(blocking=True) for _ in self._buffers]
        self._stream = torch.cuda.Stream(device)
        self._device = device
        self._next = 0

    def take(self, num_images: int) -> Tensor:
        self._next = (self._next + 1) % _PINNED_BUFFERS
        self._copied[self._next].synchronize()  # returns at once if it was never recorded
        return self._buffers[self._next][:num_images]

    def send(
        self, images: Tensor, labels: NDArray[np.int64], sample_ids: NDArray[np.int64], num_replaced: int
    ) -> Placed:
        with torch.cuda.stream(self._stream):  # of this thread only, its device too
            pinned = images, torch.from_numpy(labels).pin_memory()
            on_device = [tensor.to(self._device, non_blocking=True) for tensor in pinned]
            self._copied[self._next].record(self._stream)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)

        def arrive() -> None:
            reader = torch.cuda.current_stream(self._device)
            reader.wait_event(arrived)
            for tensor in on_device:
                tensor.record_stream(reader)

        return Placed(Batch(on_device[0], on_device[1], sample_ids, num_replaced), arrive)


def batch_places(size: int, device: torch.device, batch_size: int) -> BatchPlaces:
    if device.type == "cuda":
        return CudaPlaces(size, device, batch_size)
    return HostPlaces(size, device)
