"""The progress of a command: live bars on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, TextIO

from data_prep.converter.context import Progress

PLAIN_INTERVAL_S = 5.0


@contextmanager
def progress_on_stderr() -> Iterator[Progress]:
    if not sys.stderr.isatty():
        yield PlainProgress(sys.stderr)
        return
    with _LiveProgress() as live:
        yield live


class _Rates(NamedTuple):
    """Per second."""

    done: float
    source_bytes: float
    by_node: dict[str, float]


class _Rate:
    """Measures from the first work that this process has finished, so that Ray's start does not count.

    Args:
        before: what was done earlier; None: the first number that is reported.
    """

    def __init__(self, before: int | None) -> None:
        self._before = before
        self._resumes = before is None
        self._last = 0
        self._start: tuple[float, int, int, Mapping[str, int]] | None = None

    def update(self, done: int, source_bytes: int, by_node: Mapping[str, int]) -> _Rates | None:
        """None until there is something to measure."""
        now_s = time.monotonic()
        if done < self._last:  # the next file, or this one is written again
            self._start = None
            self._before = None if self._resumes else self._before
        if self._before is None:
            self._before = done
        if done > self._before and self._start is None:
            self._start = (now_s, done, source_bytes, dict(by_node))
        self._last = done
        if self._start is None or done == self._start[1]:
            return None
        start_s, start_done, start_bytes, start_nodes = self._start
        elapsed_s = max(now_s - start_s, 1e-9)
        nodes = {node: (count - start_nodes.get(node, 0)) / elapsed_s for node, count in sorted(by_node.items())}
        return _Rates((done - start_done) / elapsed_s, (source_bytes - start_bytes) / elapsed_s, nodes)


class _Progress(Progress, ABC):
    def __init__(self) -> None:
        self._encode_rate = _Rate(before=None)  # a resumed conversion reports what it finds first
        self._write_rate = _Rate(before=0)

    @abstractmethod
    def log(self, text: str) -> None: ...

    @abstractmethod
    def _show(self, phase: str, text: str, done: int, total: int | None) -> None: ...

    def encoded(self, samples: int, total: int, source_bytes: int, bad: int, by_node: Mapping[str, int]) -> None:
        parts = [f"{samples:,}/{total:,} images"]
        rates = self._encode_rate.update(samples, source_bytes, by_node)
        if rates:
            parts += [f"{rates.done:,.0f} images/s", f"{rates.source_bytes / 1e6:,.1f} MB/s"]
            parts += [f"{(total - samples) / rates.done:,.0f} s left"]
        if bad:
            parts.append(f"{bad:,} bad")
        if rates and len(by_node) > 1:
            parts.append("; ".join(f"{node} {rate:,.0f}/s" for node, rate in rates.by_node.items()))
        self._show("encode", ", ".join(parts), samples, total)

    def written(self, num_bytes: int, total: int | None, by_node: Mapping[str, int] | None = None) -> None:
        parts = [f"{num_bytes / 1e6:,.0f}{'' if total is None else f'/{total / 1e6:,.0f}'} MB"]
        if rates := self._write_rate.update(num_bytes, 0, by_node or {}):
            parts.append(f"{rates.done / 1e6:,.1f} MB/s")
            if total is not None:
                parts.append(f"{(total - num_bytes) / rates.done:,.0f} s left")
            if len(rates.by_node) > 1:
                parts.append("; ".join(f"{node} {rate / 1e6:,.1f} MB/s" for node, rate in rates.by_node.items()))
        self._show("write", ", ".join(parts), num_bytes, total)

    def decoded(self, samples: int, total: int) -> None:
        self._show("decode", f"{samples:,}/{total:,} images", samples, total)


class PlainProgress(_Progress):
    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._last_s = time.monotonic()

    def log(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _show(self, phase: str, text: str, done: int, total: int | None) -> None:
        now_s = time.monotonic()
        is_time = now_s - self._last_s >= PLAIN_INTERVAL_S
        if is_time:
            self._last_s = now_s
        if is_time or (done == total and phase != "decode"):  # verify's stderr is for its findings
            self.log(f"{phase}: {text}")


class _LiveProgress(_Progress):
    """One rich bar for each phase, on stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        super().__init__()
        columns = (TextColumn("{task.description:>8}"), BarColumn(), TextColumn("{task.fields[text]}"))
        self._bars = Progress(*columns, console=Console(stderr=True))
        self._tasks = {
            phase: self._bars.add_task(phase, total=None, text="", visible=False)
            for phase in ("encode", "write", "decode")
        }

    def __enter__(self) -> _LiveProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def log(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False)

    def _show(self, phase: str, text: str, done: int, total: int | None) -> None:
        self._bars.update(self._tasks[phase], completed=done, total=total, text=text, visible=True)
