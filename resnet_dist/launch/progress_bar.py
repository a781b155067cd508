"""Lines on the terminal and a bar below them, for whatever runs long: a training, a sweep."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from data_prep.redaction import redacted


class ProgressBar:
    """Writes to stderr, so stdout holds results only.

    Args:
        unit: what is counted, as the bar's first word.
        line_every_s: in a pipe there is no bar, but a line with its text at most so often.
    """

    def __init__(self, unit: str, *, line_every_s: float = 5.0, console: Console | None = None) -> None:
        self._unit, self._line_every_s = unit, line_every_s
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._new_progress()
        self._is_live = False
        self._line_s = 0.0
        self._done = 0.0

    def _new_progress(self) -> None:
        one_line = Column(no_wrap=True)
        text = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # it is what is cut in a narrow terminal
        self._progress = Progress(
            TextColumn("{task.fields[count]}", markup=False, table_column=one_line),
            BarColumn(bar_width=max(10, min(40, self._console.width // 6))),
            TextColumn("{task.fields[left]}", markup=False, table_column=one_line),
            TextColumn("{task.description}", markup=False, table_column=text),
            console=self._console,
            expand=True,
        )
        self._task: TaskID = self._progress.add_task("", total=None, count=self._unit, left="")

    @contextmanager
    def live(self, text: str) -> Iterator[None]:
        """Shows the bar on a terminal until the block is left. Blocks may follow one another."""
        self._new_progress()
        self._progress.update(self._task, description=text)
        if not self._console.is_terminal:
            yield
            return
        with self._progress:
            self._is_live = True
            try:
                yield
            finally:
                self._is_live = False
                self._progress.live.transient = self._progress.tasks[0].total is None  # nothing was counted

    def log(self, line: str) -> None:
        self._console.print(redacted(line), markup=False)

    def phase(self, text: str) -> None:
        """What happens before anything can be counted: the bar's text, in a pipe a line."""
        self._progress.update(self._task, description=redacted(text))
        if not self._is_live:
            self.log(text)

    def show(self, done: float, total: float, text: str, left_s: float | None = None) -> None:
        """
        Args:
            left_s: seconds to the end; None: by the speed of the last half minute.
        """
        count = f"{self._unit} {_number(done)}/{_number(total)}"
        self._progress.update(self._task, completed=done, total=total, description=redacted(text), count=count)
        seconds = self._progress.tasks[0].time_remaining if left_s is None else left_s
        left = "" if seconds is None else f"{timedelta(seconds=round(seconds))} left"
        self._progress.update(self._task, left=left)
        now_s = time.monotonic()
        if not self._is_live and done != self._done and now_s - self._line_s >= self._line_every_s:
            self._done, self._line_s = done, now_s
            self.log(f"{count}{', ' * bool(left)}{left}: {text}")


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
