"""The nets by name, and `build_model`, which turns a name and its options into a module.

A net is a row of data: family, block, blocks per stage, and the shortcut it takes when the recipe says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import nn

from resnet_dist.errors import UserError
from resnet_dist.models.blocks import BasicBlock, Bottleneck, initialise
from resnet_dist.models.cifar import CifarResNet
from resnet_dist.models.imagenet import ImageNetResNet
from resnet_dist.models.shortcuts import SHORTCUTS, Shortcut


@dataclass(frozen=True)
class Layout:
    """One net of the paper. `shortcut` is its default option; None makes it a plain net."""

    family: type[ImageNetResNet] | type[CifarResNet]
    block: type[BasicBlock] | type[Bottleneck]
    num_blocks: tuple[int, ...]
    shortcut: Shortcut | None


def _cifar(depth: int, shortcut: Shortcut | None) -> Layout:
    n, remainder = divmod(depth - 2, 6)
    assert remainder == 0, f"a CIFAR net has 6n + 2 layers, not {depth}"
    return Layout(CifarResNet, BasicBlock, (n, n, n), shortcut)


LAYOUTS: dict[str, Layout] = {
    "resnet18": Layout(ImageNetResNet, BasicBlock, (2, 2, 2, 2), "B"),
    "resnet34": Layout(ImageNetResNet, BasicBlock, (3, 4, 6, 3), "B"),
    "resnet50": Layout(ImageNetResNet, Bottleneck, (3, 4, 6, 3), "B"),
    "resnet101": Layout(ImageNetResNet, Bottleneck, (3, 4, 23, 3), "B"),
    "resnet152": Layout(ImageNetResNet, Bottleneck, (3, 8, 36, 3), "B"),
    "plain18": Layout(ImageNetResNet, BasicBlock, (2, 2, 2, 2), None),
    "plain34": Layout(ImageNetResNet, BasicBlock, (3, 4, 6, 3), None),
    **{f"resnet{depth}": _cifar(depth, "A") for depth in (8, 20, 32, 44, 56, 110, 1202)},
    **{f"plain{depth}": _cifar(depth, None) for depth in (8, 20, 32, 44, 56, 110)},
}
MODEL_NAMES: tuple[str, ...] = tuple(LAYOUTS)


def build_model(
    name: str, num_classes: int, *, zero_init_residual: bool = False, shortcut: Shortcut | None = None
) -> nn.Module:
    """The net called `name`, float32 [N, 3, H, W] -> logits [N, num_classes], freshly initialised.

    Draws from torch's global generator (of the CPU, unless called under another default device): seed it first.
    `shortcut=None` means the net's own default: B for the ImageNet nets, A for the CIFAR nets. Raises UserError on an
    unknown name and on an option that the net does not have.
    """
    layout = LAYOUTS.get(name)
    if layout is None:
        raise UserError(f"model.name: there is no net '{name}'; take one of {', '.join(MODEL_NAMES)}")
    _check_options(name, layout, zero_init_residual=zero_init_residual, shortcut=shortcut)
    make_block = partial(layout.block, shortcut=shortcut or layout.shortcut)
    net = layout.family(make_block, layout.num_blocks, num_classes)
    initialise(net, zero_init_residual=zero_init_residual)
    return net


def _check_options(name: str, layout: Layout, *, zero_init_residual: bool, shortcut: str | None) -> None:
    given = {"model.shortcut": shortcut is not None, "model.zero_init_residual": zero_init_residual}
    if layout.shortcut is None and any(given.values()):
        options = " and ".join(key for key, is_given in given.items() if is_given)
        residual = ", ".join(other for other, its_layout in LAYOUTS.items() if its_layout.shortcut is not None)
        raise UserError(
            f"{options}: '{name}' is a plain net without shortcuts; leave it out, or take one of {residual}"
        )
    if shortcut is not None and shortcut not in SHORTCUTS:
        raise UserError(f"model.shortcut: '{name}' has no option '{shortcut}'; take one of {', '.join(SHORTCUTS)}")
