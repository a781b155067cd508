"""The views of a beton's samples, for test protocols that show more of an image than one central crop.

Pixels and resizing are the native decoder's, which equal Pillow's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data_prep.beton.manifest import load_manifest
from data_prep.beton.reader import BetonReader
from data_prep.beton.samples import pixels_of
from data_prep.pixels import LIMITS, resampling, resized_window
from resnet_dist.config.recipe import Interpolation
from resnet_dist.data.loader import open_reader
from resnet_dist.errors import UserError
from resnet_dist.evaluation.protocols import SameShape, View, ViewImages, window

Pixels = NDArray[np.uint8]
_BATCHES_AHEAD = 2
_MOST_PIXELS = 16_000_000
"""Largest resized picture that is computed in full; of a larger one only the part that is shown."""


@dataclass
class ViewBatch:
    """A batch with every image once for each view."""

    images: ViewImages
    labels: Tensor
    """int64 [N]."""


class ViewLoader:
    """Batches of all `views` of a beton's samples, on `device`. Every image is decoded once, and resized once a scale.

    UserError, as `BetonLoader` raises, for a beton that is not its manifest's; and if a picture is too elongated to be
    shown in full.
    """

    def __init__(
        self,
        beton: Path,
        views: Sequence[View],
        *,
        batch_size: int,
        num_threads: int,
        device: torch.device,
    ) -> None:
        self._reader = open_reader(beton, load_manifest(beton))
        _require_small(self._reader, [view.shorter_side for view in views if view.place == "whole"])
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="pictures")
        self._views = tuple(views)
        self._batch_size = batch_size
        self._device = device

    def batches(self, sample_ids: NDArray[np.int64]) -> Iterator[ViewBatch]:
        """`batch_size` samples at a time, in the order of `sample_ids`; two batches are decoded ahead.

        Raises Fault, naming the sample, for one that does not decode.
        """
        parts = [sample_ids[start : start + self._batch_size] for start in range(0, len(sample_ids), self._batch_size)]
        ahead: deque[list[Future[list[Pixels]]]] = deque()
        for place, ids in enumerate(parts):
            while len(ahead) < _BATCHES_AHEAD and place + len(ahead) < len(parts):
                ahead.append([self._pool.submit(self._shown, k) for k in parts[place + len(ahead)].tolist()])
            pictures = [done.result() for done in ahead.popleft()]
            images = {
                view: _grouped([picture[k] for picture in pictures], self._device) for k, view in enumerate(self._views)
            }
            yield ViewBatch(images, torch.from_numpy(self._reader.labels[ids]).to(self._device))

    def picture(self, sample_id: int) -> Image.Image:
        """RGB, as stored."""
        return Image.fromarray(pixels_of(self._reader, sample_id))

    def close(self) -> None:
        """Ends the decoding threads, without waiting."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _shown(self, sample_id: int) -> list[Pixels]:
        """One array [H, W, 3] for each view."""
        resized = Resized(self.picture(sample_id))
        return [
            np.asarray(
                resized.part(view.shorter_side, window(view, *resized.size(view.shorter_side)), view.interpolation)
            )
            for view in self._views
        ]


def _require_small(reader: BetonReader, shorter_sides: Sequence[int]) -> None:
    """UserError, naming the sample, if one is too elongated to be shown in full with such a shorter side."""
    widths, heights = reader.widths.astype(np.int64), reader.heights.astype(np.int64)
    for side in shorter_sides:
        longer = side * np.maximum(widths, heights) // np.maximum(np.minimum(widths, heights), 1)
        too_large = np.flatnonzero(side * longer > LIMITS.pixels)
        if len(too_large):
            first = int(too_large[0])
            raise UserError(
                f"sample {first} of {reader.path} is {widths[first]} x {heights[first]} px: with a shorter "
                f"side of {side} px it has more than {LIMITS.pixels:,} px; use smaller --scales or "
                "--protocol 10-crop"
            )


class Resized:
    """Parts of the picture with its shorter side resized by Pillow's antialiased filters, as in training.

    A picture is resized once for each length and filter. Of a very elongated one only the part is.
    """

    def __init__(self, picture: Image.Image) -> None:
        self._picture = picture
        self._wholes: dict[tuple[int, Interpolation], Image.Image] = {}

    def size(self, shorter_side: int) -> tuple[int, int]:
        """Width and height when the shorter side is `shorter_side`: torchvision's `Resize`."""
        shorter = min(self._picture.size)
        return shorter_side * self._picture.width // shorter, shorter_side * self._picture.height // shorter

    def part(
        self, shorter_side: int, box: tuple[int, int, int, int], interpolation: Interpolation = "bilinear"
    ) -> Image.Image:
        """`box`: left, top, right, bottom, px of the resized picture."""
        left, top, right, bottom = box
        size = self.size(shorter_side)
        if size[0] * size[1] > _MOST_PIXELS:
            return resized_window(self._picture, size, (left, top, right - left, bottom - top), interpolation)
        key = shorter_side, interpolation
        if key not in self._wholes:
            self._wholes[key] = self._picture.resize(size, resampling(interpolation))
        return self._wholes[key].crop(box)


def _grouped(pictures: Sequence[Pixels], device: torch.device) -> list[SameShape]:
    """In the order in which the shapes first appear, so the same batch makes the same groups everywhere."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, pixels in enumerate(pictures):
        places.setdefault(pixels.shape, []).append(place)
    return [
        SameShape(
            torch.tensor(members, device=device),
            torch.from_numpy(np.stack([pictures[place] for place in members])).to(device),
        )
        for members in places.values()
    ]
