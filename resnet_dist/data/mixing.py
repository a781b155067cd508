"""Mixup and CutMix: images of a micro-batch are mixed in pairs, and targets [N, C] give the share of each class.

What is drawn is a function of (seed, step, micro-batch) alone. The pixels are mixed on the device.
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


def draw_mix(config: Mixing, seed: int, step: int, micro_batch: int, num_images: int, size: int) -> Mix | None:
    """How the `num_images` images, `size` x `size` px, of a micro-batch are mixed; None if they are not mixed."""
    key = sample_keys(Stream.MIXING, seed, step, [micro_batch])
    mixed, kind, y, x = uniform(splitmix64(key, _NUMBERS), 4)[0].tolist()
    if mixed >= config.probability:
        return None
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


def mix_micro_batch(
    config: Mixing, images: Tensor, targets: Tensor, *, seed: int, step: int, micro_batch: int
) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, S, S, 3] and targets [N, C] after mixup or CutMix, or unchanged if neither is drawn.

    After mixup images are grey levels of the targets' type.
    """
    mix = draw_mix(config, seed, step, micro_batch, len(images), images.shape[1])
    return (images, targets) if mix is None else apply_mix(mix, images, targets)


def apply_mix(mix: Mix, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """New images [N, S, S, 3] and targets [N, C], on their device."""
    partners = torch.from_numpy(mix.partners).to(images.device)
    mixed_targets = targets * mix.own_share + targets[partners] * (1.0 - mix.own_share)
    if mix.box is None:
        own = images.to(targets.dtype)
        return own * mix.own_share + own[partners] * (1.0 - mix.own_share), mixed_targets
    top, left, height, width = mix.box
    mixed = images.clone()
    mixed[:, top : top + height, left : left + width] = images[partners, top : top + height, left : left + width]
    return mixed, mixed_targets
