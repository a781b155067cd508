"""The nets by name, and `build_model`, which turns a name and its options into a module.

A net is a row of data: family, block, blocks per stage, and the shortcut it takes when the recipe says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from resnet_dist.errors import UserError
from resnet_dist.models.cifar import CifarResNet
from resnet_dist.models.keyed_noise import replace_dropout
from resnet_dist.models.preactivation import PreactivationBasicBlock, PreactivationBottleneck, PreactivationSingleBlock
from resnet_dist.models.resnet import (
    SHORTCUTS,
    BasicBlock,
    BlockFactory,
    Bottleneck,
    ImageNetResNet,
    NetOptions,
    Shortcut,
    SingleBlock,
    initialise,
    spread_drop_path,
)

BlockKind = Literal["single", "basic", "bottleneck"]
POSTACTIVATION: dict[BlockKind, Any] = {"single": SingleBlock, "basic": BasicBlock, "bottleneck": Bottleneck}
PREACTIVATION: dict[BlockKind, Any] = {
    "single": PreactivationSingleBlock,
    "basic": PreactivationBasicBlock,
    "bottleneck": PreactivationBottleneck,
}
LAYERS_PER_BLOCK: dict[BlockKind, int] = {"single": 1, "basic": 2, "bottleneck": 3}


@dataclass(frozen=True)
class Layout:
    """One net of the paper. `shortcut` is its default option; None makes it a plain net."""

    family: type[ImageNetResNet] | type[CifarResNet]
    block: BlockKind
    num_blocks: tuple[int, ...]
    shortcut: Shortcut | None


def _cifar(depth: int, block: BlockKind, shortcut: Shortcut | None) -> Layout:
    layers_per_n = 3 * LAYERS_PER_BLOCK[block]
    n, remainder = divmod(depth - 2, layers_per_n)
    assert remainder == 0, f"a CIFAR net of {block} blocks has {layers_per_n}n + 2 layers, not {depth}"
    return Layout(CifarResNet, block, (n, n, n), shortcut)


LAYOUTS: dict[str, Layout] = {
    "resnet18": Layout(ImageNetResNet, "basic", (2, 2, 2, 2), "B"),
    "resnet34": Layout(ImageNetResNet, "basic", (3, 4, 6, 3), "B"),
    "resnet50": Layout(ImageNetResNet, "bottleneck", (3, 4, 6, 3), "B"),
    "resnet101": Layout(ImageNetResNet, "bottleneck", (3, 4, 23, 3), "B"),
    "resnet152": Layout(ImageNetResNet, "bottleneck", (3, 8, 36, 3), "B"),
    "resnet200": Layout(ImageNetResNet, "bottleneck", (3, 24, 36, 3), "B"),
    "plain18": Layout(ImageNetResNet, "basic", (2, 2, 2, 2), None),
    "plain34": Layout(ImageNetResNet, "basic", (3, 4, 6, 3), None),
    **{f"resnet{depth}": _cifar(depth, "basic", "A") for depth in (8, 20, 32, 44, 56, 110, 1202)},
    **{f"resnet{depth}": _cifar(depth, "bottleneck", "B") for depth in (164, 1001)},
    "resnet110_1layer": _cifar(110, "single", "A"),
    **{f"plain{depth}": _cifar(depth, "basic", None) for depth in (8, 20, 32, 44, 56, 110, 1202)},
}
BASELINES = ("vgg16", "vgg19", "googlenet")
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
    """
    chosen = NetOptions(**options)
    if name in BASELINES:
        _refuse(name, "is torchvision's and takes no options", tuple(chosen.chosen()))
        return build_baseline(name, num_classes)
    layout = LAYOUTS.get(name)
    if layout is None:
        raise UserError(f"model.name: there is no net '{name}'; take one of {', '.join(MODEL_NAMES)}")
    _check_options(name, layout, chosen)
    resolved = chosen.with_shortcut(chosen.shortcut or layout.shortcut)
    blocks = PREACTIVATION if resolved.activation_order == "pre" else POSTACTIVATION
    make_block: BlockFactory = partial(blocks[layout.block], options=resolved)
    net = layout.family(make_block, layout.num_blocks, num_classes, resolved)
    initialise(net, zero_init_residual=resolved.zero_init_residual, gate_bias=resolved.gate_bias)
    spread_drop_path(net)
    return net


