"""What stands before an ImageNet net's first stage: 224 px -> 56 px, 3 -> 64 channels."""

from __future__ import annotations

from torch import nn

from resnet_dist.models.convolutions import conv3x3
from resnet_dist.models.options import NetOptions

WIDTH = 64


def first_convolution(options: NetOptions) -> nn.Module:
    """`conv1`: the paper's 7x7, or the D stem's three 3x3 (He et al. 2018, section 4.2), to half the size.

    Keys of the D stem are timm's (`conv1.0`, `.1`, `.3`, `.4`, `.6`).
    """
    if options.stem == "conv7":
        return nn.Conv2d(3, WIDTH, kernel_size=7, stride=2, padding=3, bias=False)
    half = WIDTH // 2
    return nn.Sequential(
        conv3x3(3, half, 2),
        nn.BatchNorm2d(half),
        nn.ReLU(inplace=True),
        conv3x3(half, half),
        nn.BatchNorm2d(half),
        nn.ReLU(inplace=True),
        conv3x3(half, WIDTH),
    )


def first_pooling(options: NetOptions) -> nn.Module:
    """To a quarter of size: 3x3 maximum, or with `deep_strided` a 3x3 convolution (ResNet-RS; Bello et al. 2021)."""
    if options.stem != "deep_strided":
        return nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
    conv = conv3x3(WIDTH, WIDTH, 2, blur=options.blur_pool)
    return nn.Sequential(conv, nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True))
