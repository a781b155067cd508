"""The two building blocks of He et al. 2015, figure 5: one definition each, with any shortcut or, in plain nets, none.

Sub-modules carry torchvision's names (`conv1`, `bn1`, ..., `downsample` for the shortcut): state dicts interchange.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from resnet_dist.models.shortcuts import Shortcut, build_shortcut


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)


class BasicBlock(nn.Module):
    """[N, in_channels, H, W] -> [N, channels, H / stride, W / stride]: two 3x3 convolutions."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, shortcut: Shortcut | None) -> None:
        super().__init__()
        self.out_channels = channels
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = build_shortcut(shortcut, in_channels, channels, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            out += self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """[N, in_channels, H, W] -> [N, 4 * channels, H / stride, W / stride]: 1x1 down, 3x3, 1x1 up.

    The stride is on the 3x3 convolution (torchvision, "v1.5"). The paper has it on the first 1x1, which NVIDIA measured
    about 5 % faster and 0.5 % of top-1 worse in ResNet-50.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, *, shortcut: Shortcut | None) -> None:
        super().__init__()
        self.out_channels = 4 * channels
        self.conv1 = conv1x1(in_channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, self.out_channels)
        self.bn3 = nn.BatchNorm2d(self.out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = build_shortcut(shortcut, in_channels, self.out_channels, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            out += self.downsample(x)
        return self.relu(out)


Block = BasicBlock | Bottleneck
BlockFactory = Callable[[int, int, int], Block]
"""(in_channels, channels, stride) -> block; `channels` is the width of its 3x3 convolutions."""


class Stage(nn.Sequential):
    """The blocks of one map size; the first of them takes the stride and the new width."""

    def __init__(
        self, make_block: BlockFactory, in_channels: int, channels: int, num_blocks: int, *, stride: int
    ) -> None:
        blocks = [make_block(in_channels, channels, stride)]
        while len(blocks) < num_blocks:
            blocks.append(make_block(blocks[-1].out_channels, channels, 1))
        super().__init__(*blocks)
        self.out_channels = blocks[-1].out_channels


def initialise(net: nn.Module, *, zero_init_residual: bool) -> None:
    """He initialisation of the convolutions (fan-out form, as torchvision); batch norms keep gamma = 1 and beta = 0.

    `zero_init_residual` sets the gamma that ends each residual function to 0, so that every block starts as its
    shortcut alone (Goyal et al. 2017, section 5.1).
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif zero_init_residual and isinstance(module, Block):
            nn.init.zeros_(module.last_norm.weight)
