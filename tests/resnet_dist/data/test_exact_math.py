"""Near libm's functions, and always the same bits."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from resnet_dist.data.exact_math import exp, log, log_uniform, normal, sin_cos


def test_functions_are_near_libms() -> None:
    x = np.linspace(-3, 3, 10_001)
    assert np.allclose(exp(x), np.exp(x), rtol=1e-13, atol=0)
    positive = np.concatenate([np.geomspace(1e-300, 1e300, 9_999), [1.0, 0.5, 2.0, 1 - 2**-53, 1 + 2**-52]])
    assert np.allclose(log(positive), np.log(positive), rtol=1e-14, atol=1e-16)
    assert log(np.array([1.0]))[0] == 0.0


def test_sines_are_pillows() -> None:
    for degrees in np.linspace(-180, 180, 1441):
        exact = (round(math.sin(math.radians(degrees)), 15), round(math.cos(math.radians(degrees)), 15))
        assert sin_cos(float(degrees)) == pytest.approx(exact, abs=2e-15)
    assert sin_cos(90.0) == (1.0, 0.0)
    assert sin_cos(-90.0) == (-1.0, 0.0)


def test_normal_numbers() -> None:
    draws = np.concatenate([np.linspace(0.0, 1 - 2**-53, 4001), [1e-9, 0.02425, 0.97575]])
    exact = np.array([NormalDist().inv_cdf(min(max(u, 1e-12), 1 - 1e-12)) for u in draws])
    assert np.allclose(normal(draws), exact, rtol=2e-9, atol=1e-15)


def test_log_uniform_ends_where_it_should() -> None:
    assert log_uniform(0.3, 3.3, np.array([0.0, 0.5, 1.0])) == pytest.approx([0.3, math.sqrt(0.99), 3.3], rel=1e-12)


def test_bits_never_change() -> None:
    """A change here moves crops and colours: the values are part of every recipe's meaning."""
    values = [*exp(np.array([0.7, -2.9])), *log(np.array([0.3, 1e-12])), *normal(np.array([0.4, 0.001]))]
    assert [float(v).hex() for v in values] == [
        "0x1.01c2a61268997p+1",
        "0x1.c2c00e553650dp-5",
        "-0x1.34378fcbda720p+0",
        "-0x1.ba18a998fffa0p+4",
        "-0x1.036d6c4547b92p-2",
        "-0x1.8b8cbb6ee2822p+1",
    ]
