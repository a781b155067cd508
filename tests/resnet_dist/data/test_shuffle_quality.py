"""The page shuffle mixes nearly as well as the full one, also where the file is sorted by class."""

from __future__ import annotations

import numpy as np
import pytest

from resnet_dist.bench.shuffle import ShuffleQuality, bench_shuffle, measure
from resnet_dist.data.order import PageShuffle, epoch_permutation, page_permutation

SAMPLES = np.arange(100_000)
PAGE_OF, CLASS_OF = SAMPLES // 50, SAMPLES // 1000
"""2,000 pages; 100 classes, one after the other, of 20 pages each."""
BATCH, WINDOW = 128, 200


def mixing(order: np.ndarray, window: int = WINDOW) -> ShuffleQuality:
    return measure(order, PAGE_OF, CLASS_OF, BATCH, kept_for=window * 50)


@pytest.mark.parametrize("epoch", range(3))
def test_a_class_sorted_file_shows_no_clumps(epoch: int) -> None:
    """A batch shows as many classes as one drawn by chance from a window of random pages."""
    full = mixing(epoch_permutation(len(SAMPLES), 3, epoch))
    ours = mixing(page_permutation(PageShuffle(PAGE_OF, WINDOW), 3, epoch))
    rng, drawn = np.random.default_rng(0), []
    for _ in range(2000):
        classes_of_pages = rng.permutation(2000)[:WINDOW] // 20
        drawn.append(len(np.unique(classes_of_pages[rng.integers(WINDOW, size=BATCH)])))
    assert full.classes_per_batch == pytest.approx(100 * (1 - 0.99**BATCH), rel=0.01)
    assert ours.classes_per_batch == pytest.approx(np.mean(drawn), rel=0.02)
    assert ours.most_of_a_class <= full.most_of_a_class + 6
    assert mixing(SAMPLES).most_of_a_class == BATCH


def test_neighbours_and_memory_are_those_of_the_window() -> None:
    ours = mixing(page_permutation(PageShuffle(PAGE_OF, WINDOW), 3, 0))
    assert ours.same_page == pytest.approx(1 / WINDOW, rel=0.1)
    assert ours.pages_per_batch == pytest.approx(WINDOW * (1 - (1 - 1 / WINDOW) ** BATCH), rel=0.02)
    assert ours.pages_in_memory <= 2 * WINDOW + 2
    assert ours.reads_of_a_page < 1 + 1.2 * WINDOW / 2000  # the window where the circle closes is read twice


def test_neighbours_from_one_page_are_spread_as_by_chance() -> None:
    """Gaps between samples of one page: within the window as a full shuffle's within its whole, no comb, no clump."""
    order = page_permutation(PageShuffle(PAGE_OF, WINDOW), 3, 0)
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    by_page = np.sort(places.reshape(2000, 50), axis=1)
    whole = by_page[np.ptp(by_page, axis=1) < WINDOW * 50]  # not where the circle closes
    gaps = np.diff(whole, axis=1).ravel() / (WINDOW * 50)
    assert len(whole) > 1750
    # Of 50 places drawn evenly from a stretch, a gap is longer than x with probability (1 - x) ** 50.
    for x in (0.005, 0.02, 0.05, 0.1):
        assert (gaps > x).mean() == pytest.approx((1 - x) ** 50, abs=0.01)


def test_the_table() -> None:
    table = bench_shuffle(num_samples=4096, samples_per_page=16, num_classes=8, batch_size=32, windows=[16, 64])
    lines = table.splitlines()
    assert lines[0] == "4,096 samples sorted into 8 classes, 16 on a page (256 pages), batches of 32"
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| full", "| page, window 16", "| page, window 64"]
