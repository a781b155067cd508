"""The net of torchvision or timm that has the same structure as one of this project's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from resnet_dist.errors import UserError
from resnet_dist.models.registry import BASELINES, LAYOUTS, MODEL_NAMES, build_model
from resnet_dist.models.resnet import chosen_options
from resnet_dist.weights.published import Inexpressible, options_of

Keys = Literal["torchvision", "timm", "own"]
"""Whose names the tensors have."""
_ONLY_IN_TRAINING = ("zero_init_residual", "drop_path", "dropout", "shortcut_dropout")
"""Options that change neither the tensors nor a trained net's predictions."""


@dataclass(frozen=True)
class LibraryNet:
    keys: Keys
    call: str
    """Python that makes the net."""
    build: Callable[[], nn.Module]
    """Makes it, with random weights."""


def library_net(model: Mapping[str, Any], keys: Keys | None) -> LibraryNet:
    """The net that takes the weights of `model`, a recipe's section as `build_model` takes it.

    `keys`: whose net; None: the first of torchvision, timm and this project that has it. Raises UserError if the
    library does not.
    """
    for library in (keys,) if keys else ("torchvision", "timm", "own"):
        found = {"torchvision": _in_torchvision, "timm": _in_timm, "own": _own}[library](model)
        if found is not None:
            return found
    raise UserError(
        f"--keys {keys}: {keys} has no net with the structure of model.name: {model['name']} and its options; use "
        "--keys own, or leave it out"
    )


def _own(model: Mapping[str, Any]) -> LibraryNet:
    changed = chosen_options(model)
    arguments = "".join(f", {key}={value!r}" for key, value in changed.items())
    call = f"resnet_dist.models.build_model({model['name']!r}, {model['num_classes']}{arguments})"
    return LibraryNet("own", call, partial(build_model, **model))


def _in_torchvision(model: Mapping[str, Any]) -> LibraryNet | None:
    import torchvision.models  # here, because it takes seconds

    wanted, num_classes = _structure(model), model["num_classes"]
    for name in torchvision.models.list_models(torchvision.models):
        if name in MODEL_NAMES and _structure({"name": name}) == wanted:
            extra = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
            more = "".join(f", {key}={value}" for key, value in extra.items())
            call = f"torchvision.models.{name}(num_classes={num_classes}{more})"
            build = getattr(torchvision.models, name)
            return LibraryNet("torchvision", call, partial(build, num_classes=num_classes, **extra))
    return None


def _in_timm(model: Mapping[str, Any]) -> LibraryNet | None:
    import timm

    wanted, num_classes, depth = _structure(model), model["num_classes"], _depth(model["name"])
    names = [*timm.list_models(module="resnet"), *timm.list_models(module="vgg")]
    for name in sorted(names, key=len):
        if _depth(name) != depth:  # making a net takes a tenth of a second
            continue
        try:
            with torch.device("meta"):
                theirs = options_of(timm.create_model(name, num_classes=num_classes), name, num_classes)
        except Inexpressible:
            continue
        if _structure(theirs) == wanted:
            call = f"timm.create_model({name!r}, num_classes={num_classes})"
            return LibraryNet("timm", call, partial(timm.create_model, name, num_classes=num_classes))
    return None


def _structure(model: Mapping[str, Any]) -> tuple[Any, ...]:
    """Equal for nets that are the same but for their names here: `resnet101` with groups, `resnext101_32x8d`."""
    name = model["name"]
    if name in BASELINES:
        return (name,)
    layout, chosen = LAYOUTS[name], chosen_options(model)
    options = {"shortcut": layout.shortcut, **layout.options, **chosen}
    options = {key: value for key, value in options.items() if key not in _ONLY_IN_TRAINING}
    return layout.family, layout.block, layout.num_blocks, tuple(sorted(options.items()))


def _depth(name: str) -> str:
    """The first number in it."""
    found = re.search(r"\d+", name)
    return found[0] if found else ""
