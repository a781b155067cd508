"""The progress of a command: live bars on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

from data_prep.converter.context import Progress

PLAIN_INTERVAL_S = 5.0


@contextmanager
def progress_on(stream: TextIO) -> Iterator[Progress]:
    """The kind of progress that suits `stream`."""
    if not stream.isatty():
        yield PlainProgress(stream)
        return
    with _LiveProgress() as live:
        yield live


class _Rate:
    """Samples and bytes per second since the first unit was finished, so that Ray's start does not count."""

    def __init__(self) -> None:
        self._samples_before: int | None = None
        self._start: tuple[float, int, int, Mapping[str, int]] | None = None

    def describe(self, samples: int, total: int, source_bytes: int, bad: int, by_node: Mapping[str, int]) -> str:
        now = time.monotonic()
        if self._samples_before is None:
            self._samples_before = samples
        if self._start is None and samples > self._samples_before:
            self._start = (now, samples, source_bytes, dict(by_node))
        start_s, start_samples, start_bytes, start_nodes = self._start or (now, samples, source_bytes, by_node)
        elapsed_s = max(now - start_s, 1e-9)
        parts = [f"{samples:,}/{total:,} images"]
        done = samples - start_samples
        if done:
            rate = done / elapsed_s
            parts.append(f"{rate:,.0f} images/s")
            parts.append(f"{(source_bytes - start_bytes) / elapsed_s / 1e6:,.1f} MB/s")
            parts.append(f"{(total - samples) / rate:,.0f} s left")
        if bad:
            parts.append(f"{bad:,} bad")
        if done and len(by_node) > 1:
            rates = {node: (count - start_nodes.get(node, 0)) / elapsed_s for node, count in sorted(by_node.items())}
            parts.append("; ".join(f"{node} {rate:,.0f}/s" for node, rate in rates.items()))
        return ", ".join(parts)


class _WriteRate:
    """Bytes per second since the first range was finished."""

    def __init__(self) -> None:
        self._start: tuple[float, int, Mapping[str, int]] | None = None
        self._last_bytes = 0

    def describe(self, num_bytes: int, total: int | None, by_node: Mapping[str, int]) -> str:
        now = time.monotonic()
        if self._start is None or num_bytes < self._last_bytes:  # less than before: it is written again
            self._start = (now, num_bytes, dict(by_node))
        self._last_bytes = num_bytes
        start_s, start_bytes, start_nodes = self._start
        elapsed_s = max(now - start_s, 1e-9)
        of_all = "" if total is None else f"/{total / 1e6:,.0f}"
        parts = [f"{num_bytes / 1e6:,.0f}{of_all} MB"]
        rate = (num_bytes - start_bytes) / elapsed_s
        if rate:
            parts.append(f"{rate / 1e6:,.1f} MB/s")
        if rate and total is not None:
            parts.append(f"{(total - num_bytes) / rate:,.0f} s left")
        if rate and len(by_node) > 1:
            rates = {node: (count - start_nodes.get(node, 0)) / elapsed_s for node, count in sorted(by_node.items())}
            parts.append("; ".join(f"{node} {rate / 1e6:,.1f} MB/s" for node, rate in rates.items()))
        return ", ".join(parts)


class PlainProgress:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rate = _Rate()
        self._write_rate = _WriteRate()
        self._last_s = time.monotonic()

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def encoded(self, samples: int, total: int, source_bytes: int, bad: int, by_node: Mapping[str, int]) -> None:
        text = self._rate.describe(samples, total, source_bytes, bad, by_node)
        if self._is_time() or samples == total:
            self.note(f"encode: {text}")

    def written(self, num_bytes: int, total: int | None, by_node: Mapping[str, int] | None = None) -> None:
        text = self._write_rate.describe(num_bytes, total, by_node or {})
        if self._is_time() or num_bytes == total:
            self.note(f"write: {text}")

    def decoded(self, samples: int, total: int) -> None:
        if self._is_time():
            self.note(f"decode: {samples:,}/{total:,} images")

    def _is_time(self) -> bool:
        now = time.monotonic()
        if now - self._last_s < PLAIN_INTERVAL_S:
            return False
        self._last_s = now
        return True


class _LiveProgress:
    """One rich bar per phase, on stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("{task.description:>8}"), BarColumn(), TextColumn("{task.fields[text]}"))
        self._bars = Progress(*columns, console=Console(stderr=True))
        self._encode = self._bars.add_task("encode", text="", visible=False)
        self._write = self._bars.add_task("write", total=None, text="", visible=False)
        self._decode = self._bars.add_task("decode", text="", visible=False)
        self._rate = _Rate()
        self._write_rate = _WriteRate()

    def __enter__(self) -> _LiveProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def note(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False)

    def encoded(self, samples: int, total: int, source_bytes: int, bad: int, by_node: Mapping[str, int]) -> None:
        text = self._rate.describe(samples, total, source_bytes, bad, by_node)
        self._bars.update(self._encode, completed=samples, total=total, text=text, visible=True)

    def written(self, num_bytes: int, total: int | None, by_node: Mapping[str, int] | None = None) -> None:
        text = self._write_rate.describe(num_bytes, total, by_node or {})
        self._bars.update(self._write, completed=num_bytes, total=total, text=text, visible=True)

    def decoded(self, samples: int, total: int) -> None:
        text = f"{samples:,}/{total:,} images"
        self._bars.update(self._decode, completed=samples, total=total, text=text, visible=True)
