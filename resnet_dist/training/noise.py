"""The keys of a step's random layers (drop-path, dropout): pure functions of (seed, step, micro-batch, layer)."""

from __future__ import annotations

import numpy as np

from resnet_dist.data.keyed_random import Stream, sample_keys, splitmix64


def layer_keys(seed: int, step: int, micro_batch: int, num_layers: int) -> list[int]:
    """One signed 64-bit key for each random layer of the net, for one micro-batch of optimizer step `step`."""
    key = sample_keys(Stream.LAYER_NOISE, seed, step, [micro_batch])
    keys: list[int] = splitmix64(key, np.arange(num_layers, dtype=np.uint64)).view(np.int64).tolist()
    return keys
