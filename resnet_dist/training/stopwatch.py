"""Time spent in one kind of work, on the clock of the device that does it."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """`begin` and `end` around every span; nothing waits for the device before `take_s`.

    On a GPU the spans are those of its current stream, where work that was asked for is done later than the host's
    call returns.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._began_s: float | None = None
        self._total_s = 0.0
        self._begun: torch.cuda.Event | None = None
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self) -> None:
        if self._on_gpu:
            self._begun = _event()
        else:
            self._began_s = time.perf_counter()

    def end(self) -> None:
        """Does nothing if no span has begun."""
        if self._begun is not None:
            self._spans.append((self._begun, _event()))
            self._begun = None
        elif self._began_s is not None:
            self._total_s += time.perf_counter() - self._began_s
            self._began_s = None

    def take_s(self) -> float:
        """Seconds in all spans since the last call."""
        for begun, ended in self._spans:
            ended.synchronize()
            self._total_s += begun.elapsed_time(ended) / 1000
        total_s = self._total_s
        self._spans, self._total_s = [], 0.0
        return total_s


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
