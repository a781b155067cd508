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
from data_prep.sources.splits import SplitRequest

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
