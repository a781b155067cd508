"""Mixup and CutMix: images of a micro-batch mixed in pairs, and soft targets [N, C] that say how much of which.

What is drawn is a function of (seed, step, micro-batch) alone; the px are mixed on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, localcontext
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import one_hot

from resnet_dist.config.recipe import Mixing
from resnet_dist.data.keyed_random import Stream, sample_keys, splitmix64, uniform

_NUMBERS, _ORDER, _BETA = range(3)
"""What a micro-batch's sub-keys are for. Part of a recipe's meaning: never renumber, only append."""


@dataclass(frozen=True)
class Mix:
    partners: NDArray[np.int64]
    """[N], a permutation: with whom each image is mixed."""
    own_share: float
    """Of an image's target that is its own; the rest is its partner's."""
    box: tuple[int, int, int, int] | None
    """CutMix: top, left, height, width in px of what is the partner's. None: mixup, everywhere by `own_share`."""


def draw_mix(config: Mixing, seed: int, step: int, micro_batch: int, num_images: int, size: int) -> Mix | None:
    """How the `num_images` images of `size` x `size` px of a micro-batch are mixed; None if they are not."""
    key = sample_keys(Stream.MIXING, seed, step, [micro_batch])
    mixed, kind, y, x = uniform(splitmix64(key, _NUMBERS), 4)[0].tolist()
    if mixed >= config.probability:
        return None
    order = splitmix64(splitmix64(key, _ORDER), np.arange(num_images))
    partners = np.argsort(order, kind="stable").astype(np.int64, copy=False)
    mixup, cutmix = config.mixup_alpha, config.cutmix_alpha
    is_mixup = cutmix is None or (mixup is not None and kind < 0.5)
    alpha = mixup if is_mixup else cutmix
    assert alpha is not None  # the schema sees to it
    share = draw_beta(alpha, splitmix64(key, _BETA))
    if is_mixup:
        return Mix(partners, share, None)
    box = cut_box(share, int(size * y), int(size * x), size)
    return Mix(partners, 1.0 - box[2] * box[3] / (size * size), box)


def draw_beta(alpha: float, key: NDArray[np.uint64]) -> float:
    """One number of Beta(alpha, alpha) from a key [1], by Jöhnk's rejections: u**(1/a) / (u**(1/a) + v**(1/a)) of the
    first pair whose sum is at most 1; two tries on average at alpha 1, six at 2.

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


class Mixer:
    """Mixes the micro-batches of a run; without a `config` it only makes the targets."""

    def __init__(self, config: Mixing | None, *, seed: int, num_classes: int, dtype: torch.dtype) -> None:
        self._config = config
        self._seed = seed
        self._num_classes = num_classes
        self._dtype = dtype

    def __call__(self, images: Tensor, labels: Tensor, step: int, micro_batch: int) -> tuple[Tensor, Tensor]:
        """(images, targets) from uint8 images [N, S, S, 3] and classes int64 [N].

        Targets: [N, C] of `dtype`, rows sum to 1. Images: uint8 as they came, or after mixup grey levels of `dtype`.
        """
        targets = one_hot(labels, self._num_classes).to(self._dtype)
        if self._config is None:
            return images, targets
        mix = draw_mix(self._config, self._seed, step, micro_batch, len(images), images.shape[1])
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
