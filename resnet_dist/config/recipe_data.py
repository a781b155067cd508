"""A recipe's data section: which images, and what becomes of them before the net sees them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from resnet_dist.config.base import Section
from resnet_dist.config.recipe_augment import Augmentation

Channels = tuple[float, float, float]
OnBadSample = Literal["error", "skip"]
MAX_SIZE = 16384
"""Largest side of what the net sees, px."""


class TrainCrop(Section):
    """What the training crops have in common."""

    size: Annotated[int, Field(gt=0, le=MAX_SIZE)]
    """Side of the square the net sees, px."""
    flip: bool = True
    """Mirror half of the images."""
    augment: tuple[Augmentation, ...] = ()
    """Applied after crop and flip, in this order."""


class RandomResizedCrop(TrainCrop):
    """A crop of random area and aspect ratio, resized to `size` (Szegedy et al. 2014)."""

    kind: Literal["random_resized_crop"]
    scale: tuple[PositiveFloat, PositiveFloat] = (0.08, 1.0)
    """Range of the crop's share of the image's area."""
    ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 4 / 3)
    """Range of the crop's width / height; drawn log-uniformly."""

    @model_validator(mode="after")
    def _ranges(self) -> RandomResizedCrop:
        if self.scale[0] > self.scale[1] or self.scale[1] > 1.0:
            raise ValueError(f"scale must be ascending and end at 1.0 or below, got {list(self.scale)}")
        if self.ratio[0] > self.ratio[1]:
            raise ValueError(f"ratio must be ascending, got {list(self.ratio)}")
        return self


class ScaleCrop(TrainCrop):
    """Shorter side to a random length, then a random `size` x `size` of that (Simonyan, Zisserman 2014; He et al. 2015,
    section 3.4)."""

    kind: Literal["scale_crop"]
    shorter_side: tuple[PositiveInt, PositiveInt] = (256, 480)
    """Range of the shorter side, px, both ends included."""

    @model_validator(mode="after")
    def _range(self) -> ScaleCrop:
        low, high = self.shorter_side
        if not self.size <= low <= high <= MAX_SIZE:
            raise ValueError(f"shorter_side must ascend from size ({self.size}) or above, got {[low, high]}")
        return self


class PadCrop(TrainCrop):
    """Pad every side with zeros, then crop `size` x `size` at random (He et al. 2015, section 4.2).

    All images must be `size` x `size`.
    """

    kind: Literal["pad_crop"]
    pad: NonNegativeInt = 4
    """Zeros on every side, px."""


class CenterCrop(Section):
    """Shorter side to `resize`, then the central `size` x `size`: the 1-crop test protocol."""

    kind: Literal["center_crop"]
    size: Annotated[int, Field(gt=0, le=MAX_SIZE)]
    resize: Annotated[int, Field(gt=0, le=MAX_SIZE)]

    @model_validator(mode="after")
    def _fits(self) -> CenterCrop:
        if self.size > self.resize:
            raise ValueError(f"size ({self.size}) must not be larger than resize ({self.resize})")
        return self


TrainTransform = Annotated[RandomResizedCrop | ScaleCrop | PadCrop, Field(discriminator="kind")]


class Mixing(Section):
    """Images of a micro-batch mixed in pairs, and their targets alike; with both kinds each has half of the chances."""

    mixup_alpha: Annotated[float, Field(gt=0, le=2)] | None = None
    """Mixup (Zhang et al. 2017): an image's share is drawn from Beta(alpha, alpha)."""
    cutmix_alpha: Annotated[float, Field(gt=0, le=2)] | None = None
    """CutMix (Yun et al. 2019): the share that a rectangle of the other image leaves, drawn from Beta(alpha, alpha)."""
    probability: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of a micro-batch being mixed at all."""

    @model_validator(mode="after")
    def _any(self) -> Mixing:
        if self.mixup_alpha is None and self.cutmix_alpha is None:
            raise ValueError("set mixup_alpha, cutmix_alpha or both")
        return self


class ProgressiveSize(Section):
    """Smaller training images at first: `start_size` px, then growing epoch by epoch to `data.train.size` (as
    ffcv-imagenet)."""

    start_size: PositiveInt
    ramp: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]]
    """Where growing begins and ends, as shares of the run, rounded down to whole epochs."""
    multiple: PositiveInt = 32
    """Sizes between are multiples of this, px."""


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
    mixing: Mixing | None = None
    """Mixup and CutMix, within every micro-batch."""
    progressive_size: ProgressiveSize | None = None
    augmentation_repeats: PositiveInt = 1
    """Repeated augmentation (Hoffer et al. 2020): a global batch holds each of its images this many times, augmented
    differently and in different micro-batches. An epoch has as many steps as without, so it shows fewer images."""
    shuffle: Literal["full", "page"] = "full"
    """full: any sample at any place of the epoch. page: the samples of a beton's page near each other, for betons that
    are larger than memory."""
    shuffle_window_pages: PositiveInt = 1024
    """page: how many pages are mixed at any time; twice as many should fit into memory. Two neighbours come from one
    page once in this many."""
    on_bad_sample: OnBadSample = "error"
    """What a training image that cannot be decoded does. error: ends the run and is named. skip: another takes its
    place, chosen by (seed, epoch, sample id), and `data/replaced_samples` counts it. In evaluation it is an error."""

    allow_overlap: bool = False
    """Whether validation images may be training images too, to overfit on purpose. Otherwise a run is refused where
    more than 1 % are. It changes no number, so a run may be resumed with another value."""

    @model_validator(mode="after")
    def _grows(self) -> DataConfig:
        progressive = self.progressive_size
        if progressive is None:
            return self
        if isinstance(self.train, PadCrop):
            raise ValueError("progressive_size needs a crop that resizes; pad_crop does not")
        if progressive.start_size > self.train.size:
            raise ValueError(f"progressive_size.start_size must be train.size ({self.train.size}) or less")
        if progressive.ramp[0] > progressive.ramp[1]:
            raise ValueError(f"progressive_size.ramp must ascend, got {list(progressive.ramp)}")
        return self

    @model_validator(mode="after")
    def _grey_levels(self) -> DataConfig:
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {list(self.std)}")
        if 0 < max(self.mean) <= 1 or max(self.std) < 1:
            raise ValueError(
                f"mean {list(self.mean)} and std {list(self.std)} look like shares of 1; they are grey levels 0..255: "
                "multiply them by 255"
            )
        if not 0 <= min(self.mean) <= max(self.mean) <= 255 or max(self.std) > 255:
            raise ValueError(f"mean {list(self.mean)} and std {list(self.std)} are not grey levels 0..255")
        return self
