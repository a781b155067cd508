"""Which samples make up which step, and which worker runs them: pure functions of recipe, rank and the beton's pages.

A step's global batch is cut into micro-batches without regard to the number of workers, so every worker count trains on
the same micro-batches. Resuming is slicing: `start_step` cuts off what has been done.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from resnet_dist.config.recipe import steps_per_epoch
from resnet_dist.data.keyed_random import Stream, sample_keys, uniform


def micro_batch_share(num_micro_batches: int, rank: int, world_size: int) -> range:
    """The micro-batches of a step that `rank` runs: contiguous, sizes differ by at most one, rank 0 has number 0.

    Raises:
        ValueError: there are more workers than micro-batches: a worker without one would have no gradient.
    """
    if world_size > num_micro_batches:
        raise ValueError(f"{world_size} workers share {num_micro_batches} micro-batches: at most one worker each")
    return _share(num_micro_batches, rank, world_size)


def epoch_permutation(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """All sample ids in the order of the epoch: sorted by hash, ties by id. int64 [num_samples]."""
    keys = sample_keys(Stream.ORDER, seed, epoch, np.arange(num_samples))
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


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


def page_permutation(shuffle: PageShuffle, seed: int, epoch: int) -> NDArray[np.int64]:
    """All sample ids in the order of the epoch, those of a page within `window_pages` pages. int64 [num_samples].

    This is streaming's `py1e` shuffle on a circle: the pages are laid out in random order around it, each sample moves
    forward from its page's place by a random distance of up to the window's length, and the order is that of where the
    samples end up. A circle has no edges: every stretch of the order mixes `window_pages` pages evenly (those where it
    closes are read twice). Two neighbours come from one page once in `window_pages`; with a window of all pages, this
    is a full shuffle.
    """
    num_pages, num_samples = len(shuffle.page_ids), len(shuffle.index_of_page)
    place = np.empty(num_pages, np.uint64)
    place[np.argsort(sample_keys(Stream.PAGES, seed, epoch, shuffle.page_ids), kind="stable")] = np.arange(num_pages)
    # In units of 2**-32 pages: integers, equal on every machine.
    draws = sample_keys(Stream.ORDER, seed, epoch, np.arange(num_samples)) >> np.uint64(32)
    distances = draws * np.uint64(shuffle.window_pages)
    ends = ((place[shuffle.index_of_page] << np.uint64(32)) + distances) % np.uint64(max(num_pages, 1) << 32)
    return np.argsort(ends, kind="stable").astype(np.int64, copy=False)


def replacement_ids(num_samples: int, seed: int, epoch: int, sample_id: int) -> NDArray[np.int64]:
    """Samples that may replace one that cannot be decoded: the first of them that can be takes its place. int64 [10].

    Args:
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
    permutation = (
        page_permutation(page_shuffle, seed, epoch) if page_shuffle else epoch_permutation(num_samples, seed, epoch)
    )
    if repeats > 1:
        copies = (permutation[:, None] + num_samples * np.arange(repeats)).reshape(-1)[: num_steps * global_batch_size]
        steps = copies.reshape(num_steps, micro_batch_size, num_micro_batches).swapaxes(1, 2)
    else:
        steps = permutation[: num_steps * global_batch_size].reshape(num_steps, num_micro_batches, micro_batch_size)
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
