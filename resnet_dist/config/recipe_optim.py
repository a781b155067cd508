"""A recipe's optimizer and learning-rate schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from resnet_dist.config.base import Section


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
