"""Which samples make up which step, and which worker runs them: pure functions of recipe, rank and the beton's pages.

A step's global batch is cut into micro-batches without regard to the number of workers, so every worker count trains on
the same micro-batches. Resuming is slicing: `start_step` cuts off what has been done.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from decimal import Decimal
from math import fsum

import numpy as np
from numpy.typing import NDArray

from data_prep.shown import few
from resnet_dist.config.recipe import BalancedSampling, Sampling, steps_per_epoch
from resnet_dist.data.keyed_random import Stream, sample_keys, uniform
from resnet_dist.errors import UserError


def micro_batch_share(num_micro_batches: int, rank: int, world_size: int) -> range:
    """The micro-batches of a step that `rank` runs: contiguous, sizes differ by at most one, rank 0 has number 0.

    Raises:
        ValueError: there are more workers than micro-batches: a worker without one would have no gradient.
    """
    if world_size > num_micro_batches:
        raise ValueError(f"{world_size} workers share {num_micro_batches} micro-batches: at most one worker each")
    return _share(num_micro_batches, rank, world_size)


def epoch_permutation(
    num_samples: int, seed: int, epoch: int, ids: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """All sample ids, or `ids`, in the order of the epoch: sorted by hash, ties as given. int64 [N]."""
    if ids is None:
        ids = np.arange(num_samples)
    return ids[np.argsort(sample_keys(Stream.ORDER, seed, epoch, ids), kind="stable")]


class PageShuffle:
    """A shuffle for betons that are larger than memory: at any time it needs only a few pages of the file.

    Args:
        page_of_sample: page of each sample, [num_samples].
        window_pages: pages whose samples are mixed at any time; a page is finished once this many others have been
            begun.
    """

    def __init__(self, page_of_sample: NDArray[np.int64], window_pages: int) -> None:
        # Here, as the same in every epoch: it sorts the pages of all samples.
        self.page_ids, self.index_of_page = np.unique(page_of_sample, return_inverse=True)
        """The pages that have samples, ascending; and for each sample the index of its page among them."""
        self.window_pages = min(window_pages, len(self.page_ids))


def page_permutation(
    shuffle: PageShuffle, seed: int, epoch: int, ids: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """All sample ids, or `ids`, in the order of the epoch, those of a page within `window_pages` pages. int64 [N].

    This is streaming's `py1e` shuffle on a circle: the pages are laid out in random order around it, each sample moves
    forward from its page's place by a random distance of up to the window's length, and the order is that of where the
    samples end up. A circle has no edges: every stretch of the order mixes `window_pages` pages evenly (those where it
    closes are read twice). Two neighbours come from one page once in `window_pages`; with a window of all pages, this
    is a full shuffle. Copies of a sample move by distances of their own.
    """
    num_pages, num_samples = len(shuffle.page_ids), len(shuffle.index_of_page)
    if ids is None:
        ids = np.arange(num_samples)
    place = np.empty(num_pages, np.uint64)
    place[np.argsort(sample_keys(Stream.PAGES, seed, epoch, shuffle.page_ids), kind="stable")] = np.arange(num_pages)
    # In units of 2**-32 pages: integers, equal on every machine.
    draws = sample_keys(Stream.ORDER, seed, epoch, ids) >> np.uint64(32)
    distances = draws * np.uint64(shuffle.window_pages)
    pages = shuffle.index_of_page[sample_of(ids, num_samples)] if num_samples else ids
    ends = ((place[pages] << np.uint64(32)) + distances) % np.uint64(max(num_pages, 1) << 32)
    return ids[np.argsort(ends, kind="stable")]


class ClassSampling:
    """Which samples an epoch shows if classes have shares of their own (`data.sampling`): quotas, without chance.

    A class gets floor or ceil of its share of the epoch; from epoch to epoch the rounding evens out. The samples of a
    class take turns in one fixed random order, which the next epoch continues. So within an epoch, and over any epochs
    in a row, two samples of a class are shown equally often or once more. Drawing with replacement, as torch's
    `WeightedRandomSampler` does, would show a third of the samples of a class not at all in an epoch's worth of draws.

    For ImageNet: 10 MB and 0.8 s to build, once per worker; then 0.03 to 0.2 s and 40 MB for a moment at the start of
    each epoch, besides the 0.35 s of the shuffle (one core of a busy machine).

    Args:
        labels: [num_samples].
        weights: of the classes, integers, [C]; shares of the epoch are in proportion to them (`sampling_weights`).
    """

    def __init__(self, labels: NDArray[np.int64], weights: NDArray[np.int64], seed: int) -> None:
        keys = sample_keys(Stream.TURNS, seed, 0, np.arange(len(labels)))
        self._turns = np.lexsort((keys, labels))
        """All samples, class after class; those of a class in the order of their turns."""
        counts = np.bincount(labels, minlength=len(weights))
        shown = weights > 0  # a class without samples has weight 0
        self._starts, self._counts = (np.cumsum(counts) - counts)[shown], counts[shown]
        self._weights = weights[shown]

    def ids(self, num_ids: int, epoch: int, repeats: int = 1) -> NDArray[np.int64]:
        """The `num_ids` ids of an epoch, class after class. int64 [num_ids].

        A sample's second turn in the epoch is its copy number `repeats`, and so on: see `train_order`.
        """
        before, quotas = self._quotas(num_ids, epoch)
        turn = np.arange(num_ids) - np.repeat(np.cumsum(quotas) - quotas, quotas)  # 0, 1, ... in each class
        counts = np.repeat(self._counts, quotas)
        place = np.repeat(self._starts, quotas) + (np.repeat(before % self._counts, quotas) + turn) % counts
        copies: NDArray[np.int64] = self._turns[place] + turn // counts * (repeats * len(self._turns))
        return copies

    def _quotas(self, num_ids: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """By class: the number of turns in all epochs before, and in this one. In integers, so without rounding."""
        total = self._weights.sum()
        each, rest = np.divmod(self._weights * num_ids, total)
        num_extra = num_ids - each.sum()
        owed, extras, before = np.zeros_like(rest), np.zeros_like(rest), np.zeros_like(rest)
        for _ in range(epoch + 1):
            before = extras.copy()
            owed += rest
            most_owed = np.argsort(-owed, kind="stable")[:num_extra]
            owed[most_owed] -= total
            extras[most_owed] += 1
        return each * epoch + before, each + extras - before


def sampling_weights(sampling: Sampling, class_names: Sequence[str], class_counts: Sequence[int]) -> NDArray[np.int64]:
    """The weight of each class among an epoch's images, in about 2**-31 of the sum. int64 [C].

    Raises UserError for a class name that the data do not have, and if no class with images has a weight above 0.
    """
    if isinstance(sampling, BalancedSampling):
        # Decimal's power is the same on every machine.
        weights = [float(Decimal(n) ** Decimal(sampling.power)) if n else 0.0 for n in class_counts]
    else:
        for name in sampling.weights:
            if name not in class_names:
                near = difflib.get_close_matches(name, class_names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {few(map(repr, class_names), most=5)}"
                raise UserError(f"data.sampling.weights: the training set has no class {name!r}; {hint}")
        weights = [sampling.weights.get(name, 1.0) * n for name, n in zip(class_names, class_counts, strict=True)]
    total = fsum(weights)
    if not total:
        raise UserError("data.sampling.weights: at least one class with images needs a weight above 0")
    return np.array([max(1, round(weight / total * 2**31)) if weight else 0 for weight in weights])


def replacement_ids(num_samples: int, seed: int, epoch: int, sample_id: int) -> NDArray[np.int64]:
    """Samples that may replace one that cannot be decoded: the first of them that can be takes its place. int64 [10].

    Args:
        num_samples: how many there are to choose from.
        sample_id: an id of `train_order`, so each copy of a sample has replacements of its own.
    """
    draws = uniform(sample_keys(Stream.REPLACEMENT, seed, epoch, [sample_id]), 10)[0]
    return (draws * num_samples).astype(np.int64)


def train_order(
    num_samples: int,
    *,
    seed: int,
    epoch: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    start_step: int = 0,
    page_shuffle: PageShuffle | None = None,
    repeats: int = 1,
    sampling: ClassSampling | None = None,
) -> NDArray[np.int64]:
    """Sample ids of this rank from `start_step` of the epoch on: int64 [steps left, local micro-batches, size].

    The epoch's incomplete last global batch is dropped.

    Args:
        num_samples: size of the data set.
        seed, epoch: they alone decide the order. `rank` and `world_size` only share it out.
        start_step: steps of the epoch that have been trained already.
        page_shuffle: shuffles within a window of pages. None: all samples.
        repeats: the first of the shuffled samples come that many times each, dealt to the micro-batches of their global
            batch in turn. Copy k of a sample has the id sample + k * num_samples (see `sample_of`).
        sampling: gives the samples of the epoch, and how often each. None: all, once.

    Raises:
        UserError: the data set does not fill one global batch.

    Eight samples make two steps of two micro-batches of two. Two workers run one micro-batch of each step, one worker
    runs both; the micro-batches are the same:

    >>> sizes = {"seed": 1, "epoch": 0, "global_batch_size": 4, "micro_batch_size": 2}
    >>> train_order(8, **sizes, rank=0, world_size=2).tolist()
    [[[2, 7]], [[1, 4]]]
    >>> train_order(8, **sizes, rank=1, world_size=2).tolist()
    [[[0, 5]], [[3, 6]]]
    >>> train_order(8, **sizes, rank=0, world_size=1).tolist()
    [[[2, 7], [0, 5]], [[1, 4], [3, 6]]]
    >>> train_order(8, **sizes, rank=0, world_size=1, start_step=1).tolist()
    [[[1, 4], [3, 6]]]
    """
    if global_batch_size % micro_batch_size:
        raise ValueError(f"global batch {global_batch_size} is not a multiple of micro-batch {micro_batch_size}")
    num_micro_batches = global_batch_size // micro_batch_size
    num_steps = steps_per_epoch(num_samples, global_batch_size)
    if not 0 <= start_step <= num_steps:
        raise ValueError(f"start_step {start_step} is outside the epoch's {num_steps} steps")
    share = micro_batch_share(num_micro_batches, rank, world_size)
    num_ids = num_steps * global_batch_size
    sampled = None if sampling is None else sampling.ids(-(-num_ids // repeats), epoch, repeats)
    if page_shuffle:
        permutation = page_permutation(page_shuffle, seed, epoch, sampled)
    else:
        permutation = epoch_permutation(num_samples, seed, epoch, sampled)
    if repeats > 1:
        copies = (permutation[:, None] + num_samples * np.arange(repeats)).reshape(-1)[:num_ids]
        steps = copies.reshape(num_steps, micro_batch_size, num_micro_batches).swapaxes(1, 2)
    else:
        steps = permutation[:num_ids].reshape(num_steps, num_micro_batches, micro_batch_size)
    return np.ascontiguousarray(steps[start_step:, share.start : share.stop])


def sample_of(ids: NDArray[np.int64], num_samples: int) -> NDArray[np.int64]:
    """The samples, as indices in the beton, of ids as `train_order` gives them: without the number of the copy."""
    return ids % num_samples


_GPU_EVAL_IMAGES = 256


def eval_batch_size(batch_size: int, device_type: str) -> int:
    """How many images are evaluated together: on a GPU, which small batches do not fill, a multiple of the recipe's
    `eval.batch_size`. Fixed by the recipe and the kind of device, so the bits do not depend on the number of workers.

    >>> eval_batch_size(100, "cuda")
    200
    """
    return batch_size if device_type == "cpu" else batch_size * max(1, _GPU_EVAL_IMAGES // batch_size)


def eval_batches(num_samples: int, batch_size: int, rank: int, world_size: int) -> range:
    """Numbers k of the fixed evaluation batches [k * size, min((k + 1) * size, num_samples)) that `rank` evaluates.

    Contiguous, shares differ by at most one batch; with fewer batches than workers some ranks get none.
    """
    return _share(-(-num_samples // batch_size), rank, world_size)


def _share(count: int, rank: int, world_size: int) -> range:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside a world of {world_size}")
    each, extra = divmod(count, world_size)
    start = rank * each + min(rank, extra)
    return range(start, start + each + (rank < extra))
