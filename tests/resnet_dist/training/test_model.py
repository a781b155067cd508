"""From recipe to model and optimizer: backends that choose nothing, updates by hand, activation checkpointing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_run as small
import torch
from torch import nn

from resnet_dist.config.loading import load_profile
from resnet_dist.config.recipe import OptimConfig, Recipe
from resnet_dist.errors import UserError
from resnet_dist.launch.preflight import require_compatible
from resnet_dist.models import build_model
from resnet_dist.training.loop import Trainer
from resnet_dist.training.model import (
    build_classifier,
    build_optimizer,
    parameter_groups,
    recompute_blocks,
    set_backends,
)


@pytest.fixture(autouse=True)
def backends_as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    torch.backends.cudnn.benchmark = False


def test_fp32_is_not_tf32() -> None:
    torch.backends.cudnn.allow_tf32 = True
    set_backends(small.train_config())
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("reduction", ["fast", "exact"])
def test_exact_asks_for_deterministic_kernels_and_fast_for_the_fastest(
    reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")  # with which torch refuses matrix products on a GPU
    set_backends(small.train_config(reduction=reduction, cpu_threads=2))
    exact = reduction == "exact"
    assert torch.are_deterministic_algorithms_enabled() == exact
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic == exact
    assert torch.backends.cudnn.benchmark != exact
    assert (os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8") == exact
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
    config = OptimConfig(name="sgd", lr=0.1, weight_decay=1e-4)
    decayed, undecayed = parameter_groups(net, config)
    assert (len(decayed["params"]), decayed["weight_decay"]) == (num_decayed, 1e-4)
    assert (len(undecayed["params"]), undecayed["weight_decay"]) == (num_undecayed, 0.0)
    assert {id(p) for p in decayed["params"] + undecayed["params"]} == {id(p) for p in net.parameters()}
    assert all(p.ndim in (2, 4) for p in decayed["params"])
    assert all(p.ndim == 1 for p in undecayed["params"])  # biases and norms
    decay_all = config.model_copy(update={"decay": "all"})
    assert [group["weight_decay"] for group in parameter_groups(net, decay_all)] == [1e-4, 1e-4]


def test_the_order_of_parameters() -> None:
    """Never change it: checkpoints of all versions have the optimizer's state in this order."""

    def names(model: nn.Module) -> list[str]:
        name_of = {id(p): name for name, p in model.named_parameters()}
        config = OptimConfig(name="sgd", lr=0.1, weight_decay=0.1)
        return [name_of[id(p)] for group in parameter_groups(model, config) for p in group["params"]]

    net = build_model("resnet20", 10, shortcut="B")
    assert names(net)[:3] == ["conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv2.weight"]
    assert names(net)[22:25] == ["bn1.weight", "bn1.bias", "layer1.0.bn1.weight"]


@pytest.mark.parametrize("nesterov", [False, True])
def test_two_steps_of_sgd_by_hand(nesterov: bool) -> None:
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


@pytest.mark.parametrize("options", [{"name": "sgd", "momentum": 0.0}, {"name": "lamb"}])
def test_nesterov_needs_sgd_and_momentum(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"nesterov needs name: sgd and a momentum above 0"):
        OptimConfig(lr=0.1, nesterov=True, weight_decay=0.0, **options)
    OptimConfig(lr=0.1, weight_decay=0.0, **options)


# Activation checkpointing and compiled nets


def trained(folder: Path, recipe: Recipe, **options: Any) -> Trainer:
    """Three steps."""
    plan = replace(small.PLAN, last_step=3, eval_every_epochs=99, save_every_epochs=99, log_every_steps=3)
    trainer = small.trainer_of(folder, recipe, plan, **options)
    trainer.fit()
    return trainer


def test_activation_checkpointing_changes_no_bit(tmp_path: Path) -> None:
    """Drop-path, dropout, running statistics and their moving average included; the average's blocks are its own."""
    recipe = small.recipe(**small.PARTS)
    kept = trained(tmp_path / "kept", recipe)
    recomputed = trained(tmp_path / "recomputed", recipe, recompute_activations=True)
    assert small.digest(recomputed.state.state_dict()) == small.digest(kept.state.state_dict())
    assert recomputed.metrics["val/loss"] == kept.metrics["val/loss"]


def test_activation_checkpointing_is_refused_for_compiled_nets() -> None:
    laptop = load_profile(Path("cluster/profiles/laptop.yaml"), ["recompute_activations=true"])
    with pytest.raises(UserError, match=r"recompute_activations .* train\.compile exclude each other"):
        require_compatible(small.recipe(train={"compile": True}), laptop)
    require_compatible(small.recipe(), laptop)


def test_activation_checkpointing_keeps_less() -> None:
    """Bytes that autograd holds between the passes."""

    def held(recomputes: bool) -> int:
        model = build_classifier(small.recipe()).train()
        if recomputes:
            recompute_blocks(model)
        seen: dict[int, int] = {}
        weights = {p.data_ptr() for p in model.parameters()}

        def pack(x: torch.Tensor) -> torch.Tensor:
            if x.data_ptr() not in weights:
                seen[x.data_ptr()] = x.numel() * x.element_size()
            return x

        images = torch.zeros((16, 8, 8, 3), dtype=torch.uint8)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(images).sum()
        total = sum(seen.values())
        loss.backward()
        return total

    assert held(recomputes=True) < held(recomputes=False) / 3


def test_a_compiled_net_trains_the_same_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dynamo's graphs run as they are, the numbers are those of the net: what it traces is right, merged
    or not, under drop-path keys that change with every micro-batch. One graph serves all launches of a size."""
    compile_net, graphs = torch.compile, []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_net(model, backend=backend, **options))
    plain, compiled = (
        trained(
            tmp_path / str(compiles),
            small.recipe(
                "fp64",
                model={"drop_path": 0.1},
                optim={"freeze": ["stem", "layer2"]},
                train={"ema": {"decay": 0.5}, "compile": compiles},
            ),
            micro_batches_per_launch=4 if compiles else 1,
        )
        for compiles in (False, True)
    )
    assert len(graphs) == 1  # two launches of three micro-batches
    assert compiled.metrics["val/loss"] == pytest.approx(plain.metrics["val/loss"], abs=1e-9)
    for key, value in plain.state.net.state_dict().items():
        torch.testing.assert_close(compiled.state.net.state_dict()[key], value, rtol=1e-9, atol=1e-12)
