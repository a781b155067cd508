"""Parameters to the digit and multiply-adds within 0.1 %, for every net and every shortcut option.

The published figures: torchvision's weights metadata for the ImageNet nets; He et al. 2015, tables 1 and 6, print them
rounded (0.27M, 0.46M, 0.66M, 0.85M, 1.7M, 19.4M; 1.8, 3.6 billion).
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resnet_dist.models import MODEL_NAMES, build_model, summarise

IMAGENET = {
    # name: option A = plain net, option B, option C, GMACs at 224 px of the default option
    "resnet18": (11_515_688, 11_689_512, 12_043_816, 1.814),
    "resnet34": (21_623_848, 21_797_672, 22_716_840, 3.664),
    "resnet50": (22_780_456, 25_557_032, 40_128_552, 4.089),
    "resnet101": (41_772_584, 44_549_160, 76_981_288, 7.801),
    "resnet152": (57_416_232, 60_192_808, 107_335_720, 11.514),
    "resnet200": (61_897_256, 64_673_832, 116_027_432, 15.007),  # B: timm's count
}
CIFAR = {
    # name: option A = plain net, option B, option C, MMACs at 32 px of the default option
    "resnet8": (75_290, 78_042, 78_330, 12.239),  # the line through resnet20 and resnet32
    "resnet20": (269_722, 272_474, 283_962, 40.551),
    "resnet32": (464_154, 466_906, 489_594, 68.863),
    "resnet44": (658_586, 661_338, 695_226, 97.174),
    "resnet56": (853_018, 855_770, 900_858, 125.486),
    "resnet110": (1_727_962, 1_730_714, 1_826_202, 252.888),
    "resnet1202": (19_421_274, 19_424_026, 20_538_714, 2829.239),
}
BOTTLENECK_CIFAR = {
    # name: original and pre-activation, both of option B. He et al. 2016, table 4: 1.7M and 10.2M
    "resnet164": (1_704_154, 1_703_258),
    "resnet1001": (10_328_602, 10_327_706),
}
OTHERS = {
    # torchvision's metadata; the paper's 15.3 and 19.6 billion multiply-adds
    "resnext50_32x4d": (25_028_904, 4.230),
    "resnext101_32x8d": (88_791_336, 16.414),
    "resnext101_64x4d": (83_455_272, 15.460),
    "wide_resnet50_2": (68_883_240, 11.398),
    "wide_resnet101_2": (126_886_696, 22.753),
    "vgg11": (132_863_336, 7.609),
    "vgg11_bn": (132_868_840, 7.609),
    "vgg13": (133_047_848, 11.308),
    "vgg13_bn": (133_053_736, 11.308),
    "vgg16": (138_357_544, 15.470),
    "vgg16_bn": (138_365_992, 15.470),
    "vgg19": (143_667_240, 19.632),
    "vgg19_bn": (143_678_248, 19.632),
    "googlenet": (6_624_904, 1.498),
}
TIMMS = {"resnet10", "resnet14", "resnet26", "resnet269", "resnet270", "resnet350", "resnet420"}
"""Depths of timm's nets; test_variants.py compares them."""


def build_on_meta(name: str, shortcut: str | None = None) -> nn.Module:
    with torch.device("meta"):
        of_imagenet = name in IMAGENET | OTHERS or name in ("plain18", "plain34")
        return build_model(name, 1000 if of_imagenet else 10, shortcut=shortcut)


def count_parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def count_macs(net: nn.Module, side: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(torch.empty(1, 3, side, side, device="meta"))
    return counter.get_total_flops() // 2


def test_every_net_is_counted_here() -> None:
    plain = {"plain8", "plain18", "plain34", "plain20", "plain32", "plain44", "plain56", "plain110", "plain1202"}
    elsewhere = plain | TIMMS | {"resnet110_1layer"}  # test_variants.py
    assert set(MODEL_NAMES) == IMAGENET.keys() | CIFAR.keys() | BOTTLENECK_CIFAR.keys() | OTHERS.keys() | elsewhere


@pytest.mark.parametrize("name", [*IMAGENET, *CIFAR])
def test_parameters_of_the_shortcut_options_and_macs_of_the_default(name: str) -> None:
    a, b, c, macs = (IMAGENET | CIFAR)[name]
    default, other, side, unit = ("B", "A", 224, 1e9) if name in IMAGENET else ("A", "B", 32, 1e6)
    net = build_on_meta(name)
    counted = {default: count_parameters(net)}
    counted |= {option: count_parameters(build_on_meta(name, option)) for option in (other, "C")}
    assert counted == {"A": a, "B": b, "C": c}
    assert count_macs(net, side) / unit == pytest.approx(macs, rel=1e-3)


@pytest.mark.parametrize("name", ["plain18", "plain34", "plain8", "plain110"])
def test_a_plain_net_is_its_residual_twin_without_shortcuts(name: str) -> None:
    plain, residual = build_on_meta(name), build_on_meta(name.replace("plain", "resnet"), "A")
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in residual.state_dict().items()}
    side = 224 if name in ("plain18", "plain34") else 32
    assert count_macs(plain, side) == count_macs(residual, side)


@pytest.mark.parametrize(("side", "gmacs"), [(128, 3.76), (160, 5.88), (192, 8.46), (256, 15.04), (320, 23.50)])
def test_macs_of_resnet152_grow_with_the_image(side: int, gmacs: float) -> None:
    assert round(count_macs(build_on_meta("resnet152"), side) / 1e9, 2) == gmacs


@pytest.mark.parametrize(("name", "gmacs"), [("resnet50", 3.858), ("resnet101", 7.570), ("resnet152", 11.282)])
def test_macs_of_the_papers_stride_on_the_1x1(name: str, gmacs: float) -> None:
    """Table 1's 3.8, 7.6 and 11.3 billion; the parameters stay."""
    with torch.device("meta"):
        net = build_model(name, 1000, bottleneck_stride="1x1")
    assert count_parameters(net) == IMAGENET[name][1]
    assert count_macs(net, 224) / 1e9 == pytest.approx(gmacs, rel=1e-3)


@pytest.mark.parametrize("name", BOTTLENECK_CIFAR)
def test_parameters_of_the_bottleneck_cifar_nets(name: str) -> None:
    with torch.device("meta"):
        counted = [count_parameters(build_model(name, 10, activation_order=order)) for order in ("original", "pre")]
    assert tuple(counted) == BOTTLENECK_CIFAR[name]


@pytest.mark.parametrize("name", OTHERS)
def test_parameters_and_macs_are_those_that_torchvision_publishes(name: str) -> None:
    parameters, gmacs = OTHERS[name]
    summary = summarise(name)
    assert (summary.parameters, round(summary.macs / 1e9, 3)) == (parameters, gmacs)


def test_summary_adds_up_to_the_total() -> None:
    for name, side in (("resnet152", 224), ("resnet20", 32), ("googlenet", 224)):
        summary, net = summarise(name), build_on_meta(name)
        assert (summary.parameters, summary.macs) == (count_parameters(net), count_macs(net, side))
    stages = {part.name: (part.output, part.contents) for part in summarise("resnet152").parts}
    assert stages["conv1"] == ("64 x 112 x 112", "7x7, 64, stride 2")
    assert stages["layer3"] == ("1024 x 14 x 14", "36 x Bottleneck [1x1 256, 3x3 256, 1x1 1024]")
    grouped = {part.name: part.contents for part in summarise("resnext101_64x4d").parts}
    assert grouped["layer1"] == "3 x Bottleneck [1x1 256, 3x3 256 in 64 groups, 1x1 256]"
