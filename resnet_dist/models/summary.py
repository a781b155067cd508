"""What is in a net, part by part: parameters, multiply-adds, activations, layers. No weights are allocated."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from resnet_dist.models.registry import LAYOUTS, build_model
from resnet_dist.models.resnet import CifarResNet


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
