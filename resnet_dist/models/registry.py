"""The nets by name, and `build_model`, which turns a name and its options into a module.

A net is a row of data: family, block, blocks per stage, and the shortcut it takes when the recipe says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import nn

from resnet_dist.errors import UserError
from resnet_dist.models.baselines import BASELINES, build_baseline
from resnet_dist.models.blocks import BasicBlock, Bottleneck, SingleBlock
from resnet_dist.models.cifar import CifarResNet
from resnet_dist.models.imagenet import ImageNetResNet
from resnet_dist.models.options import NetOptions
from resnet_dist.models.preactivation import PreactivationBasicBlock, PreactivationBottleneck, PreactivationSingleBlock
from resnet_dist.models.shortcuts import SHORTCUTS, Shortcut
from resnet_dist.models.stages import BlockFactory, initialise, spread_drop_path

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
