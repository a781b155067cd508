"""Mixup and CutMix: images of a micro-batch are mixed in pairs, and targets [N, C] give the share of each class.

What is drawn is a function of (seed, step, micro-batch) alone. The draws travel to the device with the batch
(`mix_numbers`), where the pixels are mixed (`mix`).
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, localcontext
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnet_dist.config.recipe import Mixing
from resnet_dist.data.keyed_random import Stream, sample_keys, splitmix64, uniform

_NUMBERS, _ORDER, _BETA = range(3)
"""The uses of a micro-batch's sub-keys. Part of a recipe's meaning: never renumber, only append."""


@dataclass(frozen=True)
class Mix:
    partners: NDArray[np.int64]
    """[N], a permutation: the image with which each image is mixed."""
    own_share: float
    """The share of an image's own class in its target; the rest is its partner's."""
    box: tuple[int, int, int, int] | None
    """CutMix: top, left, height, width in px of the part that comes from the partner. None: mixup."""


def draw_mix(config: Mixing, seed: int, step: int, micro_batch: int, num_images: int, size: int) -> Mix:
    """How the `num_images` images, `size` x `size` px, of a micro-batch are mixed; not at all: an empty box."""
    key = sample_keys(Stream.MIXING, seed, step, [micro_batch])
    mixed, kind, y, x = uniform(splitmix64(key, _NUMBERS), 4)[0].tolist()
    if mixed >= config.probability:
        return Mix(np.arange(num_images), 1.0, (0, 0, 0, 0))
    order = splitmix64(splitmix64(key, _ORDER), np.arange(num_images))
    partners = np.argsort(order, kind="stable").astype(np.int64, copy=False)
    mixup, cutmix = config.mixup_alpha, config.cutmix_alpha
    is_mixup = cutmix is None or (mixup is not None and kind < 0.5)
    alpha = mixup if is_mixup else cutmix
    assert alpha is not None  # the schema guarantees it
    share = draw_beta(alpha, splitmix64(key, _BETA))
    if is_mixup:
        return Mix(partners, share, None)
    box = cut_box(share, int(size * y), int(size * x), size)
    return Mix(partners, 1.0 - box[2] * box[3] / (size * size), box)


def draw_beta(alpha: float, key: NDArray[np.uint64]) -> float:
    """One number of Beta(alpha, alpha) from a key [1], by Jöhnk's rejection method: u**(1/a) / (u**(1/a) + v**(1/a)) of
    the first pair whose sum is at most 1. Two tries on average at alpha 1, six at 2.

    In decimal arithmetic, whose exp and ln are the same on every machine.
    """
    with localcontext(prec=25):
        for attempt in count():
            draws = uniform(splitmix64(key, attempt), 2)[0].tolist()
            x, y = (((Decimal(u) + Decimal(2) ** -54).ln() / Decimal(alpha)).exp() for u in draws)
            if x + y <= 1:
                return float(x / (x + y))
    raise AssertionError("unreachable")


def cut_box(own_share: float, y: int, x: int, size: int) -> tuple[int, int, int, int]:
    """Top, left, height, width: about 1 - own_share of the image around (y, x), cut at its edges; torchvision's."""
    half = int(0.5 * float(np.sqrt(1.0 - own_share)) * size)
    top, left = max(y - half, 0), max(x - half, 0)
    return top, left, min(y + half, size) - top, min(x + half, size) - left


def mix_numbers(
    config: Mixing, seed: int, step: int, micro_batches: range, num_images: int, size: int
) -> NDArray[np.int64]:
    """What `mix` needs to know of `micro_batches` of `num_images` images of `size` x `size` px each.

    Returns int64 [len(micro_batches) * (num_images + 6)]: the partner of every image, as an index in the merged batch;
    then one after the other, each for all micro-batches: the own share of the targets and of the pixels in the box (the
    bits of a float64), and the box: top, left, bottom, right in px, the last two exclusive.
    """
    partners, shares, boxes = [], [], []
    for k, micro_batch in enumerate(micro_batches):
        drawn = draw_mix(config, seed, step, micro_batch, num_images, size)
        partners.append(drawn.partners + k * num_images)
        # In both kinds the pixels in a box are mixed; mixup's is the whole image.
        top, left, height, width = drawn.box or (0, 0, size, size)
        boxes.append((top, left, top + height, left + width))
        shares.append((drawn.own_share, 0.0 if drawn.box else drawn.own_share))
    by_kind = np.array(shares).T.reshape(-1).view(np.int64), np.array(boxes, np.int64).T.reshape(-1)
    return np.concatenate([*partners, *by_kind])


def mix(numbers: Tensor, images: Tensor, targets: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`k` merged micro-batches of N images after mixup or CutMix, or with unchanged values where neither was drawn.

    The same operations whatever was drawn. None waits for the device or needs memory of the host, so they can be
    queued ahead, or be part of a CUDA graph.

    Args:
        numbers: `mix_numbers` of the micro-batches, on the device.
        images: uint8 [k * N, S, S, 3].
        targets: floats [k * N, C].

    Returns:
        New images, grey levels in the targets' type, and new targets.
    """
    size, channels = images.shape[2:]
    partners, shares, boxes = numbers.split([len(images), 2 * k, 4 * k])
    target_share, box_share = shares.view(torch.float64).view(2, k)
    top, left, bottom, right = boxes.view(4, k, 1, 1, 1)
    # An image is seen as rows of size * channels values: long runs for the vector units, also where shares broadcast.
    row = torch.arange(size, device=images.device)[:, None]
    column = torch.arange(size * channels, device=images.device)
    outside = ((row < top) | (row >= bottom)) | ((column < left * channels) | (column >= right * channels))
    # [k, 1, size, size * channels]
    pixel_share = box_share.view(k, 1, 1, 1).masked_fill(outside, 1.0)

    def mixed(own: Tensor, other: Tensor, share: Tensor) -> Tensor:
        # Both shares are rounded from float64, as torch rounds Python's floats.
        return (own * share.to(targets.dtype)).add_(other * (1.0 - share).to(targets.dtype))

    rows, by_micro_batch = images.view(k, -1, size, size * channels), targets.view(k, -1, targets.shape[1])
    mixed_images = mixed(rows, images[partners].view_as(rows), pixel_share)
    mixed_targets = mixed(by_micro_batch, targets[partners].view_as(by_micro_batch), target_share.view(k, 1, 1))
    return mixed_images.view_as(images), mixed_targets.view_as(targets)
