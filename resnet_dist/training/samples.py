"""Where a worker's batches come from."""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from resnet_dist.data.batch import Batch
from resnet_dist.data.order import PageShuffle


class Loader(Protocol):
    """`data.BetonLoader`, as training sees it."""

    def epoch(self, epoch: int, sample_ids: NDArray[np.int64]) -> Generator[Batch, None, None]:
        """Batches of a fixed size, in the order of `sample_ids`; augmentation drawn for `epoch`."""


class Samples(NamedTuple):
    loader: Loader
    num_samples: int
    pages: PageShuffle | None = None
    """If samples are not shuffled through the whole of the data, how."""
