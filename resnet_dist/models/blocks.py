"""The building blocks of He et al. 2015, figure 5: one definition each, with any shortcut or, in plain nets, none.

Sub-modules carry torchvision's names (`conv1`, `bn1`, ..., `downsample` for the shortcut): state dicts interchange.
"""

from __future__ import annotations

from torch import Tensor, nn

from resnet_dist.models.convolutions import conv1x1, conv3x3
from resnet_dist.models.options import NetOptions
from resnet_dist.models.residual import ResidualBlock


class PostactivationBlock(ResidualBlock):
    """Each convolution is followed by a batch norm, all but the last of which by a ReLU.

    Where that last norm and the ReLU that is left stand beside the sum is `model.activation_order`: as in the paper, or
    one of the orders that He et al. 2016 tried (figure 4, a to d).
    """

    relu: nn.ReLU

    def __init__(self, in_channels: int, out_channels: int, stride: int, options: NetOptions) -> None:
        super().__init__()
        self.order = options.activation_order
        self.out_channels = out_channels
        if self.order == "relu_only_pre":
            self.preactivation = nn.ReLU()  # not in place: the shortcut may take what comes in
            # He et al. 2016, appendix: projections are with pre-activation too.
            self.shares_activation = stride > 1 or in_channels != out_channels

    def final_activation(self) -> nn.Module:
        return nn.ReLU(inplace=True) if self.order == "relu_only_pre" else nn.Identity()

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        raise NotImplementedError

    def convolved(self, x: Tensor) -> Tensor:
        """What the last convolution makes of the block's input."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "bn_after_addition":
            return self.relu(self.last_norm(self.join(x, self.convolved(x))))
        if self.order == "relu_before_addition":
            # The sum is taken in place, and a ReLU's gradient needs what it put out.
            return self.join(x, self.relu(self.last_norm(self.convolved(x))).clone())
        if self.order == "relu_only_pre":
            activated = self.preactivation(x)
            return self.join(activated if self.shares_activation else x, self.last_norm(self.convolved(activated)))
        return self.relu(self.join(x, self.last_norm(self.convolved(x))))


class SingleBlock(PostactivationBlock):
    """[N, in_channels, H, W] -> [N, channels, H / stride, W / stride]: one 3x3 convolution (of He et al. 2016)."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, options: NetOptions) -> None:
        super().__init__(in_channels, channels, stride, options)
        self.conv1 = conv3x3(in_channels, channels, stride, blur=options.blur_pool)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.add_shortcut(in_channels, channels, stride, options)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn1

    def convolved(self, x: Tensor) -> Tensor:
        return self.conv1(x)


class BasicBlock(PostactivationBlock):
    """[N, in_channels, H, W] -> [N, channels, H / stride, W / stride]: two 3x3 convolutions."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, options: NetOptions) -> None:
        super().__init__(in_channels, channels, stride, options)
        self.conv1 = conv3x3(in_channels, channels, stride, blur=options.blur_pool)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.add_shortcut(in_channels, channels, stride, options)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn2

    def convolved(self, x: Tensor) -> Tensor:
        return self.conv2(self.relu(self.bn1(self.conv1(x))))


class Bottleneck(PostactivationBlock):
    """[N, in_channels, H, W] -> [N, 4 * channels, H / stride, W / stride]: 1x1 down, 3x3, 1x1 up.

    The stride is on the 3x3 convolution (torchvision, "v1.5") or, as in the paper, on the first 1x1, which NVIDIA
    measured about 5 % faster and 0.5 % of top-1 worse in ResNet-50.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, *, options: NetOptions) -> None:
        super().__init__(in_channels, 4 * channels, stride, options)
        first, second = (stride, 1) if options.bottleneck_stride == "1x1" else (1, stride)
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

    def convolved(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.conv3(self.relu(self.bn2(self.conv2(out))))
