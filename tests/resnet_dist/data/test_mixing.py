"""Mixup and CutMix: the same on any hardware, with the right distributions and pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resnet_dist.config.recipe import Mixing
from resnet_dist.data.keyed_random import Stream, sample_keys
from resnet_dist.data.mixing import Mix, cut_box, draw_beta, draw_mix, mix, mix_numbers
from resnet_dist.models.classifier import ImageClassifier

BOTH = Mixing(mixup_alpha=0.2, cutmix_alpha=1.0)
SOMETIMES = Mixing(mixup_alpha=0.2, cutmix_alpha=1.0, probability=0.6)


def test_draws_never_change() -> None:
    first, second = (draw_mix(BOTH, 7, 100, micro_batch, 8, 224) for micro_batch in range(2))
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
    mixed = [each for each in mixes if each.own_share != 1.0]
    assert len(mixed) == pytest.approx(300, abs=45)
    assert sum(each.box is None for each in mixed) == pytest.approx(len(mixed) / 2, abs=40)


def test_one_alpha_for_both_gives_both_kinds() -> None:
    alpha = 1.0
    same = Mixing.model_construct(mixup_alpha=alpha, cutmix_alpha=alpha, probability=1.0)
    mixes = [draw_mix(same, 0, step, 0, 4, 32) for step in range(40)]
    assert 10 < sum(each.box is None for each in mixes) < 30


# Pixels and targets


def plainly_mixed(drawn: Mix, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The formulas of the two papers for one micro-batch. What is not mixed by mixup stays uint8."""
    partners, share = torch.from_numpy(drawn.partners), drawn.own_share
    mixed_targets = targets * share + targets[partners] * (1.0 - share)
    if drawn.box is None:
        own = images.to(targets.dtype)
        return own * share + own[partners] * (1.0 - share), mixed_targets
    top, left, height, width = drawn.box
    mixed = images.clone()
    mixed[:, top : top + height, left : left + width] = images[partners, top : top + height, left : left + width]
    return mixed, mixed_targets


def example(k: int, num_images: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(k)
    images = torch.randint(0, 256, (k * num_images, size, size, 3), dtype=torch.uint8, generator=generator)
    classes = torch.randint(0, 10, (k * num_images,), generator=generator)
    return images, torch.nn.functional.one_hot(classes, 10).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_merged_micro_batches_have_the_bits_that_each_has_alone(k: int, dtype: torch.dtype) -> None:
    """Also after the net's first operation, which gives the same bits for a uint8 and for its value as a float."""
    num_images, size = 5, 33
    net = ImageClassifier(torch.nn.Flatten(), mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4), channels_last=True)
    net.to(dtype)
    kinds = set()
    for step in range(16):
        micro_batches = range(step % 3, step % 3 + k)
        images, targets = example(k, num_images, size, dtype)
        numbers = torch.from_numpy(mix_numbers(SOMETIMES, 3, step, micro_batches, num_images, size))
        assert numbers.shape == (k * (num_images + 6),)
        kept = images.clone(), targets.clone()
        mixed, soft = mix(numbers, images, targets, k)
        assert torch.equal(images, kept[0])
        assert torch.equal(targets, kept[1])
        assert mixed.dtype == soft.dtype == dtype
        for micro_batch, own, own_targets, *found in zip(
            micro_batches, *(tensor.split(num_images) for tensor in (images, targets, mixed, soft)), strict=True
        ):
            drawn = draw_mix(SOMETIMES, 3, step, micro_batch, num_images, size)
            kinds.add("mixup" if drawn.box is None else "unmixed" if drawn.own_share == 1.0 else "cutmix")
            expected, expected_targets = plainly_mixed(drawn, own, own_targets)
            assert torch.equal(found[0], expected.to(dtype))
            assert torch.equal(found[1], expected_targets)
            assert torch.equal(net(found[0]), net(expected))
    assert kinds == {"mixup", "cutmix", "unmixed"}


class Operations(TorchDispatchMode):
    """Notes every operation, and the devices of the tensors that it takes and makes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view:
            self.names.append(func.overloadpacket.__name__)
            self.devices |= {t.device.type for t in tree_leaves((args, made)) if isinstance(t, Tensor)}
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_gpu_mixing_never_waits_and_uses_no_memory_of_the_host(dtype: torch.dtype) -> None:
    """On tensors that have a device but no values, so that any use of a value would raise, too."""
    with FakeTensorMode():
        images = torch.empty(12, 32, 32, 3, dtype=torch.uint8, device="cuda")
        targets = torch.empty(12, 10, dtype=dtype, device="cuda")
        numbers = torch.empty(3 * (4 + 6), dtype=torch.int64, device="cuda")
        with Operations() as operations:
            mixed, soft = mix(numbers, images, targets, 3)
    assert (mixed.shape, mixed.dtype, soft.shape, soft.dtype) == (images.shape, dtype, targets.shape, dtype)
    assert operations.devices == {"cuda"}
    assert not {"_local_scalar_dense", "nonzero"} & set(operations.names)
    assert len(operations.names) < 30, operations.names
