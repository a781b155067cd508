"""The CIFAR nets of He et al. 2015, section 4.2: 6n + 2 layers in three stages of 32, 16 and 8 px, 16 to 64 filters.

With bottlenecks (He et al. 2016) 9n + 2 layers, and four times as many filters at the end of each block.
"""

from __future__ import annotations

import torch
from torch import nn

from resnet_dist.models.keyed_noise import KeyedDropout
from resnet_dist.models.resnet import BlockFactory, NetOptions, Stage


class CifarResNet(nn.Module):
    """[N, 3, H, W] -> logits [N, num_classes]; made for 32 px."""

    def __init__(
        self, make_block: BlockFactory, num_blocks: tuple[int, ...], num_classes: int, options: NetOptions
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = Stage(make_block, 16, 16, num_blocks[0], stride=1)
        self.layer2 = Stage(make_block, self.layer1.out_channels, 32, num_blocks[1], stride=2)
        self.layer3 = Stage(make_block, self.layer2.out_channels, 64, num_blocks[2], stride=2)
        self.layer1.follow_stem()
        self.end = self.layer3.final_activation()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = KeyedDropout(options.dropout) if options.dropout else nn.Identity()
        self.fc = nn.Linear(self.layer3.out_channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.end(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.dropout(self.avgpool(x).flatten(1)))
