"""Fine-tuning: what is frozen does not change by a bit and costs no backward pass; learning rates by stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_run as small
import torch
from torch import Tensor, nn

from resnet_dist.config.recipe import OptimConfig, Recipe
from resnet_dist.errors import UserError
from resnet_dist.launch.preflight import frozen_at_random
from resnet_dist.models import build_model, stage_of
from resnet_dist.models.summary import KernelCounter
from resnet_dist.training.model import build_classifier, parameter_groups
from resnet_dist.training.state import TrainState
from resnet_dist.training.step import update_weights

FREEZE = ["stem", "layer1"]
NOISE = {"drop_path": 0.1, "dropout": 0.1}


def stages_that_changed(folder: Path, recipe: Recipe, *, steps: int = 3, **options: Any) -> dict[str, set[str]]:
    """The stages in which training changed any bit of the net, or of its moving average if it has one."""
    plan = replace(small.PLAN, last_step=steps, eval_every_epochs=99, save_every_epochs=99, log_every_steps=3)
    trainer = small.trainer_of(folder, recipe, plan, **options)
    first = {key: value.clone() for key, value in trainer.state.net.state_dict().items()}
    trainer.fit()
    changed: dict[str, set[str]] = {"statistics": set(), "weights": set()}
    for net in {trainer.state.net, trainer.state.evaluated_net}:
        for key, value in net.state_dict().items():
            if not torch.equal(value, first[key]):
                is_statistic = key.endswith(("running_mean", "running_var", "num_batches_tracked"))
                changed["statistics" if is_statistic else "weights"].add(stage_of(net, key))
    return changed


@pytest.mark.parametrize(
    ("precision", "reduction", "sections", "options"),
    [
        ("fp32", "fast", {}, {}),
        ("fp32", "fast", {"optim": {"decay": "all"}, "train": {"ema": {"decay": 0.9}}}, {}),
        ("fp32", "fast", {"optim": {"name": "lamb", "lr": 0.01, "clip_grad_norm": 1.0}}, {}),
        ("fp32", "fast", {"train": {"gradient_compression": "bf16"}}, {}),
        ("fp32", "fast", {"train": {"gradient_compression": "powersgd"}}, {}),
        ("fp16", "fast", {}, {}),
        ("fp32", "exact", {}, {}),
        ("fp32", "fast", {"model": NOISE}, {"recompute_activations": True}),
        ("fp32", "fast", {"model": NOISE, "train": {"bn_statistics_steps": 2}}, {"micro_batches_per_launch": 4}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else value,
)
def test_frozen_stages_do_not_change_by_a_bit(
    tmp_path: Path, precision: str, reduction: str, sections: dict[str, Any], options: dict[str, Any]
) -> None:
    sections = {**sections, "optim": {"freeze": FREEZE, **sections.get("optim", {})}}
    recipe = small.recipe(precision, reduction, **sections)
    assert stages_that_changed(tmp_path, recipe, **options) == {
        "weights": {"layer2", "layer3", "head"},
        "statistics": {"layer2", "layer3"},
    }


def test_a_frozen_stage_in_the_middle_passes_gradients_on(tmp_path: Path) -> None:
    recipe = small.recipe(optim={"freeze": ["layer2", "head"]})
    assert stages_that_changed(tmp_path, recipe) == {
        "weights": {"stem", "layer1", "layer3"},
        "statistics": {"stem", "layer1", "layer3"},
    }


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_weights_are_trained_with_frozen_statistics(tmp_path: Path, precision: str) -> None:
    recipe = small.recipe(precision, train={"freeze_bn_statistics": True, "ema": {"decay": 0.9}})
    assert stages_that_changed(tmp_path, recipe, micro_batches_per_launch=4) == {
        "weights": {"stem", "layer1", "layer2", "layer3", "head"},
        "statistics": set(),
    }


def test_only_the_head_is_trained_over_features_that_are_those_of_evaluation() -> None:
    """Batch norm, drop-path and dropout of the frozen stages are off; those of the head, dropout, are not."""
    recipe = small.recipe(model=NOISE, optim={"freeze": ["stem", "layer1", "layer2", "layer3"]})
    classifier = build_classifier(recipe).train()
    modes = {key: module.training for key, module in classifier.net.named_modules() if not list(module.children())}
    assert not any(on for key, on in modes.items() if key.startswith(("bn1", "layer")) and "bn" in key)
    assert not any(on for key, on in modes.items() if key.endswith("drop_path"))
    assert modes["dropout"]
    classifier.eval().train()  # as around every evaluation
    assert modes == {key: classifier.net.get_submodule(key).training for key in modes}


# What it saves


def test_frozen_leading_stages_have_no_backward_pass_and_keep_no_activations() -> None:
    def cost(freeze: list[str]) -> tuple[int, int]:
        """Kernels of convolutions' backward passes, and bytes that autograd holds between the passes."""
        classifier = build_classifier(small.recipe(optim={"freeze": freeze})).train()
        weights = {parameter.data_ptr() for parameter in classifier.parameters()}
        held: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            if x.data_ptr() not in weights:
                held[x.data_ptr()] = x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), KernelCounter() as kernels:
            classifier(torch.zeros((16, 8, 8, 3), dtype=torch.uint8)).sum().backward()
        return kernels.calls["convolution_backward"], sum(held.values())

    kernels, held = cost([])
    fewer, less = cost(FREEZE)
    fewest, least = cost([*FREEZE, "layer2", "layer3"])
    # Of 19 convolutions, each gives two gradients but the first, whose input needs none. After freezing, that is the
    # first of layer2, behind seven; its shortcut has no weights (option A).
    assert (kernels, fewer, fewest) == (37, 23, 0)
    assert less < 0.5 * held
    assert least < 0.01 * held


