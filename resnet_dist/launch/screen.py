"""What a person sees while a run works: a live bar on a terminal, plain lines in a job's log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from data_prep.redaction import redacted
from resnet_dist.launch.control import Status
from resnet_dist.training.plan import RunPlan

_LINE_EVERY_S = 5.0


def describe(status: Status, plan: RunPlan) -> str:
    """One line: where the run stands and how it does."""
    metrics = status.metrics
    parts = [f"epoch {plan.epoch_of(max(status.step - 1, 0)) + 1}/{-(-plan.last_step // plan.steps_per_epoch)}"]
    if "train/loss" in metrics:
        parts.append(f"loss {metrics['train/loss']:.4f}")
    if "val/top1" in metrics:
        parts.append(f"val top-1 {metrics['val/top1']:.2f} %")
    if "speed/images_per_s" in metrics:
        parts.append(f"{metrics['speed/images_per_s']:.0f} images/s")
    return ", ".join(parts)


class Screen:
    """Shows statuses; lines go to stderr, so stdout holds results only."""

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._last = Status()
        self._last_line_s = 0.0

    @contextmanager
    def live(self) -> Iterator[Screen]:
        if not self._console.is_terminal:
            yield self
            return
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=self._console) as self._bar:
            self._task = self._bar.add_task("waiting for workers", total=self._plan.last_step)
            yield self
        self._bar = None

    def say(self, line: str) -> None:
        self._console.print(redacted(line), markup=False)

    def show(self, status: Status) -> None:
        """Call it often; it prints what is new."""
        if status.attempt > self._last.attempt:
            again = "" if status.attempt == 1 else f" (attempt {status.attempt}: the workers were restarted)"
            self.say(f"{status.world_size} workers are up{again}")
        for warning in status.warnings[len(self._last.warnings) :]:
            self.say(f"warning: {warning}")
        if self._bar is not None:
            self._bar.update(self._task, completed=status.step, description=describe(status, self._plan))
        elif status.step != self._last.step and time.monotonic() - self._last_line_s >= _LINE_EVERY_S:
            self.say(f"step {status.step}/{self._plan.last_step}: {describe(status, self._plan)}")
            self._last_line_s = time.monotonic()
        self._last = status
