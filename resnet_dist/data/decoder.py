"""From sample ids to pixels: keyed draws, crop, decode, augment. Two kernels do the work, and one function chooses."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from shlex import quote
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.beton.reader import BetonReader
from data_prep.native import open_decode_library
from resnet_dist.config.recipe import CenterCrop, Interpolation, OnBadSample, PadCrop, Recipe, train_size
from resnet_dist.data.augment import draw_operations
from resnet_dist.data.crops import Transform, Views, crop, num_draws
from resnet_dist.data.kernel import OK, STORED_IMAGE, Kernel, StoredImages
from resnet_dist.data.keyed_random import Stream, sample_keys, uniform
from resnet_dist.data.order import replacement_ids
from resnet_dist.errors import Fault

_log = logging.getLogger(__name__)

Decoder = Literal["native", "ffcv"]


@dataclass(frozen=True)
class ImageSettings:
    """How the samples of a beton become images. With an epoch and the sample ids, this decides every pixel."""

    transform: Transform
    """Crop, flip and augmentations."""
    decoder: Decoder = "native"
    seed: int = 0
    """Seed of the keyed draws."""
    on_bad_sample: OnBadSample = "error"
    """error: a sample that cannot be decoded is a Fault that names it. skip: another sample takes its place."""
    size_at: Callable[[int], int] | None = None
    """Epoch -> side of the images, px; None: the transform's."""
    num_copies: int | None = 1
    """There are this many times as many sample ids as samples (see `order.train_order`). None: not known."""
    replaces_within_class: bool = False
    """Whether a sample that replaces another has its label."""


def train_images(recipe: Recipe) -> ImageSettings:
    """The images that the recipe trains on."""
    data = recipe.data
    size_at = partial(train_size, data, total_epochs=recipe.train.total_epochs)
    return ImageSettings(
        data.train,
        data.decoder,
        recipe.seed,
        data.on_bad_sample,
        size_at,
        num_copies=data.augmentation_repeats if data.sampling is None else None,
        replaces_within_class=data.sampling is not None,
    )


def eval_images(recipe: Recipe, crop: CenterCrop | None = None) -> ImageSettings:
    """The images that the recipe evaluates on: every sample counts, and none is augmented. `crop` replaces its own."""
    return ImageSettings(crop or recipe.data.eval, recipe.data.decoder)


def open_kernel(
    decoder: Decoder, num_threads: int, max_image_bytes: int, interpolation: Interpolation = "bilinear"
) -> Kernel:
    """`max_image_bytes`: of the largest image, decoded. `interpolation`: the native kernel's; ffcv's averages areas.
    UserError if the native kernel was not built."""
    kernel: Any  # imported here: numba and ffcv take seconds, and the native kernel may be missing
    if decoder == "native":
        from resnet_dist.data.native_kernel import NativeKernel

        kernel = NativeKernel(num_threads, interpolation)
    else:
        from resnet_dist.data.ffcv_kernel import FfcvKernel

        kernel = FfcvKernel(num_threads, max_image_bytes)
    return kernel


