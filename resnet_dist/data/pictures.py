"""Whole images of a beton, by Pillow: for test protocols that show more of an image than one square crop.

The pixels are those of the native decoder, which are Pillow's.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from shlex import quote
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.beton.layout import MODE_JPEG
from data_prep.beton.manifest import Manifest
from resnet_dist.data.loader import open_reader
from resnet_dist.errors import Fault

T = TypeVar("T")
_BATCHES_AHEAD = 2


class PictureReader:
    """Reads samples on `num_threads` threads, which decode and whatever `prepare` does. Raises UserError as
    `BetonLoader` does for a beton that is not its manifest's.
    """

    def __init__(self, beton: Path, manifest: Manifest, num_threads: int) -> None:
        self._reader = open_reader(beton, manifest)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="pictures")
        self.labels = self._reader.labels

    def batches(
        self, sample_ids: NDArray[np.int64], batch_size: int, prepare: Callable[[Image.Image], T]
    ) -> Iterator[tuple[NDArray[np.int64], list[T]]]:
        """Ids and prepared pictures, `batch_size` at a time in the order of `sample_ids`; two batches are read ahead.

        Raises Fault, naming the sample, for one that does not decode.
        """
        parts = [sample_ids[start : start + batch_size] for start in range(0, len(sample_ids), batch_size)]
        ahead: deque[list[Future[T]]] = deque()
        for place, part in enumerate(parts):
            while len(ahead) < _BATCHES_AHEAD and place + len(ahead) < len(parts):
                ids = parts[place + len(ahead)].tolist()
                ahead.append([self._pool.submit(self._prepared, k, prepare) for k in ids])
            yield part, [done.result() for done in ahead.popleft()]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _prepared(self, sample_id: int, prepare: Callable[[Image.Image], T]) -> T:
        return prepare(self.picture(sample_id))

    def picture(self, sample_id: int) -> Image.Image:
        """RGB, as stored."""
        reader = self._reader
        stored = bytes(reader.image_bytes(sample_id))
        size = reader.width(sample_id), reader.height(sample_id)
        try:
            if reader.mode(sample_id) != MODE_JPEG:
                return Image.frombytes("RGB", size, stored)
            with Image.open(io.BytesIO(stored)) as image:
                if image.size != size:
                    raise ValueError(
                        f"it has {image.size[0]} x {image.size[1]} px, the beton says {size[0]} x {size[1]}"
                    )
                return image.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise Fault(
                f"sample {sample_id} of {reader.path} cannot be decoded: {error}; check with `data-prep verify "
                f"{quote(str(reader.path))} --decode all`"
            ) from None


def resized_sides(size: tuple[int, int], shorter_side: int) -> tuple[int, int]:
    """Width and height when the shorter side is `shorter_side`: torchvision's `Resize`."""
    shorter = min(size)
    return shorter_side * size[0] // shorter, shorter_side * size[1] // shorter


def resized(picture: Image.Image, shorter_sides: Sequence[int]) -> dict[int, Image.Image]:
    """The picture with each of the shorter sides: Pillow's bilinear filter with antialiasing, as in training."""
    return {
        side: picture.resize(resized_sides(picture.size, side), Image.Resampling.BILINEAR)
        for side in set(shorter_sides)
    }
