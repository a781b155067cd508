"""The convolutions that blocks and stems are made of, with the blur that anti-aliasing nets put before strides."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BlurredConv2d(nn.Conv2d):
    """A strided convolution behind a 3x3 binomial blur (Zhang 2019, "Making convolutional networks shift-invariant
    again"; in this place, at the convolution's input and in full resolution, as in ffcv-imagenet's rn50 configs).

    Same parameters and state-dict keys as the convolution alone.
    """

    blur: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        binomial = torch.tensor([1.0, 2.0, 1.0]) / 4
        kernel = torch.outer(binomial, binomial).expand(in_channels, 1, 3, 3).contiguous()
        self.register_buffer("blur", kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.conv2d(x, self.blur.to(x.dtype), padding=1, groups=self.in_channels))


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, *, blur: bool = False) -> nn.Conv2d:
    return _conv(in_channels, out_channels, 3, stride, blur)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1, *, blur: bool = False) -> nn.Conv2d:
    return _conv(in_channels, out_channels, 1, stride, blur)


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int, blur: bool) -> nn.Conv2d:
    padding = kernel_size // 2
    if blur and stride > 1:
        return BlurredConv2d(in_channels, out_channels, kernel_size, stride, padding)
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=False)
