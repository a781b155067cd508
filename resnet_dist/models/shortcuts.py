"""What runs beside the residual function: the shortcut options A, B and C of He et al. 2015, section 3.3.

Popular summaries swap A and B. A is zero-padding and has no parameters; B projects where the dimensions grow and is the
identity everywhere else; C projects everywhere.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

from resnet_dist.models.convolutions import conv1x1

Shortcut = Literal["A", "B", "C"]
SHORTCUTS: tuple[str, ...] = get_args(Shortcut)


class ZeroPadShortcut(nn.Module):
    """Option A: every `stride`-th pixel, then zeros for the channels that the input lacks. No parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def projection(
    in_channels: int, out_channels: int, stride: int, *, pooled: bool = False, norm: bool = True, blur: bool = False
) -> nn.Sequential:
    """W_s of the paper's equation 2: a 1x1 convolution and its batch norm (keys `0.*` and `1.*`, as in torchvision).

    `pooled`: a 2x2 average takes the stride instead of the convolution, which would skip three pixels of four
    (ResNet-D, He et al. 2018, section 4.2; keys `1.*` and `2.*`, as in timm). Without `norm`: the pre-activation nets'.
    """
    pool: list[nn.Module] = []
    if pooled:
        pool = [nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()]
        stride = 1
    conv = conv1x1(in_channels, out_channels, stride, blur=blur)
    return nn.Sequential(*pool, conv, *([nn.BatchNorm2d(out_channels)] if norm else []))


def build_shortcut(
    option: Shortcut | None,
    in_channels: int,
    out_channels: int,
    stride: int,
    *,
    pooled: bool = False,
    norm: bool = True,
    blur: bool = False,
) -> nn.Module | None:
    """[N, in_channels, H, W] -> [N, out_channels, H / stride, W / stride] beside one block; None in a plain net."""
    same_shape = stride == 1 and in_channels == out_channels
    if option is None:
        return None
    if option == "C" or (option == "B" and not same_shape):
        return projection(in_channels, out_channels, stride, pooled=pooled, norm=norm, blur=blur)
    return nn.Identity() if same_shape else ZeroPadShortcut(in_channels, out_channels, stride)
