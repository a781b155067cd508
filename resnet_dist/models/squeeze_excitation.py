"""Squeeze-and-excitation (Hu et al. 2017): every channel is weighted by what the whole map holds."""

from __future__ import annotations

import torch
from torch import nn


class SqueezeExcitation(nn.Module):
    """[N, channels, H, W] -> the same shape. The narrow layer has `ratio * channels` units, rounded to a multiple of 8.

    Keys `fc1` and `fc2`, two 1x1 convolutions with biases, as in timm.
    """

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        width = max(8, round(channels * ratio / 8) * 8)
        self.fc1 = nn.Conv2d(channels, width, kernel_size=1)
        self.fc2 = nn.Conv2d(width, channels, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x * weights
