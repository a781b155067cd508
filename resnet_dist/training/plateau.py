"""When the rate of a plateau schedule drops: a pure function of the evaluations so far."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from resnet_dist.config.recipe_optim import PlateauSchedule


@dataclass(frozen=True)
class Plateau:
    """Where a run stands; part of its checkpoint."""

    best_error: float = math.inf
    """Top-1, percent."""
    num_without_best: int = 0
    num_drops: int = 0

    def after(self, error: float, schedule: PlateauSchedule) -> Plateau:
        """Once more evaluated, with this top-1 error in percent; the count begins anew after a drop."""
        if error <= self.best_error - schedule.min_improvement and error < self.best_error:
            return Plateau(error, 0, self.num_drops)
        waited = self.num_without_best + 1
        if waited < schedule.patience or self.num_drops == schedule.max_drops:
            return replace(self, num_without_best=waited)
        return Plateau(self.best_error, 0, self.num_drops + 1)
