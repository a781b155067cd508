"""Batches through pinned buffers, on a model of CUDA in which every copy is as late as CUDA allows."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_dist.data import loader as loader_module
from resnet_dist.data.batch import Batch, CudaBuffers, ReceiveBatch
from resnet_dist.data.loader import BetonLoader

OpenLoader = Callable[..., BetonLoader]

DEVICE = torch.device("meta")  # stands for the GPU: torch would look for a real one
SIZES = [6, 2, 5]


class LateStream:
    """A CUDA stream that does nothing before somebody waits for it."""

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []
        self.num_done = 0
        self._lock = threading.Lock()

    def finish(self, end: int) -> None:
        with self._lock:
            while self.num_done < end:
                self.work[self.num_done]()
                self.num_done += 1


class LateCuda(TorchDispatchMode):
    """The operations that reach the device or pin memory, done on memory of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = LateStream()
        self.pinned: set[int] = set()
        self.recorded: set[int] = set()
        """Storages, by address: those that are pinned, and those on the device that a reader's stream uses."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        is_pinned = kwargs.pop("pin_memory", False)
        if kwargs.get("device") == DEVICE:
            assert func is torch.ops.aten._to_copy.default
            assert kwargs["non_blocking"]
            return self._copied(*args)
        made = func(*args, **kwargs)
        if is_pinned:
            self.pinned.add(made.untyped_storage().data_ptr())
        return made

    def _copied(self, source: Tensor) -> Tensor:
        assert source.untyped_storage().data_ptr() in self.pinned
        arriving = torch.full_like(source, 99)
        self.stream.work.append(lambda: arriving.copy_(source))
        return arriving


class LateEvent:
    def __init__(self, blocking: bool = False) -> None:
        self.recorded: tuple[LateStream, int] | None = None

    def record(self, stream: LateStream) -> None:
        self.recorded = stream, len(stream.work)

    def synchronize(self) -> None:
        if self.recorded is not None:
            self.recorded[0].finish(self.recorded[1])


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateCuda]:
    late = LateCuda()
    reader = SimpleNamespace(wait_event=LateEvent.synchronize)
    monkeypatch.setattr(torch.cuda, "Event", LateEvent)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: late.stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: reader)
    monkeypatch.setattr(Tensor, "record_stream", lambda t, _: late.recorded.add(t.untyped_storage().data_ptr()))
    with late:
        yield late


class BuffersOnLateCuda(CudaBuffers):
    """For the loader's thread: torch's modes are each thread's own."""

    def __init__(self, cuda: LateCuda, size: int, batch_size: int) -> None:
        with cuda:
            super().__init__(size, DEVICE, batch_size)
        self._cuda = cuda

    def send(self, batch: Batch) -> ReceiveBatch:
        with self._cuda:
            return super().send(batch)


def content(k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and numbers of batch `k`: unlike those of any other, and as many numbers as no other has."""
    generator = torch.Generator().manual_seed(k)
    num_images = SIZES[k % len(SIZES)]
    images = torch.randint(0, 256, (num_images, 4, 4, 3), dtype=torch.uint8, generator=generator)
    return images, torch.arange(num_images) + 1000 * k, torch.arange(k) - 1000 * k


@pytest.mark.parametrize("queued", [0, 1, 4])
def test_what_arrives_is_what_was_sent_however_late(queued: int, cuda: LateCuda) -> None:
    """Each buffer is used 20 times while the consumer keeps every batch and takes them `queued` batches late."""
    buffers = CudaBuffers(4, DEVICE, max(SIZES))
    queue: deque[ReceiveBatch] = deque()
    kept: list[Batch] = []
    for k in range(40):
        images, labels, numbers = content(k)
        pinned = buffers.take(len(images))
        pinned.copy_(images)
        queue.append(buffers.send(Batch(pinned, labels, labels.numpy(), num_replaced=k, numbers=numbers)))
        if len(queue) > queued:
            kept.append(queue.popleft()())
    assert cuda.stream.num_done >= 2 * len(kept)
    kept += [receive() for receive in queue]
    for k, batch in enumerate(kept):
        images, labels, numbers = content(k)
        assert torch.equal(batch.images, images)
        assert torch.equal(batch.labels, labels)
        assert torch.equal(batch.numbers, numbers)
        assert np.array_equal(batch.sample_ids, labels.numpy())
        assert batch.num_replaced == k
    # Two copies a batch. What they made is not used again before the consumer's stream is done with it.
    assert len(cuda.stream.work) == 2 * len(kept)
    made = [t.untyped_storage().data_ptr() for batch in kept for t in (batch.images, batch.labels, batch.numbers)]
    assert len(set(made)) == 2 * len(kept)
    assert cuda.recorded >= set(made)


def test_sending_does_not_wait(cuda: LateCuda) -> None:
    """Only taking a buffer again does, and only for its own last copies."""
    buffers = CudaBuffers(4, DEVICE, batch_size=2)
    for k in range(4):
        done_before = cuda.stream.num_done
        images = buffers.take(2)
        assert cuda.stream.num_done == 2 * max(0, k - 1)
        buffers.send(Batch(images, torch.zeros(2, dtype=torch.int64), np.zeros(2, np.int64)))
        assert cuda.stream.num_done == done_before + (2 if k > 1 else 0)


@pytest.mark.parametrize("consumer_s", [0.0, 0.03])
def test_a_loader_with_pinned_buffers_gives_the_batches_of_one_without(
    consumer_s: float, cuda: LateCuda, photo_beton: Path, open_loader: OpenLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of loader and consumer is slower; every buffer is used 20 times, and another epoch was left early."""

    def numbers(k: int) -> NDArray[np.int64]:
        return np.arange(k, k + k % 7)

    ids, loader = np.tile(np.arange(40), 4), open_loader(photo_beton)
    plain = list(loader.epoch(1, ids, sizes=[3, 8, 1], numbers=numbers))
    monkeypatch.setattr(
        loader_module, "batch_buffers", lambda size, _, batch_size: BuffersOnLateCuda(cuda, size, batch_size)
    )
    with closing(loader.epoch(0, ids, sizes=[5])) as left:
        next(left)
    kept = []
    for batch in loader.epoch(1, ids, sizes=[3, 8, 1], numbers=numbers):
        kept.append(batch)
        time.sleep(consumer_s)
    assert len(kept) == len(plain) > 40
    for ours, theirs in zip(kept, plain, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.numbers, theirs.numbers)
        assert np.array_equal(ours.sample_ids, theirs.sample_ids)
