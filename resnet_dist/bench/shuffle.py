"""`resnet-dist bench shuffle`: how well `data.shuffle: page` mixes, beside a full shuffle. Pure numpy, no files.

Imagines a beton as large as ImageNet with its samples sorted by class: the worst case, where a page holds one class.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from resnet_dist.bench.paired import markdown
from resnet_dist.data.order import PageShuffle, epoch_permutation, page_permutation


class ShuffleQuality(NamedTuple):
    """Figures of one order."""

    same_page: float
    """Share of neighbours in the order that come from one page."""
    pages_per_batch: float
    """Distinct pages in a global batch, on average."""
    classes_per_batch: float
    """Distinct classes in a global batch, on average."""
    most_of_a_class: int
    """Samples of the commonest class in any global batch of the epoch."""
    pages_in_memory: int
    """The most pages in memory, if a page is kept until it was not used for `kept_for` samples."""
    reads_of_a_page: float
    """How often a page is then read in the epoch, on average."""


def bench_shuffle(
    *, num_samples: int, samples_per_page: int, num_classes: int, batch_size: int, windows: list[int]
) -> str:
    """A Markdown table: the full shuffle, then the page shuffle with each window, in pages.

    Memory and reads assume that pages are kept for a window's worth of samples; for the full shuffle, the largest
    window.
    """
    ids = np.arange(num_samples)
    page_of, class_of = ids // samples_per_page, ids * num_classes // num_samples
    orders = {"full": (epoch_permutation(num_samples, 0, 0), max(windows))}
    for window in windows:
        orders[f"page, window {window}"] = page_permutation(PageShuffle(page_of, window), 0, 0), window
    rows = []
    for name, (order, window) in orders.items():
        found = measure(order, page_of, class_of, batch_size, kept_for=window * samples_per_page)
        row = [name, f"1 in {1 / found.same_page:,.0f}", f"{found.pages_per_batch:.1f}"]
        row += [f"{found.classes_per_batch:.1f}", str(found.most_of_a_class)]
        rows.append([*row, f"{found.pages_in_memory:,}", f"{found.reads_of_a_page:.2f}"])
    head = ["shuffle", "neighbours from one page", "pages in a batch", "classes in a batch"]
    head += ["most of one class in any batch", "pages in memory", "reads of a page"]
    return (
        f"{num_samples:,} samples sorted into {num_classes:,} classes, {samples_per_page} on a page "
        f"({page_of[-1] + 1:,} pages), batches of {batch_size}\n\n{markdown(head, rows)}"
    )


def measure(
    order: NDArray[np.int64],
    page_of: NDArray[np.int64],
    class_of: NDArray[np.int64],
    batch_size: int,
    kept_for: int,
) -> ShuffleQuality:
    """`page_of`, `class_of`: [num_samples], by sample id."""
    pages = page_of[order]
    whole = len(order) // batch_size * batch_size
    in_batches = pages[:whole].reshape(-1, batch_size), class_of[order][:whole].reshape(-1, batch_size)
    (page_counts, _), (class_counts, most) = map(_distinct, in_batches)
    same = float((pages[1:] == pages[:-1]).mean())
    return ShuffleQuality(
        same, page_counts, class_counts, most, _most_distinct(pages, kept_for), _reads(pages, kept_for)
    )


def _distinct(batches: NDArray[np.int64]) -> tuple[float, int]:
    """(distinct values in a row of [batches, batch_size], on average; the most that a row has of one value)."""
    ordered = np.sort(batches, axis=1)
    starts = np.ones_like(ordered, np.bool_)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    lengths = np.diff(np.append(np.flatnonzero(starts), ordered.size))
    return float(starts.sum(axis=1).mean()), int(lengths.max())


def _most_distinct(pages: NDArray[np.int64], length: int) -> int:
    """In any stretch of `length` that begins at a multiple of a quarter of it."""
    starts = range(0, max(len(pages) - length, 0) + 1, max(length // 4, 1))
    return max(len(np.unique(pages[start : start + length])) for start in starts)


def _reads(pages: NDArray[np.int64], kept_for: int) -> float:
    """`pages`: in the order in which they are asked for."""
    by_page = np.argsort(pages, kind="stable")  # of each page, its positions in the order, ascending
    is_first = np.diff(pages[by_page], prepend=-1) != 0
    gaps = np.diff(by_page, prepend=0)
    return float((is_first | (gaps > kept_for)).sum() / is_first.sum())