class KeyedDecoder:
    """Samples of a beton to uint8 [N, size, size, 3], RGB, under draws that are keyed by seed, epoch and id.

    So neither threads nor batches change a pixel.

    Args:
        reader, file: the beton, and its bytes mapped into memory: uint8 [bytes].
        size: side of the images, px, in place of the transform's.

    Raises:
        UserError: the settings' decoder, or what the transform needs besides, was not built.
    """

    def __init__(
        self,
        reader: BetonReader,
        file: NDArray[np.uint8],
        settings: ImageSettings,
        num_threads: int,
        size: int,
    ) -> None:
        self.size = size
        self._reader = reader
        self._file = file
        self._transform = settings.transform.model_copy(update={"size": size})
        self._seed = settings.seed
        self._on_bad_sample = settings.on_bad_sample
        self._replaces_within_class = settings.replaces_within_class
        self._augment = () if isinstance(settings.transform, CenterCrop) else settings.transform.augment
        if self._augment:
            open_decode_library("data.train.augment needs it")  # also with libffcv's kernel
        pixels = reader.heights.astype(np.int64) * reader.widths
        # A pad-crop is not resized.
        how = "bilinear" if isinstance(settings.transform, PadCrop) else settings.transform.interpolation
        self._kernel = open_kernel(settings.decoder, num_threads, 3 * int(pixels.max(initial=1)), how)

    def decode(
        self,
        epoch: int,
        samples: NDArray[np.int64],
        draw_ids: NDArray[np.int64],
        images: NDArray[np.uint8],
    ) -> NDArray[np.int64]:
        """Fills `images` and returns the samples that they show [N]: `samples`, or what replaces one of them.

        Args:
            samples: [N], indices in the beton.
            draw_ids: [N], the key of each image's random draws: `samples`, or for a copy its own id
                (`order.train_order`).
            images: uint8 [N, size, size, 3], written.

        Raises:
            Fault: a sample cannot be decoded, and is not to be replaced or has no replacement that can.
        """
        shown = samples.copy()
        statuses = self._show(epoch, samples, draw_ids, images)
        for i in np.flatnonzero(statuses != OK).tolist():
            one = slice(i, i + 1)
            shown[i] = self._replace(epoch, samples[one], draw_ids[one], images[one], int(statuses[i]))
        return shown

    def close(self) -> None:
        """Ends the kernel's threads, without waiting."""
        self._kernel.close()

    def _show(
        self,
        epoch: int,
        samples: NDArray[np.int64],
        draw_ids: NDArray[np.int64],
        images: NDArray[np.uint8],
    ) -> NDArray[np.int64]:
        """Decodes `samples` under the draws of `draw_ids`; returns the statuses [N]."""
        stored = self._stored(samples)
        views = self._crop(epoch, stored, draw_ids)
        keys = sample_keys(Stream.PIXELS, self._seed, epoch, draw_ids)
        operations = draw_operations(self._augment, self.size, keys)
        return self._kernel.decode(self._file, stored, views, operations, images)

    def _crop(self, epoch: int, stored: StoredImages, draw_ids: NDArray[np.int64]) -> Views:
        keys = sample_keys(Stream.AUGMENTATION, self._seed, epoch, draw_ids)
        draws = uniform(keys, num_draws(self._transform))
        return crop(self._transform, stored["height"], stored["width"], draws)

    def _replace(
        self,
        epoch: int,
        bad: NDArray[np.int64],
        draw_id: NDArray[np.int64],
        image: NDArray[np.uint8],
        status: int,
    ) -> int:
        """Fills `image` [1, size, size, 3] with another sample than `bad` [1], and returns which."""
        path, stored = self._reader.path, self._stored(bad)
        views = self._crop(epoch, stored, draw_id)
        reason = self._kernel.explain(self._file, stored, views, self.size, status)
        what = f"sample {bad[0]} of {path} cannot be decoded: {reason}"
        lists_all = f"`data-prep verify {quote(str(path))} --decode all` lists all such samples"
        leaves_out = "converting again with --on-error quarantine leaves them out and records that"
        if self._on_bad_sample == "error" and isinstance(self._transform, CenterCrop):
            raise Fault(f"{what}. An evaluation counts every sample, so none is skipped: {lists_all}, {leaves_out}")
        if self._on_bad_sample == "error":
            raise Fault(f"{what}; {lists_all}, {leaves_out}; or set data.on_bad_sample: skip")
        labels = self._reader.labels
        choices = np.flatnonzero(labels == labels[bad]) if self._replaces_within_class else np.arange(len(labels))
        others = choices[replacement_ids(len(choices), self._seed, epoch, int(draw_id[0]))]
        for i, other in enumerate(others.tolist()):
            # Under the draws of the bad sample: which sample fills its place depends on nothing but its id.
            if self._show(epoch, others[i : i + 1], draw_id, image)[0] == OK:
                _log.warning("%s; sample %d takes its place in epoch %d", what, other, epoch)
                return int(other)
        raise Fault(f"{what}, and neither can the {len(others)} samples drawn to replace it; {lists_all}")

    def _stored(self, samples: NDArray[np.int64]) -> StoredImages:
        reader, stored = self._reader, np.empty(len(samples), STORED_IMAGE)
        stored["offset"], stored["bytes"] = reader.pointers[samples], reader.sizes[samples]
        stored["height"], stored["width"] = reader.heights[samples], reader.widths[samples]
        stored["mode"] = reader.modes[samples]
        return stored
