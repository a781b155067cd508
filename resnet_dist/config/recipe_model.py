"""A recipe's model section: which net."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from resnet_dist.config.base import Section


class ModelConfig(Section):
    name: str
    """A name of `resnet_dist.models.MODEL_NAMES`: resnet18 .. resnet152 (ImageNet), resnet20 .. resnet1202 (CIFAR)."""
    num_classes: PositiveInt
    """Must equal the number of classes in the betons' manifests."""
    zero_init_residual: bool = False
    """Start the last batch norm of every block at gamma = 0 (Goyal et al. 2017, section 5.1)."""
    shortcut: Literal["A", "B", "C"] | None = None
    """A zero-padding, B projection where dimensions grow, C all projections (He et al. 2015, section 3.3); null: the
    net's own default."""
