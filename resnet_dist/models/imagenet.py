"""The ImageNet nets of He et al. 2015, table 1: 7x7 stem, stages of 56, 28, 14 and 7 px, global average, classifier.

State-dict keys, shapes and first values are torchvision's.
"""

from __future__ import annotations

import torch
from torch import nn

from resnet_dist.models.keyed_noise import KeyedDropout
from resnet_dist.models.options import NetOptions
from resnet_dist.models.stages import BlockFactory, Stage
from resnet_dist.models.stems import WIDTH, first_convolution, first_pooling


class ImageNetResNet(nn.Module):
    """[N, 3, H, W] -> logits [N, num_classes]; made for 224 px, takes any size from 32 px on."""

    def __init__(
        self, make_block: BlockFactory, num_blocks: tuple[int, ...], num_classes: int, options: NetOptions
    ) -> None:
        super().__init__()
        self.conv1 = first_convolution(options)
        self.bn1 = nn.BatchNorm2d(WIDTH)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = first_pooling(options)
        self.layer1 = Stage(make_block, WIDTH, 64, num_blocks[0], stride=1)
        self.layer2 = Stage(make_block, self.layer1.out_channels, 128, num_blocks[1], stride=2)
        self.layer3 = Stage(make_block, self.layer2.out_channels, 256, num_blocks[2], stride=2)
        self.layer4 = Stage(make_block, self.layer3.out_channels, 512, num_blocks[3], stride=2)
        self.layer1[0].follow_stem()
        self.end = self.layer4[-1].final_activation()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = KeyedDropout(options.dropout) if options.dropout else nn.Identity()
        self.fc = nn.Linear(self.layer4.out_channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.end(self.layer4(self.layer3(self.layer2(self.layer1(x)))))
        return self.fc(self.dropout(self.avgpool(x).flatten(1)))
