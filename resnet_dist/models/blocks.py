"""The two building blocks of He et al. 2015, figure 5: one definition each, with any shortcut or, in plain nets, none.

Sub-modules carry torchvision's names (`conv1`, `bn1`, ..., `downsample` for the shortcut): state dicts interchange.
"""

from __future__ import annotations

import torch
from torch import nn

from resnet_dist.models.convolutions import conv1x1, conv3x3
from resnet_dist.models.options import NetOptions
from resnet_dist.models.residual import ResidualBlock


class BasicBlock(ResidualBlock):
    """[N, in_channels, H, W] -> [N, channels, H / stride, W / stride]: two 3x3 convolutions."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, options: NetOptions) -> None:
        super().__init__()
        self.out_channels = channels
        self.conv1 = conv3x3(in_channels, channels, stride, blur=options.blur_pool)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.add_shortcut(in_channels, channels, stride, options)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(self.join(x, out))


class Bottleneck(ResidualBlock):
    """[N, in_channels, H, W] -> [N, 4 * channels, H / stride, W / stride]: 1x1 down, 3x3, 1x1 up.

    The stride is on the 3x3 convolution (torchvision, "v1.5") or, as in the paper, on the first 1x1, which NVIDIA
    measured about 5 % faster and 0.5 % of top-1 worse in ResNet-50.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, *, options: NetOptions) -> None:
        super().__init__()
        first, second = (stride, 1) if options.bottleneck_stride == "1x1" else (1, stride)
        self.out_channels = 4 * channels
        self.conv1 = conv1x1(in_channels, channels, first, blur=options.blur_pool)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, second, blur=options.blur_pool)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, self.out_channels)
        self.bn3 = nn.BatchNorm2d(self.out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.add_shortcut(in_channels, self.out_channels, stride, options)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(self.join(x, out))
