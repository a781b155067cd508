"""What a trial is worth. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

from resnet_dist.config.space import Space

_WORST = {"val/top1": 0.0, "val/top5": 0.0, "val/top1_error": 100.0, "val/top5_error": 100.0, "val/loss": 1e6}


def score_of(space: Space, metrics: Mapping[str, float]) -> float:
    """The space's metric; the worst there is if training diverged or did not get as far as an evaluation."""
    value = metrics.get(space.metric, math.nan)
    return value if math.isfinite(value) else worst_score(space)


def worst_score(space: Space) -> float:
    return _WORST[space.metric]


def is_better(space: Space, first: float, second: float) -> bool:
    return first > second if space.higher_is_better else first < second
