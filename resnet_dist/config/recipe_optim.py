"""A recipe's optimizer and learning-rate schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

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
