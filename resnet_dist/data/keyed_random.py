"""Random numbers without state: every draw is a pure function of (stream, seed, epoch, sample id, number of the draw).

So a crop does not depend on threads, batches, worker counts or restarts. The numbers are the same to the last bit with
every numpy version and on every machine. The tests pin values, since a change here changes every run.
"""

from __future__ import annotations

import math
from decimal import Decimal
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

Reals = NDArray[np.float64]
Integers = NDArray[np.int64]

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
    """Samples that replace bad ones."""
    LAYER_NOISE = 8
    """Drop-path and dropout; the epoch of its keys is the step, the sample id the micro-batch."""
    TURNS = 9
    """`data.sampling`: in which order the samples of a class take turns."""


def splitmix64(seeds: NDArray[np.uint64], counters: ArrayLike) -> NDArray[np.uint64]:
    """Output number `counters` (from 0) of the splitmix64 generators seeded with `seeds`; the two broadcast.

    Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators". For one seed the map from counter to
    output is a bijection on 64 bits. `seeds` needs at least one dimension: numpy's uint64 arrays wrap around
    silently, its scalars warn.
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


# Distributions. Only +, -, *, / and sqrt, which IEEE 754 rounds exactly: numpy's and libm's exp, log and sin differ in
# the last bit between instruction sets, and a last bit can move a crop by a pixel.


def between(low: float, high: float, draws: Reals) -> Reals:
    return low + (high - low) * draws


def below(limits: Integers | np.int64, draws: Reals) -> Integers:
    """Uniform integers in [0, limit); a draw is below 1 by at least 2**-53, so for limits under 2**53 the top holds."""
    return (limits * draws).astype(np.int64)


def log_uniform(low: float, high: float, draws: Reals) -> Reals:
    """Between `low` and `high`, both within e**-3 and e**3, uniform in the logarithm."""
    first, last = (float(Decimal(bound).ln()) for bound in (low, high))  # decimal's is the same on every machine
    return exp(between(first, last, draws))


def normal(draws: Reals) -> Reals:
    """Standard normal numbers from uniform ones in [0, 1): Acklam's inverse distribution function, relative error below
    1.2e-9; draws below 1e-12 count as 1e-12."""
    p = np.clip(draws, 1e-12, 1 - 1e-12)
    tail = np.minimum(p, 1 - p)
    q, r = p - 0.5, (p - 0.5) * (p - 0.5)
    central = q * _horner(_A, r) / (_horner(_B, r) * r + 1.0)
    t = np.sqrt(-2.0 * log(tail))
    lower = _horner(_C, t) / (_horner(_D, t) * t + 1.0)
    return np.where(tail < 0.02425, np.where(p < 0.5, lower, -lower), central)


def exp(x: Reals) -> Reals:
    """e**x by a Taylor polynomial of x / 32 and five squarings: relative error below 1e-13 for |x| <= 3."""
    reduced = x / 32.0
    result = np.ones_like(reduced)
    for k in range(10, 0, -1):
        result = 1.0 + result * reduced / k
    for _ in range(5):
        result = result * result
    return result


def log(x: Reals) -> Reals:
    """Natural logarithm of positive numbers: 2 atanh((m - 1) / (m + 1)) of the mantissa m in [sqrt(1/2), sqrt(2))."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < math.sqrt(0.5)
    mantissa, exponent = np.where(small, 2 * mantissa, mantissa), exponent - small
    z = (mantissa - 1.0) / (mantissa + 1.0)
    series = np.zeros_like(z)
    for k in range(21, 0, -2):
        series = series * (z * z) + 1.0 / k
    return 2.0 * z * series + exponent * 0.6931471805599453


def sin_cos(degrees: float) -> tuple[float, float]:
    """Sine and cosine to 15 decimals, as Pillow rounds them, for angles of -180 to 180."""
    x = degrees * (math.pi / 180.0)
    sine = cosine = 0.0
    for k in range(28, -1, -2):  # sums of x**k / k!, the smallest first
        sign = 1 - k % 4  # 1, -1, 1, ... for k = 0, 2, 4, ...
        cosine += sign * _power(x, k) / math.factorial(k)
        sine += sign * _power(x, k + 1) / math.factorial(k + 1)
    return round(sine, 15), round(cosine, 15)


def _power(x: float, k: int) -> float:
    """x**k by multiplications: libm's pow may differ in the last bit."""
    result = 1.0
    for _ in range(k):
        result *= x
    return result


def _horner(coefficients: tuple[float, ...], x: Reals) -> Reals:
    result = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result = result * x + coefficient
    return result


# Peter Acklam 2003, "An algorithm for computing the inverse normal cumulative distribution function".
_A = (
    -39.69683028665376,
    220.9460984245205,
    -275.9285104469687,
    138.357751867269,
    -30.66479806614716,
    2.506628277459239,
)
_B = (-54.47609879822406, 161.5858368580409, -155.6989798598866, 66.80131188771972, -13.28068155288572)
_C = (
    *(-0.007784894002430293, -0.3223964580411365, -2.400758277161838),
    *(-2.549732539343734, 4.374664141464968, 2.938163982698783),
)
_D = (0.007784695709041462, 0.3224671290700398, 2.445134137142996, 3.754408661907416)
