"""Test protocols: which views of an image a trained model sees, and how their predictions are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from resnet_dist.config.recipe import MAX_SIZE, CenterCrop, Interpolation
from resnet_dist.errors import UserError
from resnet_dist.models.classifier import ImageClassifier
from resnet_dist.training.model import Precision

Kind = Literal["1-crop", "flip", "10-crop", "multi-scale"]
KINDS: tuple[Kind, ...] = ("1-crop", "flip", "10-crop", "multi-scale")
Place = Literal["centre", "top-left", "top-right", "bottom-left", "bottom-right", "whole"]
PAPER_SCALES = (224, 256, 384, 480, 640)
"""Shorter sides of the images in "multi-scale" evaluations, px: He et al. 2015, section 3.4."""


class View(NamedTuple):
    """One picture of an image: shorter side resized to `shorter_side` px, then a `size` x `size` window of that, or all
    of it."""

    shorter_side: int
    place: Place
    size: int
    """0 for the whole image."""
    interpolation: Interpolation = "bilinear"
    """How it is resized."""


class Box(NamedTuple):
    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True)
class Protocol:
    """How a trained net is tested.

    1-crop       the central crop, as during training
    flip         that and its mirror image
    10-crop      four corners, centre, and their mirror images (Krizhevsky et al. 2012; He et al. 2015, tables 2 and 3)
    multi-scale  whole images at several scales and their mirror images, by the net made fully convolutional (table 4)

    Mirror images are of the crops (torchvision's `TenCrop` crops the mirrored image, which differs where the centre is
    half a px off the middle). The views' class probabilities are averaged. `size` and `resize` replace the recipe's own
    for the crops: a larger test size than training's is FixRes (Touvron et al. 2019).
    """

    kind: Kind = "1-crop"
    size: int | None = None
    resize: int | None = None
    scales: tuple[int, ...] = PAPER_SCALES

    @property
    def flips(self) -> bool:
        """Whether every view is shown mirrored too."""
        return self.kind != "1-crop"

    @property
    def fully_convolutional(self) -> bool:
        return self.kind == "multi-scale"

    def crop(self, own: CenterCrop) -> CenterCrop:
        """The crops, with the recipe's interpolation. A new `size` alone keeps the recipe's ratio of the two sides."""
        size = self.size or own.size
        resize = self.resize or (own.resize if size == own.size else round(size * own.resize / own.size))
        if size > resize:
            raise UserError(
                f"--size {size}: is larger than the resized image's shorter side ({resize}); raise --resize"
            )
        _require_side("--size, --resize", resize)
        return own.model_copy(update={"size": size, "resize": resize})

    def views(self, own: CenterCrop) -> tuple[View, ...]:
        """The views, in the order in which they are averaged. Raises UserError for sides that do not fit."""
        if self.kind == "multi-scale":
            if self.size or self.resize:
                raise UserError("--size, --resize: are for crops; multi-scale takes --scales")
            _require_side("--scales", max(self.scales))
            return tuple(View(scale, "whole", 0, own.interpolation) for scale in self.scales)
        crop = self.crop(own)
        places: tuple[Place, ...] = ("centre",)
        if self.kind == "10-crop":
            places = ("top-left", "top-right", "bottom-left", "bottom-right", "centre")
        return tuple(View(crop.resize, place, crop.size, crop.interpolation) for place in places)


def _require_side(option: str, px: int) -> None:
    if px > MAX_SIZE:
        raise UserError(f"{option}: {px:,} px is more than {MAX_SIZE:,}")


def window(view: View, width: int, height: int) -> Box:
    """Where the view is in the resized image, px; a window half a px off the middle goes to the even side."""
    match view.place:
        case "whole":
            return Box(0, 0, width, height)
        case "centre":
            left, top = round((width - view.size) / 2), round((height - view.size) / 2)
        case corner:
            left = width - view.size if corner.endswith("right") else 0
            top = height - view.size if corner.startswith("bottom") else 0
    return Box(left, top, left + view.size, top + view.size)


@dataclass
class SameShape:
    """Pictures of equal shape under one view."""

    places: Tensor
    """int64 [n]: their positions in the batch."""
    images: Tensor
    """uint8 [n, H, W, 3], RGB."""


ViewImages = dict[View, list[SameShape]]


@dataclass(frozen=True)
class EnsembleMember:
    """One model of an ensemble; a single model is an ensemble of one."""

    classifier: nn.Module
    """uint8 [N, H, W, 3] -> logits [N, C]."""
    views: tuple[View, ...]
    flips: bool
    precision: Precision
    max_pixels: int
    """Largest number of px in one forward pass (at least one image): whole images are larger than training's."""


