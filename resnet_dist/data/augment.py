"""Which operations become of a training image after its crop: keyed draws to `operations`, whole batches in numpy.

Every entry of `data.train.augment` draws from a key of its own, so adding one at the end changes none before it. The
definitions are torchvision's 0.29; the tests replay its transforms on our draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from resnet_dist.config.recipe_augment import (
    Augmentation,
    ColorJitter,
    Lighting,
    RandAugment,
    RandomErasing,
    TrivialAugmentWide,
)
from resnet_dist.data.auto_augment import NUM_OPERATIONS, rand_augment_table, trivial_augment_wide_table
from resnet_dist.data.exact_math import Reals, below, between, log_uniform, normal
from resnet_dist.data.keyed_random import splitmix64, uniform
from resnet_dist.data.operations import OPERATION, OperationKind, Operations

_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
"""Of ImageNet's colours in 0..1 (Krizhevsky et al. 2012; the numbers of fb.resnet.torch): a row for R, G, B."""

_TRIES = 10


def draw_operations(augmentations: Sequence[Augmentation], size: int, keys: NDArray[np.uint64]) -> Operations:
    """The operations [N, K] of N images of `size` x `size` px with the given keys [N]; K follows from the recipe."""
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
            table, draws = _trivial_augment_wide(augmentation.bins, size), uniform(keys, 3)
            limits = (NUM_OPERATIONS, augmentation.bins, 2)
            chosen = tuple(below(np.int64(limit), draws[:, [k]]) for k, limit in enumerate(limits))
            return table[chosen]
        case RandomErasing():
            return random_erasing(augmentation, size, uniform(keys, 3 + 2 * _TRIES))


def rand_augment(policy: RandAugment, size: int, draws: Reals) -> Operations:
    """[N, ops] from draws [N, 3 * ops]: pairs of operation and sign, then whether each is applied."""
    table = _rand_augment(policy.magnitude, policy.bins, size)
    chosen = draws[:, : 2 * policy.ops].reshape(len(draws), policy.ops, 2)
    operations = table[below(np.int64(NUM_OPERATIONS), chosen[..., 0]), below(np.int64(2), chosen[..., 1])]
    operations[draws[:, 2 * policy.ops :] >= policy.probability] = np.zeros((), OPERATION)
    return operations


def color_jitter(jitter: ColorJitter, draws: Reals) -> Operations:
    """[N, 4] from draws [N, 8]: four factors, and four numbers whose order is the operations'."""
    operations = np.zeros((len(draws), 4), OPERATION)
    strengths = (jitter.brightness, jitter.contrast, jitter.saturation)
    for k, (kind, strength) in enumerate(zip(_JITTERS, strengths, strict=True)):
        operations["kind"][:, k] = kind
        operations["values"][:, k, 0] = between(max(0.0, 1.0 - strength), 1.0 + strength, draws[:, k])
    if jitter.hue > 0:  # 8-bit HSV and back changes px even without a turn
        operations["kind"][:, 3] = OperationKind.HUE
        turns = np.trunc(255.0 * between(-jitter.hue, jitter.hue, draws[:, 3]))
        operations["values"][:, 3, 0] = np.mod(turns, 256.0)
    order = np.argsort(draws[:, 4:8], axis=1, kind="stable")
    return np.take_along_axis(operations, order, axis=1)


_JITTERS = (OperationKind.BRIGHTNESS, OperationKind.CONTRAST, OperationKind.SATURATION)


def lighting(std: float, draws: Reals) -> Operations:
    """[N, 1] from draws [N, 3]: every channel's grey levels grow by one number."""
    amounts = normal(draws) * std
    operations = np.zeros((len(draws), 1), OPERATION)
    operations["kind"] = OperationKind.ADD
    for channel, row in enumerate(_EIGENVECTORS):
        weights = [255.0 * vector * value for vector, value in zip(row, _EIGENVALUES, strict=True)]
        # Written out: a matrix product may sum in another order on another CPU.
        share = amounts[:, 0] * weights[0] + amounts[:, 1] * weights[1] + amounts[:, 2] * weights[2]
        operations["values"][:, 0, channel] = share
    return operations


def random_erasing(erasing: RandomErasing, size: int, draws: Reals) -> Operations:
    """[N, 1] from draws [N, 23]: whether, top, left, ten areas, ten aspect ratios. Nothing where no try fits."""
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


_rand_augment = lru_cache(maxsize=8)(rand_augment_table)
_trivial_augment_wide = lru_cache(maxsize=8)(trivial_augment_wide_table)
