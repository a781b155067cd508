"""The augmentations of a training image after its crop: operations as data, drawn with keyed random numbers.

The definitions are torchvision 0.29's; the tests replay its transforms on our draws. `native/augment.c` applies them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.native import open_decode_library, pointer
from resnet_dist.config.recipe import (
    Augmentation,
    ColorJitter,
    Lighting,
    RandAugment,
    RandomErasing,
    TrivialAugmentWide,
)
from resnet_dist.data.keyed_random import Reals, below, between, log_uniform, normal, sin_cos, splitmix64, uniform

OPERATION = np.dtype([("kind", "<i8"), ("values", "<f8", (8,))])
"""As `Operation` in native/augment.h, which says what the values mean."""
Operations = NDArray[np.void]
"""`OPERATION` [N, K]: the K operations of each of N images, applied one after another."""


class OperationKind(IntEnum):
    IDENTITY = 0
    BRIGHTNESS = 1
    CONTRAST = 2
    SATURATION = 3
    SHARPNESS = 4
    HUE = 5
    POSTERIZE = 6
    SOLARIZE = 7
    AUTOCONTRAST = 8
    EQUALIZE = 9
    AFFINE = 10
    ADD = 11
    ERASE = 12
    INVERT = 13


def operation(kind: OperationKind, *values: float) -> Operations:
    """One operation, a 0-d array."""
    result = np.zeros((), OPERATION)
    result["kind"] = kind
    result["values"][: len(values)] = values
    return result


def apply_operations(operations: Operations, images: NDArray[np.uint8]) -> None:
    """Applies `operations` [N, K] to `images`, uint8 [N, size, size, 3], in place and without the GIL.

    UserError when the native kernel was not built; MemoryError. The native kernel does not need this: it applies them
    itself.
    """
    num, num_operations = operations.shape
    size = images.shape[1]
    failed = open_decode_library("data.train.augment needs it").resnet_dist_augment(
        ctypes.c_int64(num),
        ctypes.c_int64(num_operations),
        pointer(operations, OPERATION, (num, num_operations)),
        ctypes.c_int64(size),
        pointer(images, np.uint8, (num, size, size, 3)),
    )
    if failed:
        raise MemoryError(f"no memory for an image of {size} x {size} px")


def draw_operations(augmentations: Sequence[Augmentation], size: int, keys: NDArray[np.uint64]) -> Operations:
    """The operations [N, K] of N images of `size` x `size` px with the given keys [N]; K follows from the recipe.

    Every entry of `data.train.augment` draws from its own key, so adding one at the end changes no other.
    """
    drawn = [_draw(a, size, splitmix64(keys, position)) for position, a in enumerate(augmentations)]
    return np.concatenate([np.zeros((len(keys), 0), OPERATION), *drawn], axis=1)


def _draw(augmentation: Augmentation, size: int, keys: NDArray[np.uint64]) -> Operations:
    match augmentation:
        case ColorJitter():
            return color_jitter(augmentation, uniform(keys, 8))
        case Lighting():
            return lighting(augmentation.std, uniform(keys, 3))
        case RandAugment():
            return rand_augment(augmentation, size, uniform(keys, 3 * augmentation.ops))
        case TrivialAugmentWide():
            table, draws = trivial_augment_wide_table(augmentation.bins, size), uniform(keys, 3)
            limits = (NUM_OPERATIONS, augmentation.bins, 2)
            chosen = tuple(below(np.int64(limit), draws[:, [k]]) for k, limit in enumerate(limits))
            return table[chosen]
        case RandomErasing():
            return random_erasing(augmentation, size, uniform(keys, 3 + 2 * _TRIES))


def rand_augment(policy: RandAugment, size: int, draws: Reals) -> Operations:
    """[N, ops] from draws [N, 3 * ops]: pairs of operation and sign, then whether each is applied."""
    table = rand_augment_table(policy.magnitude, policy.bins, size)
    chosen = draws[:, : 2 * policy.ops].reshape(len(draws), policy.ops, 2)
    operations = table[below(np.int64(NUM_OPERATIONS), chosen[..., 0]), below(np.int64(2), chosen[..., 1])]
    operations[draws[:, 2 * policy.ops :] >= policy.probability] = np.zeros((), OPERATION)
    return operations


def color_jitter(jitter: ColorJitter, draws: Reals) -> Operations:
    """[N, 4] from draws [N, 8]: four factors, and four numbers whose order is the operations'."""
    operations = np.zeros((len(draws), 4), OPERATION)
    strengths = {
        OperationKind.BRIGHTNESS: jitter.brightness,
        OperationKind.CONTRAST: jitter.contrast,
        OperationKind.SATURATION: jitter.saturation,
    }
    for k, (kind, strength) in enumerate(strengths.items()):
        operations["kind"][:, k] = kind
        operations["values"][:, k, 0] = between(max(0.0, 1.0 - strength), 1.0 + strength, draws[:, k])
    if jitter.hue > 0:  # else left out: to 8-bit HSV and back changes pixels even without a turn
        operations["kind"][:, 3] = OperationKind.HUE
        turns = np.trunc(255.0 * between(-jitter.hue, jitter.hue, draws[:, 3]))
        operations["values"][:, 3, 0] = np.mod(turns, 256.0)
    order = np.argsort(draws[:, 4:8], axis=1, kind="stable")
    return np.take_along_axis(operations, order, axis=1)


