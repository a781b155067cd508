"""Draws are functions of their key: pinned forever, and random enough for statistical tests."""

from __future__ import annotations

import hashlib
import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.data.keyed_random import (
    Stream,
    exp,
    log,
    log_uniform,
    normal,
    sample_keys,
    sin_cos,
    splitmix64,
    uniform,
)

MASK = 2**64 - 1


def splitmix64_in_python(seed: int, counter: int) -> int:
    z = (seed + (counter + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_splitmix64_is_the_published_one() -> None:
    """The first outputs for seed 1234567, as every implementation's test lists them."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64(np.array([1234567], np.uint64), range(5)).tolist() == expected


@given(st.integers(0, 2**32 - 1), st.integers(0, 10_000), st.integers(0, 2**40), st.integers(0, 30))
def test_a_draw_is_the_chain_of_its_key(seed: int, epoch: int, sample_id: int, draw: int) -> None:
    state = int(Stream.AUGMENTATION)
    for word in (seed, epoch, sample_id, draw):
        state = splitmix64_in_python(state, word)
    draws = uniform(sample_keys(Stream.AUGMENTATION, seed, epoch, [sample_id]), draw + 1)
    assert draws[0, draw] == (state >> 11) / 2**53


def test_draws_never_change() -> None:
    keys = sample_keys(Stream.AUGMENTATION, 1, 2, [0, 1, 1_281_166])
    assert keys.tolist() == [13967098786185089623, 5196050285141524994, 7222842447665270521]
    draws = uniform(keys, 23)
    assert draws.dtype == np.float64
    digest = hashlib.sha256(draws.astype("<f8").tobytes()).hexdigest()
    assert digest == "ca800e09e928d1ffb927efef7a0e17567bbbd2934b682791a9a1f63aca377c55"


def test_a_sample_draws_the_same_in_any_company() -> None:
    together = uniform(sample_keys(Stream.AUGMENTATION, 9, 4, np.arange(1000)), 23)
    assert np.array_equal(uniform(sample_keys(Stream.AUGMENTATION, 9, 4, [700, 3]), 5), together[[700, 3], :5])


def test_every_word_of_the_key_counts() -> None:
    keys = [
        sample_keys(stream, seed, epoch, np.arange(100))
        for stream in Stream
        for seed in range(10)
        for epoch in range(10)
    ]
    assert len(np.unique(np.concatenate(keys))) == len(Stream) * 10 * 10 * 100


def test_draws_fill_the_unit_interval_evenly() -> None:
    """Pearson's chi-square of 100 cells and 2**17 draws; 99 degrees of freedom: 0.1 % of fair dice exceed 148."""
    draws = uniform(sample_keys(Stream.AUGMENTATION, 0, 0, np.arange(2**14)), 8)
    assert 0.0 <= draws.min() < draws.max() < 1.0
    assert (draws * 2**53 == np.floor(draws * 2**53)).all()
    counts = np.bincount((draws * 100).astype(np.int64).ravel(), minlength=100)
    expected = draws.size / 100
    assert np.round(((counts - expected) ** 2 / expected).sum(), 3) == 96.222


def test_neighbours_are_independent() -> None:
    """Of neighbouring sample ids, epochs, seeds and draw numbers: |correlation| of 2**17 pairs, 5 sigma is 0.0138."""

    def draws(seed: int, epoch: int, first_id: int) -> np.ndarray:
        return uniform(sample_keys(Stream.AUGMENTATION, seed, epoch, np.arange(first_id, first_id + 2**14)), 9)

    here = draws(5, 5, 0)
    pairs = {
        "sample id": (here[:, :8], draws(5, 5, 1)[:, :8]),
        "epoch": (here[:, :8], draws(5, 6, 0)[:, :8]),
        "seed": (here[:, :8], draws(6, 5, 0)[:, :8]),
        "draw": (here[:, :8], here[:, 1:]),
        "seed and epoch": (here[:, :8], draws(6, 4, 0)[:, :8]),
    }
    correlations = {name: float(np.corrcoef(a.ravel(), b.ravel())[0, 1]) for name, (a, b) in pairs.items()}
    assert {name: c for name, c in correlations.items() if abs(c) > 0.0138} == {}


def test_the_order_tells_nothing_about_the_augmentation() -> None:
    position = np.argsort(np.argsort(sample_keys(Stream.ORDER, 5, 5, np.arange(2**17))))
    first_draw = uniform(sample_keys(Stream.AUGMENTATION, 5, 5, np.arange(2**17)), 1)[:, 0]
    assert abs(np.corrcoef(position, first_draw)[0, 1]) < 0.0138


# Near libm's functions, and always the same bits.


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
