"""How large training images are in an epoch: a pure function of the recipe and the epoch."""

from __future__ import annotations

from math import floor

from resnet_dist.config.recipe_data import DataConfig


def train_size(data: DataConfig, epoch: int, total_epochs: int) -> int:
    """Side in px of what the net sees in `epoch` (from 0): `data.train.size`, or on the way there (ffcv-imagenet's
    ramp, in whole epochs)."""
    ramp, end_size = data.progressive_size, data.train.size
    if ramp is None:
        return end_size
    # The small number makes 0.29 * 100 epochs 29, which is a little less in binary.
    first, last = (floor(share * total_epochs + 1e-9) for share in ramp.ramp)
    if epoch <= first:
        return ramp.start_size
    if epoch >= last:
        return end_size
    size = ramp.start_size + (epoch - first) / (last - first) * (end_size - ramp.start_size)
    return round(size / ramp.multiple) * ramp.multiple
