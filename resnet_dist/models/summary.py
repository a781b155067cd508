"""A net as a table: what each part makes of the image, its parameters and multiply-adds. No weights are allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from resnet_dist.models.cifar import CifarResNet
from resnet_dist.models.registry import build_model


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
