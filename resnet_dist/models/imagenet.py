"""The ImageNet nets of He et al. 2015, table 1: 7x7 stem, stages of 56, 28, 14 and 7 px, global average, classifier.

State-dict keys, shapes and first values are torchvision's.
"""

from __future__ import annotations

import torch
from torch import nn

from resnet_dist.models.blocks import BlockFactory, Stage


class ImageNetResNet(nn.Module):
    """[N, 3, H, W] -> logits [N, num_classes]; made for 224 px, takes any size from 32 px on."""

    def __init__(self, make_block: BlockFactory, num_blocks: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = Stage(make_block, 64, 64, num_blocks[0], stride=1)
        self.layer2 = Stage(make_block, self.layer1.out_channels, 128, num_blocks[1], stride=2)
        self.layer3 = Stage(make_block, self.layer2.out_channels, 256, num_blocks[2], stride=2)
        self.layer4 = Stage(make_block, self.layer3.out_channels, 512, num_blocks[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self.layer4.out_channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))