_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
"""Principal components of ImageNet's colours in 0..1, a row for R, G, B.

Krizhevsky et al. 2012; the numbers of fb.resnet.torch."""


def lighting(std: float, draws: Reals) -> Operations:
    """[N, 1] from draws [N, 3]: one number is added to each channel's grey levels."""
    amounts = normal(draws) * std
    operations = np.zeros((len(draws), 1), OPERATION)
    operations["kind"] = OperationKind.ADD
    for channel, row in enumerate(_EIGENVECTORS):
        weights = [255.0 * vector * value for vector, value in zip(row, _EIGENVALUES, strict=True)]
        # Written out: a matrix product may sum in another order on another CPU.
        share = amounts[:, 0] * weights[0] + amounts[:, 1] * weights[1] + amounts[:, 2] * weights[2]
        operations["values"][:, 0, channel] = share
    return operations


_TRIES = 10


def random_erasing(erasing: RandomErasing, size: int, draws: Reals) -> Operations:
    """[N, 1] from draws [N, 23]: whether, top, left, ten areas, ten aspect ratios. No operation where no try fits."""
    areas = size * size * between(*erasing.scale, draws[:, 3 : 3 + _TRIES])
    aspects = log_uniform(*erasing.ratio, draws[:, 3 + _TRIES :])
    heights = np.rint(np.sqrt(areas * aspects)).astype(np.int64)
    widths = np.rint(np.sqrt(areas / aspects)).astype(np.int64)
    fits = (heights < size) & (widths < size)
    sample, first = np.arange(len(draws)), np.argmax(fits, axis=1)
    height, width = heights[sample, first], widths[sample, first]
    operations = np.zeros((len(draws), 1), OPERATION)
    applies = fits.any(axis=1) & (draws[:, 0] < erasing.probability)
    operations["kind"][:, 0] = np.where(applies, OperationKind.ERASE, OperationKind.IDENTITY)
    corners = [below(size - side + 1, draws[:, k]) for k, side in ((1, height), (2, width))]
    operations["values"][:, 0, :4] = np.stack([*corners, height, width], axis=1)
    operations["values"][:, 0, 4:7] = erasing.fill
    operations["values"][~applies] = 0.0
    return operations


# The 14 operations of RandAugment and TrivialAugment-wide. There are only so many (operation, magnitude, sign), so they
# are tables, and drawing one is looking it up.


class _Kind(NamedTuple):
    make: Callable[[float, int], Operations]
    """Makes the operation from a magnitude and the image's size in px."""
    signed: bool
    """The magnitude is negative in half of the draws."""


def _affine(a: float, b: float, c: float, d: float, e: float, f: float) -> Operations:
    return operation(OperationKind.AFFINE, a, b, c, d, e, f)