def _check_options(name: str, layout: Layout, options: NetOptions) -> None:
    chosen = options.chosen()
    if layout.shortcut is None:
        given = tuple(key for key in chosen if key in _NEEDS_SHORTCUTS)
        residual = ", ".join(other for other, its_layout in LAYOUTS.items() if its_layout.shortcut is not None)
        _refuse(name, "is a plain net without shortcuts", given, f", or take one of {residual}")
    if options.shortcut is not None and options.shortcut not in SHORTCUTS:
        raise UserError(
            f"model.shortcut: '{name}' has no option '{options.shortcut}'; take one of {', '.join(SHORTCUTS)}"
        )
    if layout.family is CifarResNet:
        _refuse(name, "is a CIFAR net with a 3x3 stem of its own", _among(chosen, "stem"))
    if layout.block != "bottleneck":
        _refuse(name, "has no bottlenecks", _among(chosen, "bottleneck_stride"))
    if options.activation_order in ("pre", "bn_after_addition"):
        _refuse(name, "in this activation order has no norm before its sums", _among(chosen, "zero_init_residual"))
    if options.gate is None:
        _refuse(name, "has no gate (model.gate)", _among(chosen, "gate_bias"))


def _among(chosen: dict[str, Any], *keys: str) -> tuple[str, ...]:
    return tuple(key for key in keys if key in chosen)


def _refuse(name: str, why: str, keys: tuple[str, ...], otherwise: str = "") -> None:
    if keys:
        listed = " and ".join(f"model.{key}" for key in keys)
        raise UserError(f"{listed}: '{name}' {why}; leave it out{otherwise}")


# The nets that the paper compares with, from torchvision.


def build_baseline(name: str, num_classes: int) -> nn.Module:
    """[N, 3, H, W] -> logits, with torchvision's initialisation and keyed dropout.

    VGG has no batch norm. GoogLeNet is torchvision's: with batch norm, and here without the auxiliary classifiers.
    """
    import torchvision.models  # here, because it brings torch._dynamo, which takes seconds to import

    if name == "googlenet":
        net = torchvision.models.googlenet(num_classes=num_classes, aux_logits=False, init_weights=True)
    else:
        net = getattr(torchvision.models, name)(num_classes=num_classes)
    return replace_dropout(net)


# A net as a table: what each part makes of the image, its parameters and multiply-adds. No weights are allocated.


@dataclass(frozen=True)
class Part:
    name: str
    output: str
    """Channels x height x width, or the number of logits."""
    contents: str
    parameters: int
    macs: int
    activations: int
    """Numbers that its convolutions and linear layers put out for one image."""
    layers: int
    """Calls of modules without children, an activation used three times thrice: what the host starts one by one."""
    shapes: tuple[tuple[int, ...], ...]
    """Of its parameters."""


@dataclass(frozen=True)
class Summary:
    parts: tuple[Part, ...]

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def macs(self) -> int:
        """Multiply-adds of convolutions and linear layers for one image."""
        return sum(part.macs for part in self.parts)


def own_size(net: nn.Module) -> int:
    """The side of the images that the net was made for, px."""
    return 32 if isinstance(net, CifarResNet) else 224


def summarise(name: str, num_classes: int | None = None, *, side: int | None = None, **options: Any) -> Summary:
    """The parts of the net in forward order, for one image of `side` px; by default the classes and size of the paper.

    Raises UserError as `build_model` does.
    """
    with torch.device("meta"):
        probe = build_model(name, 1, **options)
        classes = num_classes or (10 if isinstance(probe, CifarResNet) else 1000)
        net = build_model(name, classes, **options).eval()
    pixels = side or own_size(net)
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
        net(torch.empty(1, 3, pixels, pixels, device="meta"))
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
