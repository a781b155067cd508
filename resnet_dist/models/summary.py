"""What is in a net, part by part: parameters, multiply-adds, activations. And how many kernels it is on a GPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from resnet_dist.models.keyed_noise import KeyedModule
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
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of its parameters."""


@dataclass(frozen=True)
class Summary:
    """A net at one image size. Its sums mean what they mean for a part."""

    parts: tuple[Part, ...]
    """In forward order."""
    kernels: int
    """Operations of a forward pass in evaluation mode, views left out: on a GPU, a kernel each."""
    convolutions: int
    """Those of them that are convolutions and linear layers."""
    norms: int
    """Those of them that are batch norms."""
    random_layers: int
    """Drop-paths and dropouts, which do nothing in evaluation mode."""

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
    def parameter_tensors(self) -> int:
        return sum(len(part.shapes) for part in self.parts)


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
    activations: dict[str, list[int]] = {name: [] for name, _ in net.named_children()}
    for part_name, part in net.named_children():
        part.register_forward_hook(lambda _part, _inputs, out, key=part_name: outputs.__setitem__(key, out))
        for layer in (m for m in part.modules() if isinstance(m, nn.Conv2d | nn.Linear)):
            layer.register_forward_hook(
                lambda _layer, _inputs, out, key=part_name: activations[key].append(out.numel())
            )
    with KernelCounter() as kernels, FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.empty(1, 3, side, side, device="meta"))
    flops = counter.get_flop_counts()
    root = type(net).__name__
    return Summary(
        parts=tuple(
            Part(
                part_name,
                " x ".join(map(str, outputs[part_name].shape[1:])),
                _contents(part),
                sum(p.numel() for p in part.parameters()),
                sum(flops.get(f"{root}.{part_name}", {}).values()) // 2,
                sum(activations[part_name]),
                tuple(tuple(p.shape) for p in part.parameters()),
            )
            for part_name, part in net.named_children()
            if part_name in outputs and not isinstance(part, nn.Identity | nn.ReLU)
        ),
        kernels=kernels.total,
        convolutions=sum(map(len, activations.values())),
        norms=kernels.calls["_native_batch_norm_legit_no_training"],
        random_layers=sum(isinstance(module, KeyedModule) for module in net.modules()),
    )


class KernelCounter(TorchDispatchMode):
    """Counts, on any device, what a GPU runs a kernel for: operations that neither give a view nor only allocate.

    The backward pass of a convolution is as many as the gradients it gives.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        """By the operation's name, such as `convolution`."""

    @property
    def total(self) -> int:
        return self.calls.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not func.is_view and not name.startswith(("empty", "new_empty", "as_strided")):
            # The last argument of `convolution_backward` says which gradients are wanted.
            self.calls[name] += sum(args[-1]) if name == "convolution_backward" else 1
        return func(*args, **(kwargs or {}))


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
        return f"{len(part)} x {type(block).__name__} [{', '.join(map(_convolution, convolutions))}]"
    return type(part).__name__


def _convolution(conv: nn.Conv2d) -> str:
    groups = f" in {conv.groups} groups" if conv.groups > 1 else ""
    return f"{conv.kernel_size[0]}x{conv.kernel_size[1]} {conv.out_channels}{groups}"
