"""Where the seconds from the command to the first training steps went."""

from __future__ import annotations

import time
from collections.abc import Callable

from resnet_dist.launch.control import Status
from resnet_dist.tracking.system_metrics import process_began_s


class Startup:
    """A clock that is read after every stage; the first one begins with this process."""

    def __init__(self, clock: Callable[[], float] = time.time, began_s: float | None = None) -> None:
        """`clock` and `began_s`: Unix time, in seconds."""
        self._clock = clock
        self._began_s = self._passed_s = process_began_s() if began_s is None else began_s
        self._stages: list[str] = []
        self._seen = 0
        """Of the three things that statuses show: workers up, ready, first steps done."""

    def passed(self, stage: str) -> None:
        """`stage` ends now, the next one begins."""
        now_s = self._clock()
        self._stages.append(f"{stage} {now_s - self._passed_s:.1f}")
        self._passed_s = now_s

    def observe(self, status: Status) -> str | None:
        """Call it with every status; its clock is as good as they are frequent. The whole line, once it is known."""
        if self._seen == 0 and status.attempt:
            self.passed("workers")
            self._seen = 1
        if self._seen == 1 and status.resumed_step is not None:
            self.passed("data and net")
            self._seen = 2
        if self._seen == 2 and status.resumed_step is not None and status.step > status.resumed_step:
            steps = status.step - status.resumed_step
            self.passed("first step" if steps == 1 else f"first {steps} steps")
            self._seen = 3
            return f"start-up took {self._passed_s - self._began_s:.1f} s: {', '.join(self._stages)}"
        return None
