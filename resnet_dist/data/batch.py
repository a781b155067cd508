"""What a loader hands to training. Apart from the loader, because ffcv and numba take seconds to import."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass
class Batch:
    images: torch.Tensor
    """uint8 [N, size, size, 3], RGB, on the loader's device."""
    labels: torch.Tensor
    """int64 [N], on the loader's device."""
    sample_ids: NDArray[np.int64]
    """[N]: indices in the beton, of the samples that are shown."""
    num_replaced: int = 0
    """How many of them stand for samples that cannot be decoded."""
