"""Every parameter and buffer of every net belongs to one stage, and the stages are in forward order."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch
from torch import nn

from resnet_dist.models import MODEL_NAMES, build_model, stage_of, stages_of

VGG_STAGES = tuple(f"layer{i}" for i in range(1, 7))


def built(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, 10, **options)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_parameters_come_stage_by_stage_from_the_first_to_the_head(name: str) -> None:
    net = built(name)
    in_order = [stage for stage, _ in groupby(stage_of(net, key) for key, _ in net.named_parameters())]
    assert tuple(in_order) == stages_of(net)
    *_, last = [key for key, _ in net.named_parameters()]
    in_head = [key for key, _ in net.named_parameters() if stage_of(net, key) == "head"]
    assert in_head == [last.replace("bias", "weight"), last]
    assert {stage_of(net, key) for key, _ in net.named_buffers()} <= set(stages_of(net))


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("resnet152", ("stem", "layer1", "layer2", "layer3", "layer4", "head")),
        ("plain20", ("stem", "layer1", "layer2", "layer3", "head")),
        ("vgg16", (*VGG_STAGES, "head")),
        ("vgg19", (*VGG_STAGES, "head")),
        ("googlenet", ("stem", "layer1", "layer2", "layer3", "head")),
    ],
)
def test_stages_of_each_family(name: str, stages: tuple[str, ...]) -> None:
    assert stages_of(built(name)) == stages


@pytest.mark.parametrize(
    ("name", "options", "part", "stage"),
    [
        ("resnet50", {"stem": "deep_strided"}, "maxpool.0.weight", "stem"),
        ("resnet200", {"activation_order": "pre"}, "end.0.running_mean", "layer4"),
        ("resnet164", {"activation_order": "pre"}, "end.0.weight", "layer3"),
        ("resnet18", {}, "layer2.0.downsample.1", "layer2"),
        ("vgg16", {}, "features.17.weight", "layer4"),
        ("vgg19", {}, "features.16.weight", "layer3"),
        ("vgg19", {}, "features.19.weight", "layer4"),
        ("vgg16", {}, "classifier.3.bias", "layer6"),
        ("googlenet", {}, "conv3.bn.weight", "stem"),
        ("googlenet", {}, "inception4e.branch1.conv.weight", "layer2"),
    ],
)
def test_a_part_of_a_net_is_in_its_stage(name: str, options: dict[str, object], part: str, stage: str) -> None:
    assert stage_of(built(name, **options), part) == stage


def test_a_name_that_the_net_does_not_have_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        stage_of(built("resnet20"), "features.0.weight")
