"""From the views of a batch to one answer: class probabilities averaged over views, mirror images and nets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resnet_dist.evaluation.protocol import View, ViewImages
from resnet_dist.training.precision import Precision


@dataclass(frozen=True)
class Member:
    """One net of an ensemble; alone, an ensemble of one."""

    classifier: nn.Module
    """uint8 [N, H, W, 3] -> logits [N, C]."""
    views: tuple[View, ...]
    flips: bool
    precision: Precision
    max_pixels: int
    """Largest number of px in one forward pass (at least one image): whole images are larger than training's."""


class AveragedClassifier(nn.Module):
    """Views -> logarithm [N, C] of the mean of the class probabilities (softmax), float32 or the nets' own float64.

    The mean runs over members, of each over its views, of each over the picture and its mirror image; every one of the
    three has equal weights. The order of the sum is fixed, so a batch has one result wherever it is evaluated.
    """

    def __init__(self, members: Sequence[Member], num_classes: int) -> None:
        super().__init__()
        self._members = tuple(members)
        self._nets = nn.ModuleList([member.classifier for member in members])
        self._num_classes = num_classes

    def forward(self, images: ViewImages) -> Tensor:
        total = torch.stack([self._probabilities(member, images) for member in self._members])
        mean = total.mean(dim=0)
        return mean.clamp_min(torch.finfo(mean.dtype).tiny).log()  # a class that all nets rule out is no infinite loss

    def _probabilities(self, member: Member, images: ViewImages) -> Tensor:
        """[N, C]."""
        views = []
        for view in member.views:
            groups = images[view]
            num_images = sum(len(group.places) for group in groups)
            device = groups[0].images.device
            scores = torch.zeros((num_images, self._num_classes), device=device, dtype=member.precision.weights)
            for group in groups:
                height, width = group.images.shape[1:3]
                chunk = max(1, member.max_pixels // (height * width))
                for places, pictures in zip(group.places.split(chunk), group.images.split(chunk), strict=True):
                    scores[places] = self._of_pictures(member, pictures)
            views.append(scores)
        return torch.stack(views).mean(dim=0)

    def _of_pictures(self, member: Member, pictures: Tensor) -> Tensor:
        shown = [pictures, pictures.flip(2)] if member.flips else [pictures]
        with member.precision.autocast(pictures.device):
            logits = [member.classifier(side) for side in shown]
        return torch.stack([_probabilities(side.to(member.precision.weights)) for side in logits]).mean(dim=0)


def _probabilities(logits: Tensor) -> Tensor:
    """NaN where a logit is not finite: an infinite one would vanish in the mean."""
    return logits.softmax(dim=1).where(logits.isfinite().all(dim=1, keepdim=True), torch.nan)
