"""The nets by name: `build_model` makes one from a name and options, `summarise` counts what is in it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from resnet_dist.errors import UserError
from resnet_dist.models.keyed_noise import KeyedDropout, replace_dropout
from resnet_dist.models.preactivation import PreactivationBasicBlock, PreactivationBottleneck, PreactivationSingleBlock
from resnet_dist.models.resnet import (
    SHORTCUTS,
    BasicBlock,
    Bottleneck,
    NetOptions,
    ResidualBlock,
    ResNet,
    Shortcut,
    SingleBlock,
    Stage,
    conv3x3,
    init_weights,
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


class CifarResNet(nn.Module):
    """[N, 3, H, W] -> logits [N, num_classes]; made for 32 px. Arguments as `ResNet`, with three stages.

    The CIFAR nets of He et al. 2015, section 4.2: 6n + 2 layers in three stages of 32, 16 and 8 px, 16 to 64 filters.
    With bottlenecks (He et al. 2016) 9n + 2 layers, and four times as many filters at the end of each block.
    """

    def __init__(
        self, block: type[ResidualBlock], num_blocks: tuple[int, ...], num_classes: int, options: NetOptions
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = Stage(block, 16, 16, num_blocks[0], options, stride=1, after_stem=True)
        self.layer2 = Stage(block, self.layer1.out_channels, 32, num_blocks[1], options, stride=2)
        self.layer3 = Stage(block, self.layer2.out_channels, 64, num_blocks[2], options, stride=2)
        self.end = block.final_activation(self.layer3.out_channels, options)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = KeyedDropout(options.dropout) if options.dropout else nn.Identity()
        self.fc = nn.Linear(self.layer3.out_channels, num_classes)
        init_weights(self, options)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.end(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.dropout(self.avgpool(x).flatten(1)))


@dataclass(frozen=True)
class Layout:
    """One net of the papers, as a row of data."""

    family: type[ResNet] | type[CifarResNet]
    block: BlockKind
    num_blocks: tuple[int, ...]
    """Number of blocks in each stage."""
    shortcut: Shortcut | None
    """The default of the net's option; None makes it a plain net."""


def _cifar(depth: int, block: BlockKind, shortcut: Shortcut | None) -> Layout:
    layers_per_n = 3 * LAYERS_PER_BLOCK[block]
    n, remainder = divmod(depth - 2, layers_per_n)
    assert remainder == 0, f"a CIFAR net of {block} blocks has {layers_per_n}n + 2 layers, not {depth}"
    return Layout(CifarResNet, block, (n, n, n), shortcut)


LAYOUTS: dict[str, Layout] = {
    "resnet18": Layout(ResNet, "basic", (2, 2, 2, 2), "B"),
    "resnet34": Layout(ResNet, "basic", (3, 4, 6, 3), "B"),
    "resnet50": Layout(ResNet, "bottleneck", (3, 4, 6, 3), "B"),
    "resnet101": Layout(ResNet, "bottleneck", (3, 4, 23, 3), "B"),
    "resnet152": Layout(ResNet, "bottleneck", (3, 8, 36, 3), "B"),
    "resnet200": Layout(ResNet, "bottleneck", (3, 24, 36, 3), "B"),
    "plain18": Layout(ResNet, "basic", (2, 2, 2, 2), None),
    "plain34": Layout(ResNet, "basic", (3, 4, 6, 3), None),
    **{f"resnet{depth}": _cifar(depth, "basic", "A") for depth in (8, 20, 32, 44, 56, 110, 1202)},
    **{f"resnet{depth}": _cifar(depth, "bottleneck", "B") for depth in (164, 1001)},
    "resnet110_1layer": _cifar(110, "single", "A"),
    **{f"plain{depth}": _cifar(depth, "basic", None) for depth in (8, 20, 32, 44, 56, 110, 1202)},
}
BASELINES = ("vgg16", "vgg19", "googlenet")
"""The nets that the paper compares with, from torchvision."""
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
    resolved = replace(chosen, shortcut=chosen.shortcut or layout.shortcut)
    return layout.family(blocks[layout.block], layout.num_blocks, num_classes, resolved)


