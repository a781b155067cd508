"""The order of samples is the same for any number of workers, and never changes."""

from __future__ import annotations

import doctest
import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.config.recipe import BalancedSampling, WeightedSampling
from resnet_dist.data import order as order_module
from resnet_dist.data.order import (
    ClassSampling,
    PageShuffle,
    epoch_permutation,
    eval_batches,
    micro_batch_share,
    page_permutation,
    replacement_ids,
    sampling_weights,
    train_order,
)
from resnet_dist.errors import UserError

WORLD_SIZES = range(1, 65)
SIZES = {"seed": 11, "epoch": 2, "global_batch_size": 256, "micro_batch_size": 4}
"""64 micro-batches of 4: three steps of 1003 samples, and a tail of 235."""
REPEATED = {"seed": 11, "epoch": 2, "global_batch_size": 24, "micro_batch_size": 4, "rank": 0, "world_size": 1}


def test_the_permutation_never_changes() -> None:
    """A change here changes every run ever made with a recipe: the values are part of the recipe's meaning."""
    assert epoch_permutation(10, seed=42, epoch=3).tolist() == [5, 1, 4, 8, 6, 2, 0, 3, 7, 9]
    big = epoch_permutation(100_000, seed=2**32 - 1, epoch=89)
    assert big.dtype == np.int64
    digest = hashlib.sha256(big.astype("<i8").tobytes()).hexdigest()
    assert digest == "b1251ccbd65b4dcfa92015881e67891f7c20222406e13f0930225ae02386c5e9"


