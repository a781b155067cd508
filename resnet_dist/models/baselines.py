"""The nets that the paper compares with, from torchvision."""

from __future__ import annotations

from torch import nn

from resnet_dist.models.keyed_noise import replace_dropout

BASELINES = ("vgg16", "vgg19", "googlenet")


def build_baseline(name: str, num_classes: int) -> nn.Module:
    """[N, 3, H, W] -> logits, with torchvision's initialisation and keyed dropout.

    VGG has no batch norm. GoogLeNet is torchvision's: with batch norm, and here without the auxiliary classifiers.
    """
    import torchvision.models  # here, because it brings torch._dynamo, which takes seconds to import

    if name == "googlenet":
        net = torchvision.models.googlenet(num_classes=num_classes, aux_logits=False, init_weights=True)
    else:
        net = getattr(torchvision.models, name)(num_classes=num_classes)
    return replace_dropout(net)
