"""torchvision is the oracle: keys, shapes, first weights, logits."""

from __future__ import annotations

import re

import pytest
import torch
import torchvision.models
from torch import nn

from resnet_dist.models import build_model


def randomise(net: nn.Module) -> None:
    """Values that no initialisation gives, so that a swapped key or an ignored statistic shows."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator)
            # Variances and gammas around 1, the rest around the initialisation.
            around_1 = tensor.ndim == 1 and name.endswith(("weight", "running_var"))
            tensor.copy_(0.5 + noise if around_1 else tensor + 0.02 * (noise - 0.5))


RESNETS = [name for name in torchvision.models.list_models(torchvision.models) if re.match("(wide_)?resne[x]?t", name)]
VGGS = torchvision.models.list_models(torchvision.models, include="vgg*")


@pytest.mark.parametrize("name", [*RESNETS, *VGGS])
def test_keys_and_shapes(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = build_model(name, 1000), getattr(torchvision.models, name)()
    assert [(k, v.shape, v.dtype) for k, v in ours.state_dict().items()] == [
        (k, v.shape, v.dtype) for k, v in theirs.state_dict().items()
    ]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_logits(name: str) -> None:
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(num_classes=7)
    randomise(theirs)
    ours = build_model(name, 7)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(3, 3, 72, 80, generator=torch.Generator().manual_seed(2))
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        logits = ours(images)
        torch.testing.assert_close(logits, theirs(images), rtol=0, atol=0)
        assert logits.std(dim=0).min() > 0.001  # images differ
    for (key, mine), its in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(mine, its), f"{key} differs after a forward pass in training mode"


@pytest.mark.parametrize(("name", "zero_init"), [("resnet18", False), ("resnext50_32x4d", True)])
def test_first_weights(name: str, zero_init: bool) -> None:
    torch.manual_seed(3)
    theirs = getattr(torchvision.models, name)(num_classes=5, zero_init_residual=zero_init).state_dict()
    torch.manual_seed(3)
    ours = build_model(name, 5, zero_init_residual=zero_init).state_dict()
    assert [k for k in theirs if not torch.equal(ours[k], theirs[k])] == []
