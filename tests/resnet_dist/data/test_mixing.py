"""Mixup and CutMix: the same on any hardware, with the right distributions and pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from resnet_dist.config.recipe import Mixing
from resnet_dist.data.keyed_random import Stream, sample_keys
from resnet_dist.data.mixing import Mix, apply_mix, cut_box, draw_beta, draw_mix

BOTH = Mixing(mixup_alpha=0.2, cutmix_alpha=1.0)


def test_draws_never_change() -> None:
    mixes = [draw_mix(BOTH, 7, 100, micro_batch, 8, 224) for micro_batch in range(2)]
    first, second = mixes
    assert first is not None
    assert second is not None
    assert first.partners.tolist() == [0, 3, 6, 7, 4, 2, 1, 5]
    assert (first.own_share, first.box) == (0.4308633609693877, (57, 53, 167, 171))
    assert second.partners.tolist() == [2, 0, 1, 3, 5, 6, 4, 7]
    assert (second.own_share, second.box) == (0.7001641312825423, None)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_shares_have_the_beta_distributions_moments(alpha: float) -> None:
    shares = [draw_beta(alpha, sample_keys(Stream.MIXING, 0, k, [0])) for k in range(1500)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.04)
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_boxes_are_torchvisions() -> None:
    assert cut_box(0.75, 50, 60, 100) == (25, 35, 50, 50)
    assert cut_box(0.75, 10, 95, 100) == (0, 70, 35, 30)
    assert cut_box(1.0, 50, 50, 100)[2:] == (0, 0)


def test_probability_and_kinds() -> None:
    half = Mixing(mixup_alpha=0.2, cutmix_alpha=1.0, probability=0.5)
    mixes = [draw_mix(half, 1, step, 0, 4, 32) for step in range(600)]
    assert sum(mix is None for mix in mixes) == pytest.approx(300, abs=45)
    kinds = [mix.box is None for mix in mixes if mix is not None]
    assert sum(kinds) == pytest.approx(len(kinds) / 2, abs=40)


def test_one_alpha_for_both_gives_both_kinds() -> None:
    alpha = 1.0
    same = Mixing.model_construct(mixup_alpha=alpha, cutmix_alpha=alpha, probability=1.0)
    mixes = [draw_mix(same, 0, step, 0, 4, 32) for step in range(40)]
    assert 10 < sum(mix is not None and mix.box is None for mix in mixes) < 30


def test_pixels_and_targets() -> None:
    images = torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).reshape(2, 4, 4, 3)
    targets = torch.eye(2, dtype=torch.float64)
    swap = np.array([1, 0])
    mixed, soft = apply_mix(Mix(swap, 0.75, None), images, targets)
    assert torch.equal(mixed, images.double() * 0.75 + images.flip(0).double() * 0.25)
    assert soft.tolist() == [[0.75, 0.25], [0.25, 0.75]]
    cut, soft = apply_mix(Mix(swap, 0.875, (1, 2, 1, 2)), images, targets)
    expected = images.clone()
    expected[:, 1:2, 2:4] = images.flip(0)[:, 1:2, 2:4]
    assert torch.equal(cut, expected)
    assert soft.tolist() == [[0.875, 0.125], [0.125, 0.875]]
