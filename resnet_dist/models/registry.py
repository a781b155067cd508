"""The nets by name: one row for each, and `build_model`, which makes one from a name and options."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from resnet_dist.errors import UserError
from resnet_dist.models.batch_norm import replace_batch_norm
from resnet_dist.models.keyed_noise import replace_dropout
from resnet_dist.models.preactivation import PreactivationBasicBlock, PreactivationBottleneck, PreactivationSingleBlock
from resnet_dist.models.resnet import (
    SHORTCUTS,
    BasicBlock,
    Bottleneck,
    CifarResNet,
    NetOptions,
    ResidualBlock,
    ResNet,
    Shortcut,
    SingleBlock,
)

BlockKind = Literal["single", "basic", "bottleneck"]
POSTACTIVATION: dict[BlockKind, type[ResidualBlock]] = {
    "single": SingleBlock,
    "basic": BasicBlock,
    "bottleneck": Bottleneck,
}
PREACTIVATION: dict[BlockKind, type[ResidualBlock]] = {
    "single": PreactivationSingleBlock,
    "basic": PreactivationBasicBlock,
    "bottleneck": PreactivationBottleneck,
}
LAYERS_PER_BLOCK: dict[BlockKind, int] = {"single": 1, "basic": 2, "bottleneck": 3}


@dataclass(frozen=True)
class Layout:
    """One net of the papers, as a row of data."""

    family: type[ResNet] | type[CifarResNet]
    block: BlockKind
    num_blocks: tuple[int, ...]
    """Number of blocks in each stage."""
    shortcut: Shortcut | None
    """The default of the net's option; None makes it a plain net."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `NetOptions` that the name fixes."""


def _cifar(depth: int, block: BlockKind, shortcut: Shortcut | None) -> Layout:
    layers_per_n = 3 * LAYERS_PER_BLOCK[block]
    n, remainder = divmod(depth - 2, layers_per_n)
    assert remainder == 0, f"a CIFAR net of {block} blocks has {layers_per_n}n + 2 layers, not {depth}"
    return Layout(CifarResNet, block, (n, n, n), shortcut)


def _wider(num_blocks: tuple[int, ...], groups: int, base_width: int) -> Layout:
    return Layout(ResNet, "bottleneck", num_blocks, "B", {"groups": groups, "base_width": base_width})


