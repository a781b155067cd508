"""scikit-learn's 1,797 real handwritten digits (UCI), 8x8 grey, as 32x32 RGB JPEGs: real images without a download.

Of each class every fifth sample is `val` (355 in all), the others are `train` (1,442); without a split, all.
"""

from __future__ import annotations

import io
from typing import Self

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.sources.base import Sample, SourceDescription, digest_of
from data_prep.sources.splits import SplitRequest, choose_split
from data_prep.sources.synthetic import JPEG_QUALITY

SIDE_PX = 32

VAL_EVERY = 5
RECIPE = f"bicubic to {SIDE_PX}, RGB, JPEG {JPEG_QUALITY} 4:4:4"


class Digits:
    def __init__(
        self, images: NDArray[np.uint8], labels: NDArray[np.int64], ids: NDArray[np.int64], split: str
    ) -> None:
        self._images = images
        self.labels = labels
        self._ids = ids
        self._split = split
        self.sizes: NDArray[np.int64] | None = None
        self.class_names = tuple(str(digit) for digit in range(10))

    @classmethod
    def open(cls, location: str | None, split: SplitRequest) -> Self:
        from sklearn.datasets import load_digits

        if location is not None:
            raise UserError(f"--input {location}: the source digits comes with scikit-learn and takes no --input")
        bunch = load_digits()
        images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
        labels = bunch.target.astype(np.int64)
        name = "all" if split.name is None or split.is_whole else choose_split(("train", "val"), split, "digits")
        ids = split_ids(labels, name)
        return cls(images[ids], labels[ids], ids, name)

    def describe(self) -> SourceDescription:
        identity = digest_of([RECIPE, self._split, self._images.tobytes(), self.labels.tobytes()])
        return SourceDescription("digits", "scikit-learn", self._split, identity, state=identity)

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, index: int) -> str:
        return f"digit-{self._ids[index]:04d}"

    def __getitem__(self, index: int) -> Sample:
        from PIL import Image

        small = Image.fromarray(self._images[index])
        large = small.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC).convert("RGB")
        file = io.BytesIO()
        large.save(file, "JPEG", quality=JPEG_QUALITY, subsampling="4:4:4")
        return Sample(file.getvalue(), int(self.labels[index]), self.key(index))


def split_ids(labels: NDArray[np.int64], split: str) -> NDArray[np.int64]:
    """Indices of a split, ascending: of each class, in order, every fifth sample is val."""
    rank_in_class = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        (members,) = np.nonzero(labels == label)
        rank_in_class[members] = np.arange(len(members))
    is_val = rank_in_class % VAL_EVERY == VAL_EVERY - 1
    chosen = {"all": np.ones_like(is_val), "val": is_val, "train": ~is_val}[split]
    return np.flatnonzero(chosen)
