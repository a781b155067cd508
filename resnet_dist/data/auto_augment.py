"""The 14 operations of RandAugment and TrivialAugment-wide with their magnitudes, as torchvision 0.29 defines them.

There are only so many (operation, magnitude, sign), so they are tables; drawing one is looking it up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from resnet_dist.data.exact_math import sin_cos
from resnet_dist.data.operations import OPERATION, OperationKind, Operations, operation


class _Kind(NamedTuple):
    make: Callable[[float, int], Operations]
    """From a magnitude and the image's size in px."""
    signed: bool
    """Whether the magnitude is negative in half of the draws."""


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


def rand_augment_table(magnitude: int, bins: int, size: int) -> Operations:
    """[14, 2]: by operation and sign, at magnitude `magnitude` of `bins`, for images of `size` x `size` px."""
    moved = 150.0 / 331.0 * size
    # identity, shears, moves, rotate, brightness, saturation, contrast, sharpness
    largest = (0.0, 0.3, 0.3, moved, moved, 30.0, 0.9, 0.9, 0.9, 0.9)
    return _table(largest, bins, size, posterize_by=4)[:, magnitude]


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
