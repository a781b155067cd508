"""Which part of a stored image is shown, and whether it is mirrored: a pure function of keyed draws.

Whole batches in numpy: with the draws 1 to 3 µs an image, where decoding takes 1.5 to 2 ms.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.beton.manifest import Manifest
from resnet_dist.config.recipe import CenterCrop, PadCrop, RandomResizedCrop, ScaleCrop
from resnet_dist.data.keyed_random import below, between, log_uniform
from resnet_dist.errors import UserError

Transform = RandomResizedCrop | ScaleCrop | PadCrop | CenterCrop
Sides = NDArray[np.int64]
Draws = NDArray[np.float64]
Side = Sides | np.int64 | int
"""One for each image, or one for all."""
Boxes = NDArray[np.int64]
"""[N, 4]: top, left, height, width in px of the stored image."""
_BOX, _RESIZED = ("box_top", "box_left", "box_height", "box_width"), ("resized_height", "resized_width")
VIEW = np.dtype([(name, "<i8") for name in (*_BOX, *_RESIZED, "window_top", "window_left", "mirrored")])
"""What is shown of an image, in px (`View` in native/kernel.h): its box is cut out and resized, and of that the window
of the net's size is shown, mirrored or not. All are whole px, so resizing and then cropping gives what it gives in
torchvision. Where nothing is resized the window may stick out, and shows zeros there."""
Views = NDArray[np.void]
"""`VIEW` [N]."""

_TRIES = 10
# The numbers of a sample's draws. They are part of the meaning of a recipe: never renumber, only append.
_FLIP, _TOP, _LEFT = 0, 1, 2
_SHORTER_SIDE = 3
_AREA = slice(3, 3 + _TRIES)
_ASPECT = slice(_AREA.stop, _AREA.stop + _TRIES)


def num_draws(transform: Transform) -> int:
    """Number of uniform draws that a sample needs."""
    match transform:
        case RandomResizedCrop():
            return _ASPECT.stop
        case ScaleCrop():
            return _SHORTER_SIDE + 1
        case PadCrop():
            return _LEFT + 1
        case CenterCrop():
            return 0


def crop(transform: Transform, heights: Sides, widths: Sides, draws: Draws) -> Views:
    """Views [N] from image sides in px [N] and draws [N, num_draws(transform)]."""
    size = transform.size
    match transform:
        case RandomResizedCrop():
            views = random_resized_crop(heights, widths, size, transform.scale, transform.ratio, draws)
        case ScaleCrop():
            views = scale_crop(heights, widths, size, transform.shorter_side, draws)
        case PadCrop():
            views = pad_crop(size, transform.pad, draws)
        case CenterCrop():
            views = center_crop(heights, widths, size, transform.resize)
    if not isinstance(transform, CenterCrop):
        views["mirrored"] = draws[:, _FLIP] < (0.5 if transform.flip else 0.0)
    return views


def make_views(box: Iterable[Side], resized: Iterable[Side], window: Iterable[Side]) -> Views:
    """Not mirrored. Box: top, left, height, width; size to which it is resized: height, width; window: top, left. At
    least one of them is an array [N]."""
    columns = np.broadcast_arrays(*box, *resized, *window, 0)
    views = np.empty(len(columns[0]), VIEW)
    for name, column in zip(VIEW.fields or (), columns, strict=True):
        views[name] = column
    return views


def random_resized_crop(
    heights: Sides, widths: Sides, size: int, scale: tuple[float, float], ratio: tuple[float, float], draws: Draws
) -> Views:
    """torchvision's `RandomResizedCrop.get_params` on our draws: ten tries, then the largest allowed central crop."""
    height, width = heights[:, None], widths[:, None]
    area = (height * width) * between(*scale, draws[:, _AREA])
    aspect = log_uniform(*ratio, draws[:, _ASPECT])
    crop_widths = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    crop_heights = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (crop_widths > 0) & (crop_widths <= width) & (crop_heights > 0) & (crop_heights <= height)
    sample, first = np.arange(len(heights)), np.argmax(fits, axis=1)
    h, w = crop_heights[sample, first], crop_widths[sample, first]
    drawn = np.stack([below(heights - h + 1, draws[:, _TOP]), below(widths - w + 1, draws[:, _LEFT]), h, w], axis=1)
    box = np.where(fits.any(axis=1, keepdims=True), drawn, _largest_central_crop(heights, widths, ratio))
    return make_views(box.T, resized=(size, size), window=(0, 0))


def scale_crop(heights: Sides, widths: Sides, size: int, shorter_side: tuple[int, int], draws: Draws) -> Views:
    """Shorter side to a length drawn from `shorter_side`, both ends included; then a random `size` x `size` of that."""
    low, high = shorter_side
    resized = _resized_sides(heights, widths, low + below(np.int64(high - low + 1), draws[:, _SHORTER_SIDE]))
    window = [below(side - size + 1, draws[:, column]) for side, column in zip(resized, (_TOP, _LEFT), strict=True)]
    return make_views((0, 0, heights, widths), resized, window)


def pad_crop(size: int, pad: int, draws: Draws) -> Views:
    """A random `size` x `size` of an image of that size, with `pad` px of black around it."""
    window = [below(np.int64(2 * pad + 1), draws[:, side]) - pad for side in (_TOP, _LEFT)]
    return make_views((0, 0, size, size), resized=(size, size), window=window)


def center_crop(heights: Sides, widths: Sides, size: int, resize: int) -> Views:
    """Shorter side to `resize`, then the central `size` x `size`: torchvision's `Resize` and `CenterCrop`.

    The longer side's new length is truncated to whole px; a window half a px off the middle is rounded to the even
    position.
    """
    resized = _resized_sides(heights, widths, np.int64(resize))
    window = [np.rint((side - size) / 2).astype(np.int64) for side in resized]
    return make_views((0, 0, heights, widths), resized, window)


def _resized_sides(heights: Sides, widths: Sides, shorter_side: Sides | np.int64) -> tuple[Sides, Sides]:
    """Heights and widths [N] when the shorter side is `shorter_side`; torchvision's `Resize`."""
    shorter = np.minimum(heights, widths)
    return shorter_side * heights // shorter, shorter_side * widths // shorter


def _largest_central_crop(heights: Sides, widths: Sides, ratio: tuple[float, float]) -> Boxes:
    image_ratio = widths / heights
    h = np.where(image_ratio < ratio[0], np.rint(widths / ratio[0]).astype(np.int64), heights)
    w = np.where(image_ratio > ratio[1], np.rint(heights * ratio[1]).astype(np.int64), widths)
    h, w = np.maximum(h, 1), np.maximum(w, 1)  # torchvision would give 0 px on a 1 px image and fail
    return np.stack([(heights - h) // 2, (widths - w) // 2, h, w], axis=1)


def require_sides(beton: Path | str, manifest: Manifest, transform: Transform) -> None:
    """UserError if the images of `beton` do not have the sides that `transform` needs."""
    sides = {manifest.min_height, manifest.max_height, manifest.min_width, manifest.max_width}
    if isinstance(transform, PadCrop) and sides != {transform.size}:
        raise UserError(
            f"{beton}: pad_crop needs images of {transform.size} x {transform.size} px, these images have sides of "
            f"{min(sides)} to {max(sides)} px; set data.train.size, or use random_resized_crop"
        )
