"""Made-up images for tests and benchmarks: any number, any size, the same for ever.

`--input "n=1000,size=64..128,classes=10,seed=0,format=jpeg"` (these are the defaults). `size` is one side in px or a
range from which height and width are drawn; sample i is of class i modulo `classes`; images of a class share a hue, so
that a net can learn them. `format=png` is lossless: its pixels depend on no encoder.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.sources.base import Sample, SourceDescription, digest_of
from data_prep.sources.splits import SplitRequest, choose_split

EXAMPLE = "n=1000,size=64..128,classes=10,seed=0,format=jpeg"
JPEG_QUALITY = 95
BLOCK_PX = 8
MAX_SIDE_PX = 16_384


@dataclass(frozen=True)
class Synthetic:
    num_samples: int = 1000
    min_side: int = 64
    max_side: int = 128
    num_classes: int = 10
    seed: int = 0
    file_format: str = "jpeg"
    split: str = "all"

    @classmethod
    def open(cls, location: str | None, split: SplitRequest) -> Self:
        values = dict(pair.partition("=")[::2] for pair in location.split(",")) if location else {}
        unknown = set(values) - {"n", "size", "classes", "seed", "format"}
        if unknown:
            raise UserError(f"--input {location}: unknown {', '.join(sorted(unknown))}; expected for example {EXAMPLE}")
        smallest, dots, largest = values.get("size", "64..128").partition("..")
        try:
            source = cls(
                num_samples=int(values.get("n", "1000")),
                min_side=int(smallest),
                max_side=int(largest if dots else smallest),
                num_classes=int(values.get("classes", "10")),
                seed=int(values.get("seed", "0")),
                file_format=values.get("format", "jpeg"),
                split=split.name or "all",
            )
        except ValueError:
            raise UserError(f"--input {location}: not understood; expected for example {EXAMPLE}") from None
        source._check(location)
        return source

    def _check(self, location: str | None) -> None:
        if self.num_samples < 1 or self.num_classes < 1 or self.seed < 0:
            raise UserError(f"--input {location}: n and classes start at 1, seed at 0")
        if not 1 <= self.min_side <= self.max_side <= MAX_SIDE_PX:
            raise UserError(f"--input {location}: size must be one side or a range within 1..{MAX_SIDE_PX} px")
        if self.file_format not in ("jpeg", "png"):
            raise UserError(f"--input {location}: format must be jpeg or png")

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(f"class-{label}" for label in range(self.num_classes))

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.arange(self.num_samples, dtype=np.int64) % self.num_classes

    @property
    def sizes(self) -> None:
        return None

    def describe(self) -> SourceDescription:
        location = (
            f"n={self.num_samples},size={self.min_side}..{self.max_side},classes={self.num_classes},"
            f"seed={self.seed},format={self.file_format}"
        )
        identity = digest_of(["synthetic 1", location, self.split])
        return SourceDescription("synthetic", location, self.split, identity, state=identity)

    def __len__(self) -> int:
        return self.num_samples

    def key(self, index: int) -> str:
        return f"synthetic-{index:07d}"

    def __getitem__(self, index: int) -> Sample:
        from PIL import Image

        label = index % self.num_classes
        file = io.BytesIO()
        image = Image.fromarray(self.pixels(index))
        if self.file_format == "png":
            image.save(file, "PNG", compress_level=1)
        else:
            image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling="4:4:4")
        return Sample(file.getvalue(), label, self.key(index))

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """[height, width, 3]: blocks of random shades around the class's hue, with a little noise.

        Only raw bits of Philox and integer arithmetic: numpy promises their stability, not that of its distributions.
        """
        split_key = int(digest_of([self.split])[-8:], 16)
        bits = np.random.Philox(key=[self.seed << 32 | split_key, index])
        height, width = (self.min_side + int(r) % (self.max_side - self.min_side + 1) for r in bits.random_raw(2))
        rows, columns = (-(-side // BLOCK_PX) for side in (height, width))
        blocks = _bytes(bits, rows * columns * 3).reshape(rows, columns, 3) // 3
        shades = blocks.repeat(BLOCK_PX, axis=0).repeat(BLOCK_PX, axis=1)[:height, :width]
        noise = _bytes(bits, height * width * 3).reshape(height, width, 3) // 16
        hue = np.array([(index % self.num_classes + 1) * step % 128 for step in (37, 59, 83)], dtype=np.uint8)
        return shades + noise + hue


def _bytes(bits: np.random.Philox, count: int) -> NDArray[np.uint8]:
    words = np.asarray(bits.random_raw(-(-count // 8)), dtype="<u8")
    return words.view(np.uint8)[:count]


# scikit-learn's 1,797 real handwritten digits (UCI), 8x8 grey, as 32x32 RGB JPEGs: real images without a download.


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