# Learning rates by stage


def rates(config: OptimConfig, net: nn.Module) -> dict[str, float]:
    """By parameter, the rate that a step writes for a scheduled rate of 0.5."""
    state = TrainState(net, torch.optim.SGD(parameter_groups(net, config), lr=1.0))
    update_weights(state, 0.5, clip_grad_norm=None, measure_norm=False)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    groups = state.optimizer.param_groups
    return {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}


def test_factors_and_decay_by_stage_multiply_the_scheduled_rate() -> None:
    net = build_model("resnet8", 4)
    config = OptimConfig(name="sgd", lr=0.1, weight_decay=1e-4, layer_decay=0.5, lr_factors={"layer1": 3, "head": 10})
    factors = {"stem": 1 / 16, "layer1": 3 / 8, "layer2": 1 / 4, "layer3": 1 / 2, "head": 10}
    assert rates(config, net) == {name: 0.5 * factors[stage_of(net, name)] for name, _ in net.named_parameters()}
    groups = parameter_groups(net, config)
    assert [group["weight_decay"] for group in groups] == [1e-4, 0.0] * 5
    assert len({group["lr_factor"] for group in groups}) == 5


def test_without_these_keys_the_optimizers_state_is_that_of_earlier_versions() -> None:
    groups = parameter_groups(build_model("resnet8", 4), OptimConfig(name="sgd", lr=0.1, weight_decay=1e-4))
    assert [group.keys() for group in groups] == [{"params", "weight_decay"}] * 2


@pytest.mark.parametrize("name", ["sgd", "lamb"])
def test_a_head_with_a_hundred_times_the_rate_moves_a_hundred_times_as_far(tmp_path: Path, name: str) -> None:
    def moved(folder: str, **optim: Any) -> Tensor:
        recipe = small.recipe("fp64", optim={"name": name, "lr": 1e-9, "weight_decay": 0.0, **optim})
        recipe = recipe.model_copy(update={"schedule": recipe.schedule.model_copy(update={"final_factor": 1.0})})
        plan = replace(small.PLAN, last_step=5, eval_every_epochs=99, save_every_epochs=99, log_every_steps=5)
        trainer = small.trainer_of(tmp_path / folder, recipe, plan)
        first = trainer.state.net.fc.weight.detach().clone()  # type: ignore[union-attr,operator]
        trainer.fit()
        return trainer.state.net.fc.weight.detach() - first  # type: ignore[union-attr,operator,no-any-return]

    alike, faster = moved("alike"), moved("faster", lr_factors={"head": 100})
    torch.testing.assert_close(faster, 100 * alike, rtol=0.01, atol=1e-12)


# Mistakes


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        (
            {"freeze": ["layer4"]},
            "optim.freeze: resnet20 has no stage layer4; its stages are stem, layer1, layer2, layer3, head",
        ),
        ({"lr_factors": {"fc": 10}}, "optim.lr_factors: resnet20 has no stage fc; its stages are stem, "),
        ({"freeze": ["stem", "layer1", "layer2", "layer3", "head"]}, "all stages of resnet20, so nothing is trained"),
    ],
)
def test_stages_that_do_not_exist_or_leave_nothing(optim: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        build_classifier(small.recipe(optim=optim))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optim": {"freeze": ["stem"], "lr_factors": {"stem": 2}}}, "lr_factors names stem, which freeze keeps"),
        ({"optim": {"freeze": ["stem", "stem"]}}, "freeze names a stage twice: stem, stem"),
        ({"train": {"freeze_bn_statistics": True, "bn_statistics_steps": 2}}, "exclude each other"),
    ],
)
def test_keys_that_contradict_each_other(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small.recipe(**sections)


def test_what_is_frozen_without_having_been_trained_is_worth_a_warning() -> None:
    both = {"optim": {"freeze": FREEZE}, "train": {"freeze_bn_statistics": True}}
    warning = frozen_at_random(small.recipe(**both))
    assert warning is not None
    assert warning.startswith("optim.freeze and train.freeze_bn_statistics: without model.init")
    assert frozen_at_random(small.recipe(**both, model={"init": {"weights": "net.pth"}})) is None
    assert frozen_at_random(small.recipe()) is None
