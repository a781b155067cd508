"""What every step of a conversion needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_prep.convert.output import Output
from data_prep.convert.plan import Plan
from data_prep.convert.pool import Pool, Progress
from data_prep.convert.stop import StopFlag
from data_prep.sources.base import Source


@dataclass(frozen=True)
class Means:
    source: Source
    plan: Plan
    output: Output
    pool: Pool
    progress: Progress
    stop: StopFlag

    @property
    def reads_again(self) -> bool:
        """The source is on a file system: cheap to read and to list again. Anything else is made or fetched anew each
        time."""
        return Path(self.plan.source.location).is_absolute()
