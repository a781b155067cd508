"""Real functions from +, -, *, / and sqrt alone, which IEEE 754 rounds exactly: the same bits on every machine.

numpy's and libm's exp, log and sin differ in the last bit between instruction sets, and a last bit can move a crop by a
px.
"""

from __future__ import annotations

import math
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

Reals = NDArray[np.float64]
Integers = NDArray[np.int64]


def between(low: float, high: float, draws: Reals) -> Reals:
    return low + (high - low) * draws


def below(limits: Integers | np.int64, draws: Reals) -> Integers:
    """Uniform integers in [0, limit); a draw is below 1 by at least 2**-53, so for limits under 2**53 the top holds."""
    return (limits * draws).astype(np.int64)


def log_uniform(low: float, high: float, draws: Reals) -> Reals:
    """Between `low` and `high`, both within e**-3 and e**3, uniform in the logarithm."""
    first, last = (float(Decimal(bound).ln()) for bound in (low, high))  # decimal's is the same on every machine
    return exp(between(first, last, draws))


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


def sin_cos(degrees: float) -> tuple[float, float]:
    """To 15 decimals, as Pillow rounds them, for angles of -180 to 180."""
    x = degrees * (math.pi / 180.0)
    sine = cosine = 0.0
    for k in range(28, -1, -2):  # sums of x**k / k!, the smallest first
        sign = 1 - k % 4  # 1, -1, 1, ... for k = 0, 2, 4, ...
        cosine += sign * _power(x, k) / math.factorial(k)
        sine += sign * _power(x, k + 1) / math.factorial(k + 1)
    return round(sine, 15), round(cosine, 15)


def _power(x: float, k: int) -> float:
    """By multiplications: libm's pow may differ in the last bit."""
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
