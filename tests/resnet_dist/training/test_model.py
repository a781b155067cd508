"""Backends that choose nothing by themselves, and an optimizer that does the arithmetic it says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from resnet_dist.config.recipe import OptimConfig, TrainConfig
from resnet_dist.models import ImageClassifier, build_model
from resnet_dist.training.model import build_optimizer, parameter_groups, set_backends


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    torch.set_num_threads(threads)


def config(**changes: object) -> TrainConfig:
    return TrainConfig.model_validate({"global_batch_size": 8, "micro_batch_size": 4, "total_epochs": 1, **changes})


def test_fp32_is_not_tf32() -> None:
    torch.backends.cudnn.allow_tf32 = True
    set_backends(config())
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("reduction", ["fast", "exact"])
def test_exact_asks_for_deterministic_kernels_and_fast_does_not(reduction: str) -> None:
    set_backends(config(reduction=reduction))
    assert torch.are_deterministic_algorithms_enabled() == (reduction == "exact")
    assert torch.backends.cudnn.deterministic == (reduction == "exact")


def test_threads_are_the_recipes() -> None:
    set_backends(config(cpu_threads=2))
    assert torch.get_num_threads() == 2


# The optimizer


@pytest.mark.parametrize(
    ("name", "shortcut", "num_decayed", "num_undecayed"),
    [
        ("resnet152", None, 156, 311),  # 155 convolutions and fc; two per norm and fc's bias
        ("resnet34", "A", 34, 67),
        ("resnet34", "C", 50, 99),  # 16 projections, each with a norm
        ("resnet20", None, 20, 39),
        ("plain20", None, 20, 39),
    ],
)
def test_weights_of_convolutions_and_linear_layers_decay(
    name: str, shortcut: str | None, num_decayed: int, num_undecayed: int
) -> None:
    with torch.device("meta"):
        net = build_model(name, 10, shortcut=shortcut)
    decayed, undecayed = parameter_groups(net, 1e-4)
    assert (len(decayed["params"]), decayed["weight_decay"]) == (num_decayed, 1e-4)
    assert (len(undecayed["params"]), undecayed["weight_decay"]) == (num_undecayed, 0.0)
    assert {id(p) for p in decayed["params"] + undecayed["params"]} == {id(p) for p in net.parameters()}
    assert all(p.ndim in (2, 4) for p in decayed["params"])
    assert all(p.ndim == 1 for p in undecayed["params"])
    norms = [p for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    assert {id(p) for p in norms} <= {id(p) for p in undecayed["params"]}


def test_the_order_does_not_depend_on_the_wrapper_or_the_process() -> None:
    def names(model: nn.Module) -> list[str]:
        name_of = {id(p): name.removeprefix("net.") for name, p in model.named_parameters()}
        return [name_of[id(p)] for group in parameter_groups(model, 0.1) for p in group["params"]]

    net = build_model("resnet20", 10, shortcut="B")
    wrapped = ImageClassifier(
        build_model("resnet20", 10, shortcut="B"), mean=(0,) * 3, std=(1,) * 3, channels_last=True
    )
    assert names(net) == names(wrapped)
    assert names(net)[:3] == ["conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv2.weight"]
    assert names(net)[22:25] == ["bn1.weight", "bn1.bias", "layer1.0.bn1.weight"]


@pytest.mark.parametrize("nesterov", [False, True])
def test_two_steps_by_hand(nesterov: bool) -> None:
    layer = nn.Linear(3, 2).double()
    config = OptimConfig(name="sgd", lr=0.5, momentum=0.9, nesterov=nesterov, weight_decay=0.01)
    optimizer = build_optimizer(layer, config)
    expected = {name: p.detach().clone() for name, p in layer.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in expected.items()}
    for lr in (0.5, 0.25):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, p in layer.named_parameters():
            p.grad = torch.randn_like(p)
            gradient = p.grad + (0.01 if name == "weight" else 0.0) * expected[name]
            velocity[name] = 0.9 * velocity[name] + gradient
            expected[name] -= lr * (gradient + 0.9 * velocity[name] if nesterov else velocity[name])
        optimizer.step()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-12, atol=1e-12)


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(ValueError, match=r"nesterov needs name: sgd and a momentum above 0"):
        OptimConfig(name="sgd", lr=0.1, momentum=0.0, nesterov=True, weight_decay=0.0)
    plain = OptimConfig(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0)
    assert build_optimizer(nn.Linear(2, 2), plain).defaults["momentum"] == 0.0


def test_decay_all_reaches_biases_and_norms() -> None:
    groups = parameter_groups(build_model("resnet20", 10), 1e-4, "all")
    assert [group["weight_decay"] for group in groups] == [1e-4, 1e-4]


def test_a_first_step_of_lamb_by_hand() -> None:
    """Bias correction makes the first Adam update the gradient's sign; the trust ratio gives it the weight's length."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False).double()
    weight, decay, lr = layer.weight.detach().clone(), 0.02, 0.1
    optimizer = build_optimizer(layer, OptimConfig(name="lamb", lr=lr, weight_decay=decay))
    layer.weight.grad = 0.1 * torch.randn_like(weight)
    update = layer.weight.grad / (layer.weight.grad.abs() + 1e-6) + decay * weight
    optimizer.step()
    expected = weight - lr * weight.norm() / update.norm() * update
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-9, atol=1e-9)


def test_lamb_does_not_know_nesterov() -> None:
    with pytest.raises(ValueError, match=r"nesterov needs name: sgd"):
        OptimConfig(name="lamb", lr=0.1, nesterov=True, weight_decay=0.0)
