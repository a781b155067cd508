"""Sources that need no files: synthetic images, and scikit-learn's handwritten digits."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.sources.base import NO_OPTIONS, Source, SourceDescription, SourceOptions, digest_of
from data_prep.sources.splits import WHOLE, SplitRequest, choose_split

if TYPE_CHECKING:
    from PIL import Image

EXAMPLE = "n=1000,size=64..128,classes=10,seed=0,format=jpeg"
JPEG_QUALITY = 95
BLOCK_PX = 8
MAX_SIDE_PX = 16_384

DIGIT_SIDE_PX = 32
VAL_EVERY = 5
DIGIT_RECIPE = f"bicubic to {DIGIT_SIDE_PX}, RGB, JPEG {JPEG_QUALITY} 4:4:4"


class Synthetic(Source):
    """Synthetic images for tests and benchmarks: any number, any size, always the same.

    `--input "n=1000,size=64..128,classes=10,seed=0,format=jpeg"` (these are the defaults). `size` is one side in px or
    a range from which height and width are drawn; sample i is of class i modulo `classes`; images of a class share a
    hue, so a model can learn them. `format=png` is lossless: its pixels depend on no encoder.
    """

    def __init__(
        self,
        num_samples: int = 1000,
        min_side: int = 64,
        max_side: int = 128,
        num_classes: int = 10,
        seed: int = 0,
        file_format: str = "jpeg",
        split: str = WHOLE,
    ) -> None:
        self.class_names = tuple(f"class-{label}" for label in range(num_classes))
        self.labels = np.arange(num_samples, dtype=np.int64) % num_classes
        self._num_hues = num_classes
        self._sides = min_side, max_side
        self._seed = seed
        self._format = file_format
        location = f"n={num_samples},size={min_side}..{max_side},classes={num_classes},seed={seed},format={file_format}"
        identity = digest_of(["synthetic 1", location, split])
        self.description = SourceDescription("synthetic", location, split, identity, state=identity)

    @classmethod
    def open(cls, location: str, split: SplitRequest, options: SourceOptions = NO_OPTIONS) -> Self:
        values = dict(pair.partition("=")[::2] for pair in location.split(",")) if location else {}
        unknown = set(values) - {"n", "size", "classes", "seed", "format"}
        if unknown:
            raise UserError(f"--input {location}: unknown {', '.join(sorted(unknown))}; expected for example {EXAMPLE}")
        smallest, dots, largest = values.get("size", "64..128").partition("..")
        file_format = values.get("format", "jpeg")
        try:
            sides = int(smallest), int(largest if dots else smallest)
            count, num_classes = int(values.get("n", 1000)), int(values.get("classes", 10))
            seed = int(values.get("seed", 0))
        except ValueError:
            raise UserError(f"--input {location}: cannot be parsed; expected for example {EXAMPLE}") from None
        if count < 1 or num_classes < 1 or seed < 0:
            raise UserError(f"--input {location}: n and classes start at 1, seed at 0")
        if not 1 <= sides[0] <= sides[1] <= MAX_SIDE_PX:
            raise UserError(f"--input {location}: size must be one side or a range within 1..{MAX_SIDE_PX} px")
        if file_format not in ("jpeg", "png"):
            raise UserError(f"--input {location}: format must be jpeg or png")
        return cls(count, *sides, num_classes, seed, file_format, split.name or WHOLE)

    def key(self, index: int) -> str:
        return f"synthetic-{index:07d}"

    def read(self, index: int) -> bytes:
        from PIL import Image

        image = Image.fromarray(self.pixels(index))
        return _png(image) if self._format == "png" else _jpeg(image)

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """[height, width, 3]: blocks of random shades around the class's hue, with a little noise.

        Uses only raw bits of Philox and integer arithmetic: numpy keeps those stable, but not its distributions.
        """
        split_key = int(digest_of([self.description.split])[-8:], 16)
        bits = np.random.Philox(key=[self._seed << 32 | split_key, index])
        smallest, largest = self._sides
        height, width = (smallest + int(r) % (largest - smallest + 1) for r in bits.random_raw(2))
        rows, columns = (-(-side // BLOCK_PX) for side in (height, width))
        blocks = _bytes(bits, rows * columns * 3).reshape(rows, columns, 3) // 3
        shades = blocks.repeat(BLOCK_PX, axis=0).repeat(BLOCK_PX, axis=1)[:height, :width]
        noise = _bytes(bits, height * width * 3).reshape(height, width, 3) // 16
        hue_number = index % self._num_hues + 1  # whatever labels `--classes` gave since
        hue = np.array([hue_number * step % 128 for step in (37, 59, 83)], dtype=np.uint8)
        return shades + noise + hue


class Digits(Source):
    """scikit-learn's 1,797 handwritten digits (UCI), 8x8 grey, as 32x32 RGB JPEGs: real images without a download.

    Every fifth sample of each class is `val` (355 in all), the rest are `train` (1,442); without a split, all.
    """

    class_names = tuple(str(digit) for digit in range(10))

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        labels = bunch.target.astype(np.int64)
        self._ids = split_ids(labels, split)
        self._images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[self._ids]
        self.labels = labels[self._ids]
        identity = digest_of([DIGIT_RECIPE, split, self._images.tobytes(), self.labels.tobytes()])
        self.description = SourceDescription("digits", "scikit-learn", split, identity, state=identity)

    @classmethod
    def open(cls, location: str, split: SplitRequest, options: SourceOptions = NO_OPTIONS) -> Self:
        if location:
            raise UserError(f"--input {location}: the source digits comes with scikit-learn and takes no --input")
        is_all = split.name is None or split.is_whole
        return cls(WHOLE if is_all else choose_split(("train", "val"), split, "digits"))

    def key(self, index: int) -> str:
        return f"digit-{self._ids[index]:04d}"

    def read(self, index: int) -> bytes:
        from PIL import Image

        small = Image.fromarray(self._images[index])
        return _jpeg(small.resize((DIGIT_SIDE_PX, DIGIT_SIDE_PX), Image.Resampling.BICUBIC).convert("RGB"))


def split_ids(labels: NDArray[np.int64], split: str) -> NDArray[np.int64]:
    """Indices of a split, ascending: every fifth sample of each class, in order, is val."""
    rank_in_class = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        (members,) = np.nonzero(labels == label)
        rank_in_class[members] = np.arange(len(members))
    is_val = rank_in_class % VAL_EVERY == VAL_EVERY - 1
    return np.flatnonzero({WHOLE: np.ones_like(is_val), "val": is_val, "train": ~is_val}[split])


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling="4:4:4")
    return file.getvalue()


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _bytes(bits: np.random.Philox, count: int) -> NDArray[np.uint8]:
    words = np.asarray(bits.random_raw(-(-count // 8)), dtype="<u8")
    return words.view(np.uint8)[:count]
