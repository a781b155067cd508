"""Random numbers without state: every draw is a pure function of (stream, seed, epoch, sample id, number of the draw).

So a crop does not depend on threads, batches, worker counts or restarts. Integer arithmetic on uint64 only, the same in
every numpy version and on every machine; golden values in the tests pin it, since a change here changes every run.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class Stream(IntEnum):
    """Independent families of draws. The numbers are part of every key: never renumber, only append."""

    ORDER = 0
    AUGMENTATION = 1
    """Crop and flip."""
    PIXELS = 2
    """The operations of `data.train.augment`."""
    MIXING = 3
    """Mixup and CutMix: (seed, step, micro-batch)."""
    PAGES = 4
    """The order of a beton's pages."""
    REPLACEMENT = 5
    """Samples in the place of bad ones."""
    LAYER_NOISE = 8
    """Drop-path and dropout; the epoch of its keys is the step, the sample id the micro-batch."""


def splitmix64(seeds: NDArray[np.uint64], counters: ArrayLike) -> NDArray[np.uint64]:
    """Output number `counters` (from 0) of the splitmix64 generators seeded with `seeds`; the two broadcast.

    Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators". For one seed the map from counter to
    output is a bijection on 64 bits. `seeds` needs at least one dimension: numpy's uint64 arrays wrap around in
    silence, its scalars warn.
    """
    z = seeds + (np.atleast_1d(np.asarray(counters, dtype=np.uint64)) + np.uint64(1)) * _GOLDEN_GAMMA
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sample_keys(stream: Stream, seed: int, epoch: int, sample_ids: ArrayLike) -> NDArray[np.uint64]:
    """One 64-bit key per sample, shape [N]; within one (stream, seed, epoch) no two samples share a key."""
    key = np.array([stream], dtype=np.uint64)
    for word in (seed, epoch):
        key = splitmix64(key, [word])
    return splitmix64(key, sample_ids)


def uniform(keys: NDArray[np.uint64], num_draws: int) -> NDArray[np.float64]:
    """Draws 0 .. num_draws-1 of every key: float64 [N, num_draws] in [0, 1), each a multiple of 2**-53."""
    bits = splitmix64(keys[:, None], np.arange(num_draws, dtype=np.uint64))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