def _build_baseline(name: str, num_classes: int) -> nn.Module:
    """With torchvision's initialisation, and keyed dropout in place of torch's.

    VGG has no batch norm. GoogLeNet is torchvision's: with batch norm, and here without the auxiliary classifiers.
    """
    import torchvision.models  # here, because it brings torch._dynamo, which takes seconds to import

    if name == "googlenet":
        net = torchvision.models.googlenet(num_classes=num_classes, aux_logits=False, init_weights=True)
    else:
        net = getattr(torchvision.models, name)(num_classes=num_classes)
    return replace_dropout(net)


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
        _refuse(name, "is a CIFAR net, which always has a 3x3 stem", chosen.keys() & {"stem"})
    if layout.block != "bottleneck":
        _refuse(name, "has no bottlenecks", chosen.keys() & {"bottleneck_stride"})
    if options.activation_order in ("pre", "bn_after_addition"):
        why = "in this activation order has no norm before its sums"
        _refuse(name, why, chosen.keys() & {"zero_init_residual"})
    if options.gate is None:
        _refuse(name, "has no gate (model.gate)", chosen.keys() & {"gate_bias"})


def _refuse(name: str, why: str, keys: Collection[str], otherwise: str = "") -> None:
    if keys:
        listed = " and ".join(f"model.{key}" for key in keys)
        raise UserError(f"{listed}: '{name}' {why}; leave it out{otherwise}")


@dataclass(frozen=True)
class Part:
    """A child of the net: stem convolution, stage, classifier, ..."""

    name: str
    output: str
    """Channels x height x width, or the number of logits."""
    contents: str
    parameters: int
    macs: int
    """Multiply-adds of convolutions and linear layers, for one image."""
    activations: int
    """Numbers in the outputs of its convolutions and linear layers, for one image."""
    layers: int
    """Calls of modules without children (a ReLU used three times counts three): what the host starts one by one."""
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of its parameters."""


@dataclass(frozen=True)
class Summary:
    """A net at one image size. Its sums mean what they mean for a part."""

    parts: tuple[Part, ...]
    """In forward order."""

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def macs(self) -> int:
        return sum(part.macs for part in self.parts)

    @property
    def activations(self) -> int:
        return sum(part.activations for part in self.parts)

    @property
    def layers(self) -> int:
        return sum(part.layers for part in self.parts)


@cache
def summarise(name: str, num_classes: int | None = None, *, side: int | None = None, **options: Any) -> Summary:
    """The parts of the net in forward order, for one image of `side` px; no weights are allocated.

    By default the classes and the image size are the paper's: 1000 and 224 px, or 10 and 32 px for the CIFAR nets.
    Raises UserError as `build_model` does.

    >>> summarise("resnet152").parameters
    60192808
    """
    of_cifar = name in LAYOUTS and LAYOUTS[name].family is CifarResNet
    with torch.device("meta"):
        net = build_model(name, num_classes or (10 if of_cifar else 1000), **options).eval()
    side = side or (32 if of_cifar else 224)
    outputs: dict[str, Tensor] = {}
    calls: dict[str, list[int]] = {name: [] for name, _ in net.named_children()}
    for part_name, part in net.named_children():
        part.register_forward_hook(lambda _part, _inputs, out, key=part_name: outputs.__setitem__(key, out))
        for layer in (m for m in part.modules() if not list(m.children())):
            layer.register_forward_hook(
                lambda layer, _inputs, out, key=part_name: calls[key].append(
                    out.numel() if isinstance(layer, nn.Conv2d | nn.Linear) else 0
                )
            )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.empty(1, 3, side, side, device="meta"))
    flops = counter.get_flop_counts()
    root = type(net).__name__
    return Summary(
        tuple(
            Part(
                part_name,
                " x ".join(map(str, outputs[part_name].shape[1:])),
                _contents(part),
                sum(p.numel() for p in part.parameters()),
                sum(flops.get(f"{root}.{part_name}", {}).values()) // 2,
                sum(calls[part_name]),
                len(calls[part_name]),
                tuple(tuple(p.shape) for p in part.parameters()),
            )
            for part_name, part in net.named_children()
            if part_name in outputs and not isinstance(part, nn.Identity | nn.ReLU)
        )
    )


def _contents(part: nn.Module) -> str:
    if isinstance(part, nn.Conv2d):
        return f"{part.kernel_size[0]}x{part.kernel_size[1]}, {part.out_channels}, stride {part.stride[0]}"
    if isinstance(part, nn.Linear):
        return f"{part.in_features} -> {part.out_features}"
    if isinstance(part, nn.Sequential) and len(part) and not list(part[0].children()):
        return ", ".join(type(layer).__name__ for layer in part)
    if isinstance(part, nn.Sequential) and len(part):
        block = part[-1]
        convolutions = [m for name, m in block.named_children() if isinstance(m, nn.Conv2d) and name != "gate"]
        inside = ", ".join(f"{conv.kernel_size[0]}x{conv.kernel_size[1]} {conv.out_channels}" for conv in convolutions)
        return f"{len(part)} x {type(block).__name__} [{inside}]"
    return type(part).__name__
