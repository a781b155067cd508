"""The stages of a net by name, `stem`, `layer1` .. `layerN`, `head`, and the one that a parameter belongs to."""

from __future__ import annotations

from torch import nn


def stages_of(net: nn.Module) -> tuple[str, ...]:
    """The stages of a net of the registry, in forward order. The head is the one layer that gives the logits.

    ResNets and plain nets: `layer1` .. are torchvision's, and the norm at the end of a pre-activation net belongs to
    the last of them. GoogLeNet: `layer1` to `layer3` are the inception modules 3a to 5b, by map size. VGG has no stem:
    `layer1` to `layer5` are the convolutions by map size, `layer6` its two hidden linear layers.

    >>> from resnet_dist.models import build_model
    >>> stages_of(build_model("resnet20", 10))
    ('stem', 'layer1', 'layer2', 'layer3', 'head')
    """
    return tuple(dict.fromkeys(_stage_by_part(net).values()))


def stage_of(net: nn.Module, name: str) -> str:
    """The stage of the parameter, buffer or module `name` of `net`. KeyError if the net has no such part.

    >>> from resnet_dist.models import build_model
    >>> stage_of(build_model("resnet20", 10), "layer3.0.conv1.weight")
    'layer3'
    """
    by_part, (outer, *inner) = _stage_by_part(net), name.split(".")
    return by_part[outer] if outer in by_part else by_part[f"{outer}.{inner[0] if inner else ''}"]


def _stage_by_part(net: nn.Module) -> dict[str, str]:
    """By the names of the net's children in forward order; in VGG of those of its `features` and `classifier`."""
    if isinstance(features := getattr(net, "features", None), nn.Sequential):
        return _of_vgg(features, len(net.classifier))  # type: ignore[arg-type]
    stages, stage = {}, "stem"
    for name, _ in net.named_children():
        if name.startswith("layer"):
            stage = name
        elif name.startswith("inception"):
            stage = f"layer{int(name.removeprefix('inception')[0]) - 2}"
        elif name == "avgpool":
            stage = "head"
        stages[name] = stage
    return stages


def _of_vgg(features: nn.Sequential, num_linear_parts: int) -> dict[str, str]:
    stages, layer = {}, 1
    for name, part in features.named_children():
        stages[f"features.{name}"] = f"layer{layer}"
        layer += isinstance(part, nn.MaxPool2d)
    hidden = {f"classifier.{index}": f"layer{layer}" for index in range(num_linear_parts - 1)}
    return stages | hidden | {f"classifier.{num_linear_parts - 1}": "head"}
