"""Merged micro-batches are normalised one by one; running statistics move only when they should."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from resnet_dist.models import BatchNormStatistics, build_model
from resnet_dist.models.batch_norm import BatchNorm2d


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {key: tensor.numpy().tobytes() for key, tensor in tensors.items()}


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {key: p.grad for key, p in net.named_parameters() if p.grad is not None}


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    net = build_model("resnet20", 10, shortcut="B")
    net(torch.randn(8, 3, 16, 16))  # statistics that differ from their first values
    return net


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_merged_micro_batches_are_normalised_as_if_each_ran_alone(layout: torch.memory_format) -> None:
    norm = BatchNorm2d(5).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    alone, fused = copy.deepcopy(norm), copy.deepcopy(norm)
    images = (3 + 2 * torch.randn(6, 5, 4, 4).double()).contiguous(memory_format=layout)
    out_grad = torch.randn_like(images)

    def ran(module: BatchNorm2d, call: str) -> list[Tensor]:
        x = images.clone().requires_grad_()
        module.num_groups = 3
        y = getattr(module, call)(x)
        y.backward(out_grad)
        assert x.grad is not None
        return [y, x.grad, *gradients(module).values(), module.running_mean, module.running_var]

    parts, input_gradients, statistics = [], [], BatchNormStatistics(alone)
    for number, part in enumerate(images.chunk(3)):
        x = part.clone().requires_grad_()
        y = alone(x)
        y.backward(out_grad.chunk(3)[number])
        parts.append(y)
        input_gradients.append(x.grad)
        if number == 0:
            statistics.keep()
    statistics.restore()
    whole = [torch.cat(parts), torch.cat(input_gradients)]
    expected = [*whole, *gradients(alone).values(), alone.running_mean, alone.running_var]
    for got, wanted in zip(ran(norm, "forward"), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-14, atol=1e-14)
    for got, wanted in zip(ran(fused, "_fused"), expected, strict=True):  # what is compiled
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_compiled_form_keeps_statistics_in_float32(dtype: torch.dtype) -> None:
    norm = BatchNorm2d(3)
    images = (100 + torch.randn(4, 3, 8, 8)).to(dtype)  # mean and square would lose all digits in 16 bits
    norm.num_groups = 2
    got = norm._fused(images)
    assert got.dtype == dtype
    torch.testing.assert_close(got, torch.cat([BatchNorm2d(3)(part) for part in images.chunk(2)]))


def test_every_net_has_norms_that_take_merged_micro_batches() -> None:
    with torch.device("meta"):
        for name in ("resnet20", "resnet50", "resnet110", "googlenet"):
            norms = [m for m in build_model(name, 10).modules() if isinstance(m, nn.BatchNorm2d)]
            assert {type(norm) for norm in norms} == {BatchNorm2d}


def test_only_micro_batch_0_counts(net: nn.Module) -> None:
    twin = copy.deepcopy(net)
    statistics, of_twin = BatchNormStatistics(net), BatchNormStatistics(twin)
    for step in range(3):
        micro_batches = torch.randn(4, 8, 3, 16, 16) + step
        for number, images in enumerate(micro_batches):
            net(images)
            if number == 0:
                statistics.count()
                statistics.keep()
        statistics.restore()
        twin(micro_batches[0])
        of_twin.count()
    assert bits(dict(net.named_buffers())) == bits(dict(twin.named_buffers()))
    assert [int(norm.num_batches_tracked) for norm in net.modules() if isinstance(norm, BatchNorm2d)] == [
        4
    ] * 21  # one before


def test_what_is_set_aside_comes_back_even_after_an_error(net: nn.Module) -> None:
    statistics, before = BatchNormStatistics(net), bits(dict(net.named_buffers()))
    with statistics.set_aside():
        net(torch.randn(8, 3, 16, 16))
    with pytest.raises(RuntimeError, match="channels"), statistics.set_aside():
        net(torch.randn(8, 4, 16, 16))
    assert bits(dict(net.named_buffers())) == before


def test_evaluation_uses_the_running_statistics_whatever_is_set(net: nn.Module) -> None:
    images = torch.randn(8, 3, 16, 16)
    net.eval()
    expected = net(images)
    with BatchNormStatistics(net).in_groups(2):
        assert torch.equal(net(images), expected)
    assert not torch.allclose(net.train()(images), expected)


def test_norms_without_running_statistics_stay_without() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3))
    statistics = BatchNormStatistics(net)
    statistics.keep()
    net(torch.randn(4, 3, 2, 2))
    statistics.restore()
    assert [norm.track_running_stats for norm in net] == [False, True]
    assert not net[1].running_mean.any()
