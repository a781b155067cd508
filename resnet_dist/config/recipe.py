"""The recipe: everything that decides the numbers of a run, and nothing else.

A recipe names no host, path, worker count or GPU. Two runs of one recipe on one data set end with the same result
whatever the hardware was, so its hash (`recipe_hash`) stands in every checkpoint and a checkpoint of another recipe is
refused.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from resnet_dist.config.base import Section

Channels = tuple[float, float, float]


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


class DivergenceConfig(Section):
    """What to do with a step whose loss is no number, or too large."""

    action: Literal["stop", "skip"] = "stop"
    """stop: end the run. skip: go back to the last checkpoint and leave that step's global batch out."""
    max_loss: PositiveFloat | None = None
    """A step's mean loss above this counts as diverged; null: only one that is no number does."""
    max_skips: PositiveInt = 10
    """Give up after this many skipped steps."""


class TrainConfig(Section):
    global_batch_size: PositiveInt
    """Images per optimizer step, over all workers."""
    micro_batch_size: PositiveInt
    """Images per forward pass: the unit of batch-norm statistics and of data order; workers share a step's."""
    total_epochs: PositiveInt
    max_steps: PositiveInt | None = None
    """End the run after this many steps; the schedule still runs over `total_epochs`."""
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """bf16: autocast with fp32 weights. fp64: everything in double, to prove equalities."""
    reduction: Literal["fast", "exact"] = "fast"
    """fast: DDP's bucketed all-reduce; equal across worker counts up to float rounding. exact: micro-batches' gradients
    summed in one fixed order, deterministic kernels: the same bits for any worker count on one kind of hardware."""
    divergence: DivergenceConfig = DivergenceConfig()
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    channels_last: bool = True
    cpu_threads: PositiveInt = 1
    """Intra-op threads on CPUs. A CPU kernel's sums depend on it, so it belongs to the mathematics."""

    @property
    def num_micro_batches(self) -> int:
        return self.global_batch_size // self.micro_batch_size

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> TrainConfig:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple "
                f"of micro_batch_size ({self.micro_batch_size})"
            )
        return self


class OptimConfig(Section):
    name: Literal["sgd"]
    lr: PositiveFloat
    """Peak learning rate, for the whole global batch."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: NonNegativeFloat
    """Coupled L2 term; applied to the weights of convolutions and linear layers only."""


class Warmup(Section):
    """Linear warm-up from `start_factor * lr` to `lr` (Goyal et al. 2017, section 2.2)."""

    epochs: NonNegativeFloat = 0.0
    start_factor: Annotated[float, Field(ge=0, le=1)] = 0.0


class StepSchedule(Section):
    kind: Literal["step"]
    milestone_fractions: tuple[Annotated[float, Field(gt=0, lt=1)], ...]
    """Where the rate drops, as shares of the whole run, ascending."""
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    warmup: Warmup = Warmup()

    @model_validator(mode="after")
    def _ascending(self) -> StepSchedule:
        if list(self.milestone_fractions) != sorted(set(self.milestone_fractions)):
            raise ValueError(f"milestone_fractions must ascend, got {list(self.milestone_fractions)}")
        return self


class CosineSchedule(Section):
    kind: Literal["cosine"]
    final_factor: Annotated[float, Field(ge=0, le=1)] = 0.0
    warmup: Warmup = Warmup()


class LinearSchedule(Section):
    kind: Literal["linear"]
    final_factor: Annotated[float, Field(ge=0, le=1)] = 0.0
    warmup: Warmup = Warmup()


ScheduleConfig = Annotated[StepSchedule | CosineSchedule | LinearSchedule, Field(discriminator="kind")]


class EvalConfig(Section):
    batch_size: PositiveInt
    """Images per forward pass. It fixes the batches, so the loss does not depend on the worker count."""
    every_epochs: PositiveInt = 1
    """Evaluate after every this many epochs, and always after the last step."""


class Recipe(Section):
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    eval: EvalConfig


def recipe_hash(recipe: Recipe) -> str:
    """16 hex digits of the SHA-256 of the recipe's canonical JSON (sorted keys, defaults filled in)."""
    canonical = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