def _rotate(degrees: float, size: int) -> Operations:
    """Counter-clockwise about the centre, as Pillow's `Image.rotate`."""
    sine, cosine = sin_cos(-degrees)
    center = size / 2
    x, y = -cosine * center - sine * center + center, sine * center - cosine * center + center
    return _affine(cosine, sine, x, -sine, cosine, y)


def _enhance(kind: OperationKind) -> _Kind:
    return _Kind(lambda magnitude, size: operation(kind, 1.0 + magnitude), signed=True)


_KINDS = (
    _Kind(lambda magnitude, size: operation(OperationKind.IDENTITY), signed=False),
    _Kind(lambda magnitude, size: _affine(1.0, magnitude, 0.0, 0.0, 1.0, 0.0), signed=True),  # shear x
    _Kind(lambda magnitude, size: _affine(1.0, 0.0, 0.0, magnitude, 1.0, 0.0), signed=True),  # shear y
    _Kind(lambda magnitude, size: _affine(1.0, 0.0, -float(int(magnitude)), 0.0, 1.0, 0.0), signed=True),  # move x
    _Kind(lambda magnitude, size: _affine(1.0, 0.0, 0.0, 0.0, 1.0, -float(int(magnitude))), signed=True),  # move y
    _Kind(_rotate, signed=True),
    _enhance(OperationKind.BRIGHTNESS),
    _enhance(OperationKind.SATURATION),
    _enhance(OperationKind.CONTRAST),
    _enhance(OperationKind.SHARPNESS),
    _Kind(lambda magnitude, size: operation(OperationKind.POSTERIZE, magnitude), signed=False),
    _Kind(lambda magnitude, size: operation(OperationKind.SOLARIZE, magnitude), signed=False),
    _Kind(lambda magnitude, size: operation(OperationKind.AUTOCONTRAST), signed=False),
    _Kind(lambda magnitude, size: operation(OperationKind.EQUALIZE), signed=False),
)
NUM_OPERATIONS = len(_KINDS)


@lru_cache(maxsize=8)
def rand_augment_table(magnitude: int, bins: int, size: int) -> Operations:
    """[14, 2]: by operation and sign, at magnitude `magnitude` of `bins`, for images of `size` x `size` px."""
    moved = 150.0 / 331.0 * size
    # identity, shears, moves, rotate, brightness, saturation, contrast, sharpness
    largest = (0.0, 0.3, 0.3, moved, moved, 30.0, 0.9, 0.9, 0.9, 0.9)
    return _table(largest, bins, size, posterize_by=4)[:, magnitude]


@lru_cache(maxsize=8)
def trivial_augment_wide_table(bins: int, size: int) -> Operations:
    """[14, bins, 2]: by operation, magnitude and sign, for images of `size` x `size` px."""
    return _table((0.0, 0.99, 0.99, 32.0, 32.0, 135.0, 0.99, 0.99, 0.99, 0.99), bins, size, posterize_by=6)


def _table(largest: tuple[float, ...], bins: int, size: int, posterize_by: int) -> Operations:
    table = np.zeros((NUM_OPERATIONS, bins, 2), OPERATION)
    for bin_ in range(bins):
        posterize = 8 - float(np.rint(bin_ / ((bins - 1) / posterize_by)))
        solarize = _linspace(255.0, 0.0, bins, bin_)
        magnitudes = (*(_linspace(0.0, most, bins, bin_) for most in largest), posterize, solarize, 0.0, 0.0)
        for number, (kind, magnitude) in enumerate(zip(_KINDS, magnitudes, strict=True)):
            for negative in (0, 1):
                value = -magnitude if negative and kind.signed else magnitude
                table[number, bin_, negative] = kind.make(value, size)
    return table


def _linspace(first: float, last: float, num: int, k: int) -> float:
    """Number `k` of torch.linspace(first, last, num): single precision, from the nearer end."""
    start, end = float(np.float32(first)), float(np.float32(last))
    step = float(np.float32(np.float32(end - start) / np.float32(num - 1)))
    return float(np.float32(start + step * k if k < num // 2 else end - step * (num - 1 - k)))
