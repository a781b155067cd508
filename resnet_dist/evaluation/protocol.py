"""Protocols as lists of views: crops, or whole images for fully convolutional nets. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from resnet_dist.config.published import PAPER_SCALES
from resnet_dist.config.recipe_data import MAX_SIZE, CenterCrop
from resnet_dist.errors import UserError

Kind = Literal["1-crop", "flip", "10-crop", "multi-scale"]
KINDS: tuple[Kind, ...] = ("1-crop", "flip", "10-crop", "multi-scale")
Place = Literal["centre", "top-left", "top-right", "bottom-left", "bottom-right", "whole"]


class View(NamedTuple):
    """One picture of an image: shorter side to `shorter_side` px, then a `size` x `size` window of that, or all."""

    shorter_side: int
    place: Place
    size: int
    """0 for the whole image."""


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

    Mirror images are of the crops (torchvision's `TenCrop` crops the mirrored image, where a centre half a px off the
    middle is another one). The views' class probabilities are averaged. `size` and `resize` replace the recipe's own
    for the crops: a larger
    test size than training's is FixRes (Touvron et al. 2019).
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
        """The sides of the crops, from the recipe's own. A new `size` alone keeps the recipe's ratio of the two."""
        size = self.size or own.size
        resize = self.resize or (own.resize if size == own.size else round(size * own.resize / own.size))
        if size > resize:
            raise UserError(
                f"--size {size}: is larger than the resized image's shorter side ({resize}); raise --resize"
            )
        _require_side("--size, --resize", resize)
        return CenterCrop(kind="center_crop", size=size, resize=resize)

    def views(self, own: CenterCrop) -> tuple[View, ...]:
        """In the order in which they are averaged. Raises UserError for sides that do not fit."""
        if self.kind == "multi-scale":
            if self.size or self.resize:
                raise UserError("--size, --resize: are of crops; multi-scale takes --scales")
            _require_side("--scales", max(self.scales))
            return tuple(View(scale, "whole", 0) for scale in self.scales)
        crop = self.crop(own)
        places: tuple[Place, ...] = ("centre",)
        if self.kind == "10-crop":
            places = ("top-left", "top-right", "bottom-left", "bottom-right", "centre")
        return tuple(View(crop.resize, place, crop.size) for place in places)


def _require_side(option: str, px: int) -> None:
    if px > MAX_SIZE:
        raise UserError(f"{option}: {px:,} px is more than {MAX_SIZE:,}")


def window(view: View, width: int, height: int) -> Box:
    """Where the view lies in the resized image, px; a window half a px off the middle goes to the even side."""
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
class Group:
    """Pictures of equal shape under one view."""

    places: Tensor
    """int64 [n]: their places in the batch."""
    images: Tensor
    """uint8 [n, H, W, 3], RGB."""


ViewImages = dict[View, list[Group]]