LAYOUTS: dict[str, Layout] = {
    "resnet10": Layout(ResNet, "basic", (1, 1, 1, 1), "B"),
    "resnet14": Layout(ResNet, "bottleneck", (1, 1, 1, 1), "B"),
    "resnet18": Layout(ResNet, "basic", (2, 2, 2, 2), "B"),
    "resnet26": Layout(ResNet, "bottleneck", (2, 2, 2, 2), "B"),
    "resnet34": Layout(ResNet, "basic", (3, 4, 6, 3), "B"),
    "resnet50": Layout(ResNet, "bottleneck", (3, 4, 6, 3), "B"),
    "resnet101": Layout(ResNet, "bottleneck", (3, 4, 23, 3), "B"),
    "resnet152": Layout(ResNet, "bottleneck", (3, 8, 36, 3), "B"),
    "resnet200": Layout(ResNet, "bottleneck", (3, 24, 36, 3), "B"),
    "resnet269": Layout(ResNet, "bottleneck", (3, 30, 48, 8), "B"),
    "resnet270": Layout(ResNet, "bottleneck", (4, 29, 53, 4), "B"),
    "resnet350": Layout(ResNet, "bottleneck", (4, 36, 72, 4), "B"),
    "resnet420": Layout(ResNet, "bottleneck", (4, 44, 87, 4), "B"),
    "resnext50_32x4d": _wider((3, 4, 6, 3), 32, 4),
    "resnext101_32x8d": _wider((3, 4, 23, 3), 32, 8),
    "resnext101_64x4d": _wider((3, 4, 23, 3), 64, 4),
    "wide_resnet50_2": _wider((3, 4, 6, 3), 1, 128),
    "wide_resnet101_2": _wider((3, 4, 23, 3), 1, 128),
    "plain18": Layout(ResNet, "basic", (2, 2, 2, 2), None),
    "plain34": Layout(ResNet, "basic", (3, 4, 6, 3), None),
    **{f"resnet{depth}": _cifar(depth, "basic", "A") for depth in (8, 20, 32, 44, 56, 110, 1202)},
    **{f"resnet{depth}": _cifar(depth, "bottleneck", "B") for depth in (164, 1001)},
    "resnet110_1layer": _cifar(110, "single", "A"),
    **{f"plain{depth}": _cifar(depth, "basic", None) for depth in (8, 20, 32, 44, 56, 110, 1202)},
}
BASELINES = (*(f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")), "googlenet")
"""The nets that the paper compares with, and VGG's other depths, from torchvision."""
MODEL_NAMES: tuple[str, ...] = (*LAYOUTS, *BASELINES)

_NEEDS_SHORTCUTS = (
    "shortcut",
    "zero_init_residual",
    "pooled_projection",
    "drop_path",
    "gate",
    "gate_bias",
    "shortcut_scale",
    "residual_scale",
    "shortcut_dropout",
)


def build_model(name: str, num_classes: int, **options: Any) -> nn.Module:
    """The net called `name`, float32 [N, 3, H, W] -> logits [N, num_classes], freshly initialised.

    `options` are the fields of `NetOptions`; `shortcut=None` means the net's own default: B for the ImageNet nets and
    the bottleneck nets, A for the other CIFAR nets. Draws from torch's global generator (of the CPU, unless called
    under another default device): seed it first. Raises UserError on an unknown name and on an option that the net
    does not have.

    >>> import torch
    >>> net = build_model("resnet20", 10, shortcut="B")
    >>> net(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    chosen = NetOptions(**options)
    if name in BASELINES:
        _refuse(name, "is torchvision's and takes no options", chosen.chosen())
        return _build_baseline(name, num_classes)
    layout = LAYOUTS.get(name)
    if layout is None:
        raise UserError(f"model.name: there is no net '{name}'; take one of {', '.join(MODEL_NAMES)}")
    _check_options(name, layout, chosen)
    blocks = PREACTIVATION if chosen.activation_order == "pre" else POSTACTIVATION
    resolved = replace(chosen, shortcut=chosen.shortcut or layout.shortcut, **layout.options)
    return replace_batch_norm(layout.family(blocks[layout.block], layout.num_blocks, num_classes, resolved))


def _build_baseline(name: str, num_classes: int) -> nn.Module:
    """With torchvision's initialisation, and keyed dropout in place of torch's.

    The paper's VGG has no batch norm (`_bn` has). GoogLeNet is torchvision's: with batch norm, and here without the
    auxiliary classifiers.
    """
    import torchvision.models  # here, because it brings torch._dynamo, which takes seconds to import

    if name == "googlenet":
        net = torchvision.models.googlenet(num_classes=num_classes, aux_logits=False, init_weights=True)
    else:
        net = getattr(torchvision.models, name)(num_classes=num_classes)
        net.avgpool = AdaptiveAvgPool2d(7)
    return replace_batch_norm(replace_dropout(net))


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """torch's backward pass adds with atomics on CUDA, in any order. Where deterministic algorithms are requested, this
    layer takes the mean of one window after the other. The output is `side` x `side`."""

    def __init__(self, side: int) -> None:
        super().__init__(side)
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda or not torch.are_deterministic_algorithms_enabled():
            return super().forward(x)
        return window_means(x, self.side)


def window_means(x: Tensor, side: int) -> Tensor:
    """[N, C, H, W] -> [N, C, side, side], over the windows of adaptive average pooling."""
    rows, columns = ([slice(i * size // side, -(-(i + 1) * size // side)) for i in range(side)] for size in x.shape[2:])
    means = [torch.stack([x[:, :, row, column].mean((2, 3)) for column in columns], dim=-1) for row in rows]
    return torch.stack(means, dim=-2)


def _check_options(name: str, layout: Layout, options: NetOptions) -> None:
    chosen = options.chosen()
    if layout.shortcut is None:
        residual = ", ".join(other for other, its_layout in LAYOUTS.items() if its_layout.shortcut is not None)
        why, otherwise = "is a plain net without shortcuts", f", or take one of {residual}"
        _refuse(name, why, [key for key in chosen if key in _NEEDS_SHORTCUTS], otherwise)
    if options.shortcut is not None and options.shortcut not in SHORTCUTS:
        raise UserError(
            f"model.shortcut: '{name}' has no option '{options.shortcut}'; take one of {', '.join(SHORTCUTS)}"
        )
    if layout.family is CifarResNet:
        why = "is a CIFAR net, which always has a 3x3 stem and one group of filters"
        _refuse(name, why, chosen.keys() & {"stem", "groups", "base_width"})
    if layout.block != "bottleneck":
        _refuse(name, "has no bottlenecks", chosen.keys() & {"bottleneck_stride", "groups", "base_width"})
    _refuse(name, "says it in its name", chosen.keys() & layout.options.keys())
    if options.activation_order in ("pre", "bn_after_addition"):
        why = "in this activation order has no norm before its sums"
        _refuse(name, why, chosen.keys() & {"zero_init_residual"})
    if options.gate is None:
        _refuse(name, "has no gate (model.gate)", chosen.keys() & {"gate_bias"})


def _refuse(name: str, why: str, keys: Collection[str], otherwise: str = "") -> None:
    if keys:
        listed = " and ".join(f"model.{key}" for key in keys)
        raise UserError(f"{listed}: '{name}' {why}; leave it out{otherwise}")
