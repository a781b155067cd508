"""Running statistics move only when they should; nothing else about batch norm changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from resnet_dist.models import BatchNormStatistics, build_model


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {key: tensor.numpy().tobytes() for key, tensor in tensors.items()}


def buffers(net: nn.Module) -> dict[str, bytes]:
    return bits(dict(net.named_buffers()))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    net = build_model("resnet20", 10, shortcut="B")
    net(torch.randn(8, 3, 16, 16))  # statistics that differ from their first values
    return net


def test_without_update_the_buffers_keep_every_bit(net: nn.Module) -> None:
    twin = copy.deepcopy(net)
    images = 3 + 5 * torch.randn(8, 3, 16, 16)
    before = buffers(net)
    assert len(before) == 3 * 21  # three per norm
    with BatchNormStatistics(net).updating(False):
        logits = net(images)
        logits.square().sum().backward()
    assert buffers(net) == before

    with BatchNormStatistics(twin).updating(True):
        expected = twin(images)
        expected.square().sum().backward()
    moved = buffers(twin)
    assert all(moved[key] != before[key] for key in before)
    # Normalised by the batch either way: outputs and gradients do not tell the two apart.
    assert torch.equal(logits, expected)
    gradients = {key: p.grad for key, p in net.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(net.parameters()))
    assert bits(gradients) == bits({key: p.grad for key, p in twin.named_parameters() if p.grad is not None})


def test_only_micro_batch_0_counts(net: nn.Module) -> None:
    twin = copy.deepcopy(net)
    statistics = BatchNormStatistics(net)
    for step in range(3):
        micro_batches = torch.randn(4, 8, 3, 16, 16) + step
        for number, images in enumerate(micro_batches):
            with statistics.updating(number == 0):
                net(images)
        twin(micro_batches[0])
    assert buffers(net) == buffers(twin)


def test_updates_continue_afterwards_even_after_an_error(net: nn.Module) -> None:
    statistics, images = BatchNormStatistics(net), torch.randn(8, 3, 16, 16)
    with pytest.raises(RuntimeError, match="channels"), statistics.updating(False):
        net(torch.randn(8, 4, 16, 16))
    before = buffers(net)
    net(images)
    assert all(after != before[key] for key, after in buffers(net).items())


def test_evaluation_uses_the_running_statistics_whatever_is_set(net: nn.Module) -> None:
    images = torch.randn(8, 3, 16, 16)
    net.eval()
    expected = net(images)
    with BatchNormStatistics(net).updating(False):
        assert torch.equal(net(images), expected)
    assert not torch.allclose(net.train()(images), expected)


def test_norms_without_running_statistics_stay_without() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3))
    with BatchNormStatistics(net).updating(True):
        net(torch.randn(4, 3, 2, 2))
    assert [norm.track_running_stats for norm in net] == [False, True]
