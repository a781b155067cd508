"""The studies that measure: numbers that are known in advance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from resnet_dist.data.batch import Batch
from resnet_dist.models import ImageClassifier, build_model
from resnet_dist.studies.measurements import (
    KINDS,
    STEPS,
    batchnorm_report,
    gradient_report,
    growth_per_layer,
    layer_responses,
    parameters_of,
    statistics,
    steps_to,
    train,
)
from resnet_dist.studies.trainings import OPTIONS, shortcut_report
from resnet_dist.tracking.spool import History


def batch(num_images: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num_images, 8, 8, 3), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.arange(num_images) % 10, np.arange(num_images))


def classifier(net: str) -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(build_model(net, 10), mean=(128, 128, 128), std=(64, 64, 64), channels_last=True)


def test_batch_norm_has_two_parameters_a_map_and_its_output_their_statistics() -> None:
    assert parameters_of(128) == 256
    mean_error, std_error = statistics()
    assert mean_error < 1e-5
    assert std_error < 2e-3  # eps under the smallest variance, 0.01


def test_steps_to_a_loss_are_those_of_an_epochs_mean() -> None:
    assert steps_to([1.0] * 11 + [0.0] * 11, 0.5) == 17
    assert steps_to([1.0] * 22, 0.5) is None


def test_a_training_ends_when_its_loss_is_not_finite() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    floats = [Batch(b.images.float(), b.labels, b.sample_ids) for b in [batch()] * 30]
    losses = train(net, floats, lr=1e38)
    assert len(losses) < 30
    assert all(math.isfinite(loss) for loss in losses)


def test_the_report_says_which_rate_did_not_train() -> None:
    losses = {(True, 5): [0.01] * STEPS, (False, 5): [1.0, 2.0]}
    text = batchnorm_report(losses, 1e-7, 1e-4)
    assert "256 for 128 maps" in text
    assert "| with | x5 (0.1) | 11 | 0.0100 |" in text
    assert "| without | x5 (0.1) | not reached | not finite after 2 steps |" in text


def test_a_fresh_nets_responses_are_one_in_every_layer() -> None:
    net = classifier("plain20")
    stds = layer_responses(net, batch())
    assert len(stds) == 19
    assert stds == pytest.approx([1.0] * 19, abs=0.05)
    with torch.no_grad():
        net.net.get_parameter("layer1.0.bn1.weight").fill_(0.25)
    assert layer_responses(net, batch())[1] == pytest.approx(0.25, abs=0.02)


def test_growth_per_layer() -> None:
    assert growth_per_layer([(8, 1.0), (20, 2.0), (56, 2.0**4)]) == pytest.approx(2 ** (4 / 48))


def test_gradients_report_has_every_seed() -> None:
    norms = {(k, d, s): (d / 8, 0.25) for k in KINDS for d in (8, 56) for s in (0, 1)}
    text = gradient_report(norms, [8, 56], [0, 1])
    assert "| 56 | 7 / 7 | 7 / 7 | 0.25 / 0.25 | 0.25 / 0.25 |" in text
    assert "times 7.0 from 8 to 56 layers" in text


def test_shortcuts_report_counts_the_nets() -> None:
    history = History({key: [(308, 0.5)] for key in ("train/top1_error", "train/loss", "val/top1_error")})
    text = shortcut_report({(option, 0): history for option in OPTIONS}, [0])
    for line in ("| resnet20 | A | 269,722 |", "| resnet20 | B | 272,474 |", "| resnet34 | C | 22,716,840 |"):
        assert line in text
    assert "| A | 0.5 | 0.5000 | 0.5 |" in text
