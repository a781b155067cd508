"""A recipe's data section: which images, and what becomes of them before the net sees them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from resnet_dist.config.base import Section

Channels = tuple[float, float, float]


class RandomResizedCrop(Section):
    """A crop of random area and aspect ratio, resized to `size` (Szegedy et al. 2014)."""

    kind: Literal["random_resized_crop"]
    size: PositiveInt
    """Side of the square the net sees, px."""
    scale: tuple[PositiveFloat, PositiveFloat] = (0.08, 1.0)
    """Range of the crop's share of the image's area."""
    ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 4 / 3)
    """Range of the crop's width / height; drawn log-uniformly."""
    flip: bool = True
    """Mirror half of the images."""

    @model_validator(mode="after")
    def _ranges(self) -> RandomResizedCrop:
        if self.scale[0] > self.scale[1] or self.scale[1] > 1.0:
            raise ValueError(f"scale must be ascending and end at 1.0 or below, got {list(self.scale)}")
        if self.ratio[0] > self.ratio[1]:
            raise ValueError(f"ratio must be ascending, got {list(self.ratio)}")
        return self


class PadCrop(Section):
    """Pad every side with zeros, then crop `size` x `size` at random (He et al. 2015, section 4.2).

    All images must be `size` x `size`.
    """

    kind: Literal["pad_crop"]
    size: PositiveInt
    pad: NonNegativeInt = 4
    """Zeros on every side, px."""
    flip: bool = True


class CenterCrop(Section):
    """Shorter side to `resize`, then the central `size` x `size`: the 1-crop test protocol."""

    kind: Literal["center_crop"]
    size: PositiveInt
    resize: PositiveInt

    @model_validator(mode="after")
    def _fits(self) -> CenterCrop:
        if self.size > self.resize:
            raise ValueError(f"size ({self.size}) must not be larger than resize ({self.resize})")
        return self


TrainTransform = Annotated[RandomResizedCrop | PadCrop, Field(discriminator="kind")]


class DataConfig(Section):
    dataset: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Folder under the profile's `data_root` that holds `train.beton` and `val.beton` with their manifests."""
    train: TrainTransform
    eval: CenterCrop
    mean: Channels
    """Per channel (R, G, B), in grey levels 0..255."""
    std: Channels
    """Per channel (R, G, B), in grey levels 0..255."""
    decoder: Literal["native", "ffcv"] = "native"
    """What turns stored images into pixels. native: Pillow's pixels, bit for bit. ffcv: stock ffcv's, which differ by a
    grey level or two."""

    @model_validator(mode="after")
    def _positive_std(self) -> DataConfig:
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {list(self.std)}")
        return self