@given(st.integers(0, 300), st.integers(0, 2**32 - 1), st.integers(0, 1000))
def test_every_sample_is_in_the_permutation_once(num_samples: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_permutation(num_samples, seed, epoch)) == list(range(num_samples))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    """Also (seed, epoch) and (seed + 1, epoch - 1), which ffcv's own shuffle takes for the same."""
    orders = {epoch_permutation(50, seed, epoch).tobytes() for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


@pytest.mark.parametrize("start_step", [0, 1, 3])
@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("page_shuffle", [None, PageShuffle(np.arange(1003) // 17, 6)])
@pytest.mark.parametrize("sampling", [None, ClassSampling(np.arange(1003) % 7 // 3, np.array([1, 5, 2]), seed=11)])
def test_every_world_size_trains_on_the_same_micro_batches(
    sampling: ClassSampling | None, page_shuffle: PageShuffle | None, repeats: int, start_step: int
) -> None:
    def share(rank: int, world_size: int, start_step: int) -> np.ndarray:
        where = {"rank": rank, "world_size": world_size, "start_step": start_step}
        return train_order(1003, **SIZES, **where, page_shuffle=page_shuffle, repeats=repeats, sampling=sampling)

    alone = share(0, 1, 0)
    assert alone.shape == (3, 64, 4)
    for world_size in (1, 2, 3, 8, 33, 64):
        shares = [share(rank, world_size, start_step) for rank in range(world_size)]
        assert np.array_equal(np.concatenate(shares, axis=1), alone[start_step:])
        assert all(share.dtype == np.int64 and share.flags.c_contiguous for share in shares)


@given(st.data())
def test_any_sizes_share_one_order(data: st.DataObject) -> None:
    micro = data.draw(st.integers(1, 5), "micro_batch_size")
    num_micro = data.draw(st.integers(1, 12), "num_micro_batches")
    num_samples = data.draw(st.integers(micro * num_micro, 6 * micro * num_micro), "num_samples")
    world = data.draw(st.integers(1, num_micro), "world_size")
    num_steps = num_samples // (micro * num_micro)
    start = data.draw(st.integers(0, num_steps), "start_step")
    shares = [
        train_order(
            num_samples,
            seed=3,
            epoch=1,
            global_batch_size=micro * num_micro,
            micro_batch_size=micro,
            rank=rank,
            world_size=world,
            start_step=start,
        )
        for rank in range(world)
    ]
    together = np.concatenate(shares, axis=1)
    assert together.shape == (num_steps - start, num_micro, micro)
    used = epoch_permutation(num_samples, 3, 1)[start * micro * num_micro : num_steps * micro * num_micro]
    assert together.reshape(-1).tolist() == used.tolist()
    assert len(set(used.tolist())) == used.size


def test_shares_are_contiguous_and_even() -> None:
    for world_size in WORLD_SIZES:
        shares = [micro_batch_share(64, rank, world_size) for rank in range(world_size)]
        assert [number for share in shares for number in share] == list(range(64))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert shares[0].start == 0
    assert micro_batch_share(7, 1, 3) == range(3, 5)


def test_evaluation_sees_every_sample_once() -> None:
    for num_samples in (0, 1, 31, 32, 33, 1000):
        for world_size in WORLD_SIZES:
            numbers = [k for rank in range(world_size) for k in eval_batches(num_samples, 32, rank, world_size)]
            seen = [i for k in numbers for i in range(k * 32, min((k + 1) * 32, num_samples))]
            assert seen == list(range(num_samples))
    assert [list(eval_batches(65, 32, rank, 5)) for rank in range(5)] == [[0], [1], [2], [], []]


def test_too_little_data_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"global_batch_size \(256\) .* \(255 samples\)"):
        train_order(255, **SIZES, rank=0, world_size=1)


def test_impossible_arguments_are_refused() -> None:
    one = {"rank": 0, "world_size": 1}
    for arguments, message in (
        ({"rank": 0, "world_size": 65}, "65 workers share 64"),
        ({"rank": 2, "world_size": 2}, "rank 2"),
        ({**one, "start_step": 4}, "start_step 4"),
        ({**one, "global_batch_size": 10}, "not a multiple"),
    ):
        with pytest.raises(ValueError, match=message):
            train_order(1003, **{**SIZES, **arguments})
    with pytest.raises(ValueError, match="rank -1"):
        eval_batches(10, 5, -1, 2)


# Pages


def test_the_page_shuffle_never_changes() -> None:
    order = page_permutation(PageShuffle(np.arange(24) // 4, 2), seed=42, epoch=3)
    expected = [2, 0, 3, 15, 17, 12, 14, 18, 13, 19, 5, 4, 6, 16, 23, 7, 22, 20, 11, 8, 21, 1, 10, 9]
    assert order.tolist() == expected
    assert replacement_ids(1000, 5, 2, 18).tolist() == [978, 457, 196, 869, 384, 439, 626, 928, 132, 171]


@given(st.lists(st.integers(0, 9), max_size=80), st.integers(1, 12), st.integers(0, 99))
def test_every_sample_is_in_the_page_shuffle_once(pages: list[int], window: int, epoch: int) -> None:
    order = page_permutation(PageShuffle(np.array(pages, np.int64), window), seed=5, epoch=epoch)
    assert sorted(order) == list(range(len(pages)))


def test_repeated_images_are_in_one_global_batch_in_different_micro_batches() -> None:
    alone = train_order(103, **REPEATED, repeats=3)
    assert alone.shape == (4, 6, 4)
    for step in alone:
        images, copies = step % 103, step // 103
        shown, counts = np.unique(images, return_counts=True)
        assert counts.tolist() == [3] * 8
        for image in shown:
            assert sorted(copies[images == image]) == [0, 1, 2]
            assert len(set(np.nonzero(images == image)[0])) == 3
    in_order = alone.swapaxes(1, 2).reshape(-1)[::3]
    assert in_order.tolist() == epoch_permutation(103, 11, 2)[:32].tolist()


def test_a_number_of_repeats_that_does_not_divide_the_batch() -> None:
    steps = train_order(103, **REPEATED, repeats=5)
    assert np.unique(steps).size == steps.size  # no image twice under the same draws
    assert len(np.unique(steps % 103)) == -(-steps.size // 5)


# Sampling by class


LABELS = np.array([2, 0, 2, 2, 1, 2, 2, 0, 2, 2, 2, 2, 2, 1, 2, 2])
"""Two of class 0, two of class 1, twelve of class 2."""
TURNS = (
    [7, 1, 23, 17, 39, 33, 4, 13, 20, 29, 36, 6, 11, 15, 9, 3],
    [7, 1, 23, 17, 39, 33, 4, 13, 20, 29, 36, 3, 10, 14, 8, 12],
    [[[23, 9, 0, 1], [6, 17, 5, 45], [29, 13, 15, 7], [4, 20, 33, 11]]],
)


def sampling_of(labels: np.ndarray, weights: Sequence[int], seed: int = 5) -> ClassSampling:
    return ClassSampling(labels, np.array(weights), seed)


def test_the_turns_never_change() -> None:
    sampling = sampling_of(LABELS, [1, 1, 1])
    assert sampling.ids(16, epoch=0).tolist() == TURNS[0]
    assert sampling.ids(16, epoch=3).tolist() == TURNS[1]
    order = train_order(16, **{**SIZES, "global_batch_size": 16}, rank=0, world_size=1, sampling=sampling)
    assert order.tolist() == TURNS[2]


@given(st.data())
def test_a_class_gets_its_share_and_its_samples_take_turns(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), "counts")
    weights = [data.draw(st.integers(0 if any(counts[:i]) else 1, 50)) if n else 0 for i, n in enumerate(counts)]
    num_ids, repeats = data.draw(st.integers(1, 60), "num_ids"), data.draw(st.integers(1, 3), "repeats")
    first, num_epochs = data.draw(st.integers(0, 5), "first"), data.draw(st.integers(1, 4), "num_epochs")
    labels = np.repeat(np.arange(len(counts)), counts)
    sampling, in_all = sampling_of(labels, weights), np.zeros(len(labels), np.int64)
    for epoch in range(first, first + num_epochs):
        ids = sampling.ids(num_ids, epoch, repeats)
        assert len(set(ids)) == len(ids) == num_ids  # no sample twice under the same draws
        times = np.bincount(ids % len(labels), minlength=len(labels))
        in_all += times
        copies = sorted(zip(ids % len(labels), ids // len(labels), strict=True))
        assert copies == [(i, repeats * turn) for i, n in enumerate(times) for turn in range(n)]
        shares = np.array(weights) * num_ids / sum(weights)
        assert (abs(np.bincount(labels, times, minlength=len(counts)) - shares) <= 1).all()
        for shown in (times, in_all):
            assert all(np.ptp(shown[labels == c]) <= 1 for c, n in enumerate(counts) if n)


def test_rounding_evens_out_over_the_epochs() -> None:
    """Ten classes share 96 images: 9 or 10 each, 480 each after 50 epochs."""
    labels = np.repeat(np.arange(10), 40)
    sampling = sampling_of(labels, [1] * 10)
    by_epoch = [np.bincount(labels[sampling.ids(96, epoch) % 400]) for epoch in range(50)]
    assert {*np.unique(by_epoch)} == {9, 10}
    assert np.sum(by_epoch, axis=0).tolist() == [480] * 10


def test_weights_of_classes() -> None:
    names, counts = ("ant", "bee", "cat"), (100, 400, 0)
    for sampling, shares in (
        (BalancedSampling(kind="balanced"), (1 / 2, 1 / 2, 0)),
        (BalancedSampling(kind="balanced", power=0.5), (1 / 3, 2 / 3, 0)),
        (BalancedSampling(kind="balanced", power=1), (1 / 5, 4 / 5, 0)),
        (WeightedSampling(kind="weighted", weights={"ant": 4, "cat": 9}), (1 / 2, 1 / 2, 0)),
        (WeightedSampling(kind="weighted", weights={"bee": 0}), (1, 0, 0)),
    ):
        weights = sampling_weights(sampling, names, counts)
        assert weights / weights.sum() == pytest.approx(shares, abs=1e-8)
    for weights, message in (({"bea": 1}, "no class 'bea'; did you mean 'bee'"), ({"ant": 0, "bee": 0}, "above 0")):
        with pytest.raises(UserError, match=message):
            sampling_weights(WeightedSampling(kind="weighted", weights=weights), names, counts)


def test_samples_repeated_by_class_and_by_augmentation_have_draws_of_their_own() -> None:
    """One sample of two classes with half the epoch: 12 turns of two copies in 48 images."""
    sampling = sampling_of(np.array([0] + [1] * 102), [1, 1])
    steps = train_order(
        103, **{**REPEATED, "global_batch_size": 48, "micro_batch_size": 8}, repeats=2, sampling=sampling
    )
    assert np.unique(steps).size == steps.size == 96
    rare = steps[steps % 103 == 0] // 103
    assert sorted(rare) == list(range(48))


def test_the_example_in_the_docstring_is_right() -> None:
    found = doctest.testmod(order_module)
    assert (found.attempted, found.failed) == (6, 0)
