"""torchvision is the oracle: keys, shapes, first weights, logits."""

from __future__ import annotations

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
            tensor.copy_(0.5 + noise if tensor.ndim == 1 and "bias" not in name else tensor + 0.1 * (noise - 0.5))


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_keys_and_shapes(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = build_model(name, 1000), getattr(torchvision.models, name)()
    assert [(k, v.shape, v.dtype) for k, v in ours.state_dict().items()] == [
        (k, v.shape, v.dtype) for k, v in theirs.state_dict().items()
    ]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_logits(name: str) -> None:
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
        assert logits.std() > 0.01
    for (key, mine), its in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(mine, its), f"{key} differs after a forward pass in training mode"


@pytest.mark.parametrize(("name", "zero_init"), [("resnet18", False), ("resnet50", True)])
def test_first_weights(name: str, zero_init: bool) -> None:
    torch.manual_seed(3)
    theirs = getattr(torchvision.models, name)(num_classes=5, zero_init_residual=zero_init).state_dict()
    torch.manual_seed(3)
    ours = build_model(name, 5, zero_init_residual=zero_init).state_dict()
    assert [k for k in theirs if not torch.equal(ours[k], theirs[k])] == []
