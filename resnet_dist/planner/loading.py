"""Images to the net: CPUs, disks, and what becomes of the speed when they do not keep up."""

from __future__ import annotations

from itertools import pairwise

from resnet_dist.planner.constants import IMAGES_PER_CORE, LOADER_SHARPNESS


def images_per_core(decoder: str, image_px: int) -> float:
    """Measured sizes, straight lines between them, the nearest beyond."""
    table = sorted(IMAGES_PER_CORE[decoder].items())
    if image_px <= table[0][0]:
        return table[0][1]
    for (low, slow), (high, fast) in pairwise(table):
        if image_px <= high:
            return slow + (fast - slow) * (image_px - low) / (high - low)
    last_px, last = table[-1]
    return last * (last_px / image_px) ** 2


def throttled(rate: float, limit: float) -> float:
    """What a stage of `rate` keeps of its speed behind one of `limit` with a short queue between them."""
    p = LOADER_SHARPNESS
    return (rate**-p + limit**-p) ** (-1 / p)
