"""The views of a batch as tensors: pictures of one shape together, because a net takes no others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data_prep.beton.manifest import Manifest
from resnet_dist.data.pictures import PictureReader, Resized
from resnet_dist.evaluation.protocol import Group, View, ViewImages, window

Pixels = NDArray[np.uint8]


@dataclass
class ViewBatch:
    """As `data.batch.Batch`, but every image is there once for each view."""

    images: ViewImages
    labels: Tensor
    """int64 [N]."""


class ViewLoader:
    """Batches of all `views` of a beton's samples, on `device`. Every image is decoded once, resized once a scale.

    UserError if there is one that is too elongated to be shown whole.
    """

    def __init__(
        self,
        beton: Path,
        manifest: Manifest,
        views: Sequence[View],
        *,
        batch_size: int,
        num_threads: int,
        device: torch.device,
    ) -> None:
        self._reader = PictureReader(beton, manifest, num_threads)
        self._reader.require_small([view.shorter_side for view in views if view.place == "whole"])
        self._views = tuple(views)
        self._batch_size = batch_size
        self._device = device

    def batches(self, sample_ids: NDArray[np.int64]) -> Iterator[ViewBatch]:
        for ids, pictures in self._reader.batches(sample_ids, self._batch_size, self._shown):
            labels = torch.from_numpy(self._reader.labels[ids]).to(self._device)
            images = {
                view: _grouped([picture[k] for picture in pictures], self._device) for k, view in enumerate(self._views)
            }
            yield ViewBatch(images, labels)

    def close(self) -> None:
        self._reader.close()

    def _shown(self, picture: Image.Image) -> list[Pixels]:
        """One array [H, W, 3] for each view."""
        resized = Resized(picture)
        return [
            np.asarray(resized.part(view.shorter_side, window(view, *resized.size(view.shorter_side))))
            for view in self._views
        ]


def _grouped(pictures: Sequence[Pixels], device: torch.device) -> list[Group]:
    """In the order in which the shapes first appear, so the same batch makes the same groups everywhere."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, pixels in enumerate(pictures):
        places.setdefault(pixels.shape, []).append(place)
    return [
        Group(
            torch.tensor(members, device=device),
            torch.from_numpy(np.stack([pictures[place] for place in members])).to(device),
        )
        for members in places.values()
    ]
