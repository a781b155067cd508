"""How much later than the mean the slowest of many workers is."""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist


@cache
def expected_maximum(n: int) -> float:
    """Of n standard normal numbers. By numerical integration: int_0^1 quantile(u) n u^(n-1) du, u = v^(1/n)."""
    if n == 1:
        return 0.0
    normal, points = NormalDist(), 4096
    return sum(normal.inv_cdf(math.exp(math.log((i + 0.5) / points) / n)) for i in range(points)) / points
