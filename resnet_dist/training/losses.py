"""The loss of one micro-batch."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from resnet_dist.config.recipe_train import BinaryCrossEntropy, TrainConfig


def training_loss(logits: Tensor, targets: Tensor, train: TrainConfig) -> Tensor:
    """Mean loss, a scalar of the targets' type. Logits and targets [N, C]; a row of targets sums to 1."""
    logits = logits.to(targets.dtype)
    if not isinstance(train.loss, BinaryCrossEntropy):
        return cross_entropy(logits, targets, label_smoothing=train.label_smoothing)
    targets = (1.0 - train.label_smoothing) * targets + train.label_smoothing / targets.shape[1]
    if train.loss.target_threshold is not None:
        targets = (targets > train.loss.target_threshold).to(targets.dtype)
    return binary_cross_entropy_with_logits(logits, targets)
