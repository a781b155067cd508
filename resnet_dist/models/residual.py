"""What all blocks share: the shortcut beside the residual function, and how the two become one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resnet_dist.models.convolutions import conv1x1
from resnet_dist.models.keyed_noise import DropPath, KeyedDropout
from resnet_dist.models.options import NetOptions
from resnet_dist.models.shortcuts import build_shortcut
from resnet_dist.models.squeeze_excitation import SqueezeExcitation


class ResidualBlock(nn.Module):
    """Base of the blocks. A block's own convolutions come first, then `add_shortcut`: the order of first weights is
    torchvision's.
    """

    out_channels: int

    def add_shortcut(
        self, in_channels: int, out_channels: int, stride: int, options: NetOptions, *, norm: bool = True
    ) -> None:
        self.downsample = build_shortcut(
            options.shortcut,
            in_channels,
            out_channels,
            stride,
            pooled=options.pooled_projection,
            norm=norm,
            blur=options.blur_pool,
        )
        self.se = SqueezeExcitation(out_channels, options.se_ratio) if options.se_ratio else None
        self.drop_path = DropPath(options.drop_path) if options.drop_path else None
        self.gate = conv1x1_with_bias(in_channels, out_channels, stride) if options.gate else None
        self.shortcut_dropout = KeyedDropout(options.shortcut_dropout) if options.shortcut_dropout else None
        self._gates_residual = options.gate == "exclusive"
        self._scales = options.shortcut_scale, options.residual_scale

    def follow_stem(self) -> None:
        """Called on a net's first block, whose input the stem's ReLU has already passed."""

    def final_activation(self) -> nn.Module:
        """What stands between a net's last block and the pooling."""
        return nn.Identity()

    def join(self, x: Tensor, residual: Tensor) -> Tensor:
        """The block's input and its residual function's output -> their sum, before any activation.

        With a gate g = sigmoid(W x + b): exclusive, (1 - g) * shortcut + g * residual, as in highway networks;
        shortcut_only, (1 - g) * shortcut + residual (He et al. 2016, section 3.1). A plain net has the residual alone.
        """
        if self.se is not None:
            residual = self.se(residual)
        if self.drop_path is not None:
            residual = self.drop_path(residual)
        if self.downsample is None:
            return residual
        shortcut: Tensor = self.downsample(x)
        if self.shortcut_dropout is not None:
            shortcut = self.shortcut_dropout(shortcut)
        if self._scales != (1.0, 1.0):
            shortcut, residual = self._scales[0] * shortcut, self._scales[1] * residual
        if self.gate is not None:
            gate = torch.sigmoid(self.gate(x))
            return (1 - gate) * shortcut + (gate * residual if self._gates_residual else residual)
        residual += shortcut
        return residual


def conv1x1_with_bias(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    gate = conv1x1(in_channels, out_channels, stride)
    gate.bias = nn.Parameter(torch.zeros(out_channels))
    return gate
