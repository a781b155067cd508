"""A stage of blocks, and what is done to all blocks of a net once they stand: initialisation, drop-path by depth."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from resnet_dist.models.blocks import PostactivationBlock
from resnet_dist.models.residual import ResidualBlock

BlockFactory = Callable[[int, int, int], ResidualBlock]
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


def initialise(net: nn.Module, *, zero_init_residual: bool, gate_bias: float) -> None:
    """He initialisation of the convolutions (fan-out form, as torchvision); batch norms keep gamma = 1 and beta = 0.

    `zero_init_residual` sets the gamma that ends each residual function to 0, so that every block starts as its
    shortcut alone (Goyal et al. 2017, section 5.1). Gates start with the bias `gate_bias`.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, ResidualBlock):
            if module.gate is not None and module.gate.bias is not None:
                nn.init.constant_(module.gate.bias, gate_bias)
            if zero_init_residual and isinstance(module, PostactivationBlock):
                nn.init.zeros_(module.last_norm.weight)


def spread_drop_path(net: nn.Module) -> None:
    """Block i of L drops with i / (L - 1) of the rate it was made with: the first never (Huang et al. 2016, linear
    decay; as timm)."""
    blocks = [module for module in net.modules() if isinstance(module, ResidualBlock)]
    for number, block in enumerate(blocks):
        if block.drop_path is not None:
            block.drop_path.rate *= number / max(1, len(blocks) - 1)
