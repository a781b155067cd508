"""The thread that decodes an epoch's batches ahead of training; neither side can wait for ever for the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from queue import Empty, Full, Queue
from threading import Event, Thread, current_thread

import numpy as np
from numpy.typing import NDArray

from resnet_dist.data.batch import Batch
from resnet_dist.data.device_copies import BatchPlaces, Placed
from resnet_dist.errors import Fault

Show = Callable[[NDArray[np.int64], NDArray[np.uint8]], None]
"""Fills images [N, size, size, 3] with what samples of the ids [N] show; where one is replaced, so is its id."""

_POLL_S = 0.5
"""How soon a waiting side sees that the other has gone."""
_JOIN_LIMIT_S = 5.0
_BATCHES_AHEAD = 3


class EpochThread(Thread):
    """Batches of `sample_ids` in their order; `next_batch` hands them out."""

    def __init__(
        self,
        name: str,
        show: Show,
        places: BatchPlaces,
        labels: NDArray[np.int64],
        sample_ids: NDArray[np.int64],
        batch_size: int,
        wait_limit_s: float,
    ) -> None:
        """`name`: of the data, for errors; `labels`: of all samples of the data; ids count modulo their number."""
        super().__init__(name="beton-epoch", daemon=True)
        self._data = name
        self._show = show
        self._places = places
        self._labels = labels
        self._sample_ids = sample_ids
        self._batch_size = batch_size
        self._wait_limit_s = wait_limit_s
        self._queue: Queue[Placed | BaseException | None] = Queue(_BATCHES_AHEAD)
        self._is_unwanted = Event()
        self.start()

    def run(self) -> None:
        try:
            for start in range(0, len(self._sample_ids), self._batch_size):
                if not self._offer(self._decoded(self._sample_ids[start : start + self._batch_size])):
                    return
            self._offer(None)
        except BaseException as error:  # noqa: BLE001 the consumer raises it
            self._offer(error)

    def next_batch(self) -> Batch | None:
        """None at the end. Raises what `run` raised."""
        deadline = time.monotonic() + self._wait_limit_s
        while True:
            alive = self.is_alive()  # before the look into the queue: a thread may put its last word and end
            try:
                item = self._queue.get(timeout=_POLL_S if alive else 0)
            except Empty:
                if not alive:
                    raise Fault(f"the loader thread of {self._data} died without a word") from None
                if time.monotonic() > deadline:
                    raise Fault(
                        f"{self._data}: no batch within {self._wait_limit_s:g} s; is the storage alive?"
                    ) from None
                continue
            if isinstance(item, BaseException):
                raise item
            return item.received() if item else None

    def close(self) -> None:
        """Ends the thread after the batch it is decoding, and waits for it (5 s at most)."""
        self._is_unwanted.set()
        while True:  # a thread that waits for room in the queue goes on at once
            try:
                self._queue.get_nowait()
            except Empty:
                break
        if self.is_alive() and self is not current_thread():
            self.join(_JOIN_LIMIT_S)

    def _decoded(self, sample_ids: NDArray[np.int64]) -> Placed:
        place = self._places.take(len(sample_ids))
        shown = sample_ids.copy()
        self._show(shown, place.numpy())
        num_replaced, shown = int((shown != sample_ids).sum()), shown % len(self._labels)
        return self._places.send(place, self._labels[shown], shown, num_replaced)

    def _offer(self, item: Placed | BaseException | None) -> bool:
        """Puts `item` when there is room; False when the consumer has gone."""
        while not self._is_unwanted.is_set():
            try:
                self._queue.put(item, timeout=_POLL_S)
            except Full:
                continue
            return True
        return False
