"""The optimizer, and which parameters it decays."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from resnet_dist.config.recipe_optim import OptimConfig

DECAYED_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def parameter_groups(
    model: nn.Module, weight_decay: float, decay: Literal["weights", "all"] = "weights"
) -> list[dict[str, Any]]:
    """Two groups: the weights of convolutions and linear layers, decayed; biases and batch norms, not or (`all`) too.

    Chosen by the type of the module, because names mislead (`downsample.1` is a norm). Parameters stand in the order of
    `model.modules()`, so optimizer states are interchangeable between processes.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_weight = name == "weight" and isinstance(module, DECAYED_MODULES)
            (decayed if is_weight else undecayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": undecayed, "weight_decay": weight_decay if decay == "all" else 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD as torch defines it: v = momentum * v + g, w = w - lr * v, with weight decay added to g (coupled L2); or
    timm's LAMB. Gradients are clipped before either (`update.py`), so LAMB's own clipping is off.

    The learning rate is `config.lr` until `Update` writes `lr_at(step)` into the groups.
    """
    groups = parameter_groups(model, config.weight_decay, config.decay)
    if config.name == "lamb":
        from timm.optim.lamb import Lamb  # here, because timm takes seconds to import

        return Lamb(groups, lr=config.lr, max_grad_norm=None)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
