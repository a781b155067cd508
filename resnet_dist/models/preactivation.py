"""The blocks of "Identity Mappings in Deep Residual Networks" (He et al. 2016): batch norm and ReLU come first.

Nothing follows the sum, so the shortcuts of all blocks together are one identity. Projections have no batch norm, as in
the authors' code (KaimingHe/resnet-1k-layers). The first block has no activation at its start: the stem ends with one.
"""

from __future__ import annotations

from torch import Tensor, nn

from resnet_dist.models.resnet import NetOptions, ResidualBlock, conv1x1, conv3x3, inner_width


class PreactivationBlock(ResidualBlock):
    def __init__(self, in_channels: int, channels: int, stride: int, options: NetOptions) -> None:
        super().__init__(in_channels, channels, stride, options)
        self.preactivation: nn.Module = norm_relu(in_channels)

    @staticmethod
    def final_activation(channels: int, options: NetOptions) -> nn.Module:
        return norm_relu(channels)

    def drop_preactivation(self) -> None:
        self.preactivation = nn.Identity()

    def residual(self, activated: Tensor) -> Tensor:
        """The residual function after its first activation."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        activated = self.preactivation(x)
        return self.join(activated if self.shares_activation else x, self.residual(activated))


class PreactivationSingleBlock(PreactivationBlock):
    """[N, in_channels, H, W] -> [N, channels, H/s, W/s]."""

    def __init__(self, in_channels: int, channels: int, stride: int, options: NetOptions) -> None:
        super().__init__(in_channels, channels, stride, options)
        self.conv1 = conv3x3(in_channels, channels, stride, blur=options.blur_pool)
        self.add_shortcut(in_channels, stride, options, norm=False)

    def residual(self, activated: Tensor) -> Tensor:
        return self.conv1(activated)


class PreactivationBasicBlock(PreactivationBlock):
    """[N, in_channels, H, W] -> [N, channels, H/s, W/s]."""

    def __init__(self, in_channels: int, channels: int, stride: int, options: NetOptions) -> None:
        super().__init__(in_channels, channels, stride, options)
        self.conv1 = conv3x3(in_channels, channels, stride, blur=options.blur_pool)
        self.norm1 = norm_relu(channels)
        self.conv2 = conv3x3(channels, channels)
        self.add_shortcut(in_channels, stride, options, norm=False)

    def residual(self, activated: Tensor) -> Tensor:
        return self.conv2(self.norm1(self.conv1(activated)))


class PreactivationBottleneck(PreactivationBlock):
    """[N, in_channels, H, W] -> [N, 4 * channels, H/s, W/s]."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, options: NetOptions) -> None:
        super().__init__(in_channels, channels, stride, options)
        first, second = (stride, 1) if options.bottleneck_stride == "1x1" else (1, stride)
        width = inner_width(channels, options)
        self.conv1 = conv1x1(in_channels, width, first, blur=options.blur_pool)
        self.norm1 = norm_relu(width)
        self.conv2 = conv3x3(width, width, second, groups=options.groups, blur=options.blur_pool)
        self.norm2 = norm_relu(width)
        self.conv3 = conv1x1(width, self.out_channels)
        self.add_shortcut(in_channels, stride, options, norm=False)

    def residual(self, activated: Tensor) -> Tensor:
        out = self.norm1(self.conv1(activated))
        return self.conv3(self.norm2(self.conv2(out)))


def norm_relu(channels: int) -> nn.Sequential:
    # Not in place: the shortcut may need the input.
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
