"""PowerSGD: exact where the gradient has a low rank, nothing lost over the steps, a fraction of the traffic."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resnet_dist.config.low_rank import RANK
from resnet_dist.config.recipe import TrainConfig
from resnet_dist.training.reduce import PowerSgdReduction


def step(reduction: PowerSgdReduction, layer: nn.Module, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """What the reduction makes of these gradients."""
    for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    reduction.finish()
    return [p.grad.clone() for p in layer.parameters() if p.grad is not None]


@pytest.fixture
def layer() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(40, 50, 3).double()


def test_a_gradient_of_low_rank_is_sent_whole(layer: nn.Conv2d) -> None:
    reduction = PowerSgdReduction(layer, rank=0, world_size=1, num_micro_batches=1)
    gradient = (torch.randn(50, RANK).double() @ torch.randn(RANK, 360).double()).view_as(layer.weight)
    bias = torch.randn(50).double()
    for _ in range(2):
        sent = step(reduction, layer, [gradient, bias])
        torch.testing.assert_close(sent[0], gradient)
        assert torch.equal(sent[1], bias)


def test_what_one_step_loses_comes_with_the_next(layer: nn.Conv2d) -> None:
    reduction = PowerSgdReduction(layer, rank=0, world_size=1, num_micro_batches=1)
    given, sent = [], []
    for _ in range(6):
        gradient = torch.randn_like(layer.weight)
        given.append(gradient)
        sent.append(step(reduction, layer, [gradient, torch.zeros(50).double()])[0])
    assert all(int(torch.linalg.matrix_rank(s.view(50, -1))) == RANK for s in sent)
    kept = reduction.state_dict()["residuals"][0].view_as(layer.weight)
    torch.testing.assert_close(sum(sent) + kept, sum(given))


def test_a_layer_without_a_gradient_gets_one_later(layer: nn.Conv2d) -> None:
    """As with zero-initialised gammas: the first steps' gradients are zero."""
    reduction = PowerSgdReduction(layer, rank=0, world_size=1, num_micro_batches=1)
    zero, bias = torch.zeros_like(layer.weight), torch.zeros(50).double()
    for _ in range(2):
        assert not step(reduction, layer, [zero, bias])[0].any()
    gradient = torch.randn_like(layer.weight)
    first, second = (step(reduction, layer, [gradient, bias])[0] for _ in range(2))
    assert torch.isfinite(first).all()
    assert float((second * gradient).sum()) > 0  # a way down


@pytest.mark.parametrize("change", [{"reduction": "exact"}, {"precision": "fp16"}])
def test_refused(change: dict[str, str]) -> None:
    train = {"global_batch_size": 8, "micro_batch_size": 4, "total_epochs": 1, "gradient_compression": "powersgd"}
    assert TrainConfig.model_validate(train).gradient_compression == "powersgd"
    with pytest.raises(ValueError, match="gradient_compression: powersgd"):
        TrainConfig.model_validate({**train, **change})
