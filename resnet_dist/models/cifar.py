"""The CIFAR nets of He et al. 2015, section 4.2: 6n + 2 layers in three stages of 32, 16 and 8 px, 16 to 64 filters.

With bottlenecks (He et al. 2016) 9n + 2 layers, and four times as many filters at the end of each block.
"""

from __future__ import annotations

from torch import Tensor, nn

from resnet_dist.models.keyed_noise import KeyedDropout
from resnet_dist.models.resnet import NetOptions, ResidualBlock, Stage, conv3x3, init_weights


class CifarResNet(nn.Module):
    """[N, 3, H, W] -> logits [N, num_classes]; made for 32 px. Arguments as `ResNet`, with three stages."""

    def __init__(
        self, block: type[ResidualBlock], num_blocks: tuple[int, ...], num_classes: int, options: NetOptions
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = Stage(block, 16, 16, num_blocks[0], options, stride=1, after_stem=True)
        self.layer2 = Stage(block, self.layer1.out_channels, 32, num_blocks[1], options, stride=2)
        self.layer3 = Stage(block, self.layer2.out_channels, 64, num_blocks[2], options, stride=2)
        self.end = block.final_activation(self.layer3.out_channels, options)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = KeyedDropout(options.dropout) if options.dropout else nn.Identity()
        self.fc = nn.Linear(self.layer3.out_channels, num_classes)
        init_weights(self, options)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.end(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.dropout(self.avgpool(x).flatten(1)))
