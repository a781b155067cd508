"""Nets whose every tensor matters to their logits."""

from __future__ import annotations

import torch
from torch import nn


def randomise(net: nn.Module) -> nn.Module:
    """Values that no initialisation gives, so that a swapped key or an ignored statistic shows."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(0.5 + noise if tensor.ndim == 1 and "bias" not in name else tensor + 0.1 * (noise - 0.5))
    return net.eval()
