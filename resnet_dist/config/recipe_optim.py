"""A recipe's optimizer and learning-rate schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from resnet_dist.config.base import Section


class OptimConfig(Section):
    name: Literal["sgd", "lamb"]
    """sgd: torch's. lamb: timm's (You et al. 2019), with which the "ResNet strikes back" recipes were trained."""
    lr: PositiveFloat
    """Peak learning rate, for the whole global batch."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """sgd only."""
    nesterov: bool = False
    """sgd only."""
    weight_decay: NonNegativeFloat
    """Coupled: `weight_decay * w` is added to the gradient (sgd), or to the update before it is scaled (lamb)."""
    decay: Literal["weights", "all"] = "weights"
    """weights: only those of convolutions and linear layers decay. all: biases and batch norms too (torchvision V1)."""
    clip_grad_norm: PositiveFloat | None = None
    """A gradient that is longer than this, all parameters together, is scaled down to it; null: none is. The "ResNet
    strikes back" recipes clip at 1 (timm's LAMB does so by itself; here only this key does)."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> OptimConfig:
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError("nesterov needs name: sgd and a momentum above 0")
        return self


class Warmup(Section):
    """From `start_factor * lr` to `lr`."""

    epochs: NonNegativeFloat = 0.0
    start_factor: Annotated[float, Field(ge=0, le=1)] = 0.0
    shape: Literal["linear", "constant"] = "linear"
    """linear: in equal steps (Goyal et al. 2017, section 2.2). constant: `start_factor * lr` until it ends (He et al.
    2015, section 4.2, for 110 layers)."""


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


class PlateauSchedule(Section):
    """The rate drops when the validation error stops falling (He et al. 2015, section 3.4).

    Decided by the exact evaluation, so it is the same for any number of workers.
    """

    kind: Literal["plateau"]
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    patience: PositiveInt = 5
    """The rate drops after this many evaluations in a row without a new best."""
    min_improvement: NonNegativeFloat = 0.1
    """By how many points of top-1 error, in percent, a new best must be better."""
    max_drops: PositiveInt = 3
    warmup: Warmup = Warmup()


class CosineSchedule(Section):
    kind: Literal["cosine"]
    final_factor: Annotated[float, Field(ge=0, le=1)] = 0.0
    warmup: Warmup = Warmup()


class LinearSchedule(Section):
    kind: Literal["linear"]
    final_factor: Annotated[float, Field(ge=0, le=1)] = 0.0
    warmup: Warmup = Warmup()


ScheduleConfig = Annotated[
    StepSchedule | PlateauSchedule | CosineSchedule | LinearSchedule, Field(discriminator="kind")
]