class AveragedClassifier(nn.Module):
    """Views -> logarithm [N, C] of the mean of the class probabilities (softmax), float32 or the nets' own float64.

    The mean is over members, their views, and each view and its mirror image, all with equal weights. The order of the
    sum is fixed, so a batch has one result wherever it is evaluated.
    """

    def __init__(self, members: Sequence[EnsembleMember], num_classes: int) -> None:
        super().__init__()
        self._members = tuple(members)
        self._nets = nn.ModuleList([member.classifier for member in members])
        self._num_classes = num_classes

    def forward(self, images: ViewImages) -> Tensor:
        total = torch.stack([self._probabilities(member, images) for member in self._members])
        mean = total.mean(dim=0)
        return mean.clamp_min(torch.finfo(mean.dtype).tiny).log()  # not the log of 0: an infinite loss

    def _probabilities(self, member: EnsembleMember, images: ViewImages) -> Tensor:
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

    def _of_pictures(self, member: EnsembleMember, pictures: Tensor) -> Tensor:
        shown = [pictures, pictures.flip(2)] if member.flips else [pictures]
        with member.precision.autocast(pictures.device):
            logits = [member.classifier(side) for side in shown]
        return torch.stack([_probabilities(side.to(member.precision.weights)) for side in logits]).mean(dim=0)


def _probabilities(logits: Tensor) -> Tensor:
    """NaN where a logit is not finite: an infinite one would vanish in the mean."""
    return logits.softmax(dim=1).where(logits.isfinite().all(dim=1, keepdim=True), torch.nan)


class DensePool(nn.Module):
    """[N, C, H, W] -> [N, C, 1, 1]: mean over all positions of a window of `side` x `side`."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        window = (min(self.side, x.shape[2]), min(self.side, x.shape[3]))
        return avg_pool2d(x, window, stride=1).mean(dim=(2, 3), keepdim=True)


def make_fully_convolutional(classifier: ImageClassifier, train_size: int, name: str) -> None:
    """Changes a net with global average pooling in place (He et al. 2015, section 3.4).

    At training's size the last map has S x S positions (7 x 7 at 224 px), all averaged. On a larger image the same S x
    S average slides over the map, the linear layer scores every position, and the scores are averaged. The layer is
    linear, so the average may be taken before it: border positions of the map count less than with one global average.

    `train_size`: side of the images it was trained on, px.

    Raises UserError for a net without global average pooling (VGG), naming it `name`.
    """
    pool = getattr(classifier.net, "avgpool", None)
    if not isinstance(pool, nn.AdaptiveAvgPool2d) or pool.output_size not in (1, (1, 1)):
        raise UserError(
            f"{name}: multi-scale needs a net that averages its last map; this one has fully connected layers: use "
            "--protocol 10-crop"
        )
    classifier.net.avgpool = DensePool(_map_side(classifier, pool, train_size))


@torch.no_grad()
def _map_side(classifier: ImageClassifier, pool: nn.Module, train_size: int) -> int:
    seen: list[int] = []
    hook = pool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2]))
    was_training = classifier.training
    try:
        classifier.eval()(torch.zeros((1, train_size, train_size, 3), dtype=torch.uint8))
    finally:
        hook.remove()
        classifier.train(was_training)
    return seen[0]
