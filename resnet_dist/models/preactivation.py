"""The blocks of "Identity Mappings in Deep Residual Networks" (He et al. 2016): batch norm and ReLU come first.

Nothing follows the sum, so the shortcuts of all blocks together are one identity. Where the dimensions grow, shortcut
and residual function share the activated input, and projections have no batch norm, as in the authors' code
(KaimingHe/resnet-1k-layers). A net's first block has no activation of its own: the stem has just done it.
"""

from __future__ import annotations

import torch
from torch import nn

from resnet_dist.models.resnet import NetOptions, ResidualBlock, conv1x1, conv3x3


class PreactivationBlock(ResidualBlock):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.shares_activation = stride > 1 or in_channels != out_channels
        self.preactivation: nn.Module = norm_relu(in_channels)

    def follow_stem(self) -> None:
        self.preactivation = nn.Identity()

    def final_activation(self) -> nn.Module:
        return norm_relu(self.out_channels)

    def residual(self, activated: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = self.preactivation(x)
        return self.join(activated if self.shares_activation else x, self.residual(activated))


class PreactivationSingleBlock(PreactivationBlock):
    """[N, in_channels, H, W] -> [N, channels, H / stride, W / stride]."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, options: NetOptions) -> None:
        super().__init__(in_channels, channels, stride)
        self.conv1 = conv3x3(in_channels, channels, stride, blur=options.blur_pool)
        self.add_shortcut(in_channels, channels, stride, options, norm=False)

    def residual(self, activated: torch.Tensor) -> torch.Tensor:
        return self.conv1(activated)


class PreactivationBasicBlock(PreactivationBlock):
    """[N, in_channels, H, W] -> [N, channels, H / stride, W / stride]."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, options: NetOptions) -> None:
        super().__init__(in_channels, channels, stride)
        self.conv1 = conv3x3(in_channels, channels, stride, blur=options.blur_pool)
        self.norm1 = norm_relu(channels)
        self.conv2 = conv3x3(channels, channels)
        self.add_shortcut(in_channels, channels, stride, options, norm=False)

    def residual(self, activated: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.norm1(self.conv1(activated)))


class PreactivationBottleneck(PreactivationBlock):
    """[N, in_channels, H, W] -> [N, 4 * channels, H / stride, W / stride]."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, options: NetOptions) -> None:
        super().__init__(in_channels, 4 * channels, stride)
        first, second = (stride, 1) if options.bottleneck_stride == "1x1" else (1, stride)
        self.conv1 = conv1x1(in_channels, channels, first, blur=options.blur_pool)
        self.norm1 = norm_relu(channels)
        self.conv2 = conv3x3(channels, channels, second, blur=options.blur_pool)
        self.norm2 = norm_relu(channels)
        self.conv3 = conv1x1(channels, self.out_channels)
        self.add_shortcut(in_channels, self.out_channels, stride, options, norm=False)

    def residual(self, activated: torch.Tensor) -> torch.Tensor:
        out = self.norm1(self.conv1(activated))
        return self.conv3(self.norm2(self.conv2(out)))


def norm_relu(channels: int) -> nn.Sequential:
    # Not in place: the shortcut may need what comes in.
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
