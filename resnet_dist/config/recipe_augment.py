"""What becomes of a training image after crop and flip: a recipe's `data.train.augment`, applied in the order written.

Operations are torchvision's and Pillow's, on 8-bit RGB; what is drawn is a function of (seed, epoch, sample id).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from resnet_dist.config.base import Section

Level = Annotated[int, Field(ge=0, le=255)]


class ColorJitter(Section):
    """Brightness, contrast, saturation and hue, in random order (torchvision's `ColorJitter`)."""

    kind: Literal["color_jitter"]
    brightness: NonNegativeFloat = 0.0
    """The factor is drawn from [max(0, 1 - brightness), 1 + brightness]; so for contrast and saturation."""
    contrast: NonNegativeFloat = 0.0
    saturation: NonNegativeFloat = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """The turn is drawn from [-hue, hue], in full circles."""


class Lighting(Section):
    """Noise along the colours' principal components (Krizhevsky et al. 2012, section 4.1); ImageNet's components."""

    kind: Literal["lighting"]
    std: NonNegativeFloat = 0.1
    """Standard deviation of the three normal draws."""


class RandAugment(Section):
    """`ops` of 14 operations, all with one magnitude (Cubuk et al. 2019; torchvision's `RandAugment`)."""

    kind: Literal["rand_augment"]
    ops: Annotated[int, Field(ge=1, le=14)] = 2
    magnitude: Annotated[int, Field(ge=0)] = 9
    """0 to `bins` - 1."""
    bins: Annotated[int, Field(ge=2)] = 31
    probability: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of each of the operations, by itself, to be applied; timm's policies have 0.5."""

    @model_validator(mode="after")
    def _within_bins(self) -> RandAugment:
        if self.magnitude >= self.bins:
            raise ValueError(f"magnitude ({self.magnitude}) must be below bins ({self.bins})")
        return self


class TrivialAugmentWide(Section):
    """One of 14 operations with a random magnitude (Müller, Hutter 2021; torchvision's `TrivialAugmentWide`)."""

    kind: Literal["trivial_augment_wide"]
    bins: Annotated[int, Field(ge=2)] = 31


class RandomErasing(Section):
    """Covers a rectangle (Zhong et al. 2017; torchvision's `RandomErasing`)."""

    kind: Literal["random_erasing"]
    probability: Annotated[float, Field(ge=0, le=1)] = 0.5
    scale: tuple[PositiveFloat, PositiveFloat] = (0.02, 0.33)
    """Range of the rectangle's share of the image's area."""
    ratio: tuple[PositiveFloat, PositiveFloat] = (0.3, 3.3)
    """Range of its height / width; drawn log-uniformly."""
    fill: tuple[Level, Level, Level] = (124, 116, 104)
    """R, G, B. ImageNet's mean, so about 0 after normalisation, as torchvision's default."""

    @model_validator(mode="after")
    def _ranges(self) -> RandomErasing:
        for name, (low, high), most in (("scale", self.scale, 1.0), ("ratio", self.ratio, 20.0)):
            if low > high or high > most:
                raise ValueError(f"{name} must be ascending and end at {most} or below, got {[low, high]}")
        if self.ratio[0] < 0.05:
            raise ValueError(f"ratio must begin at 0.05 or above, got {list(self.ratio)}")
        return self


Augmentation = Annotated[
    ColorJitter | Lighting | RandAugment | TrivialAugmentWide | RandomErasing, Field(discriminator="kind")
]
