"""A search space's parameters: from which values each key of a recipe is drawn."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from resnet_dist.config.base import Section


def as_number(value: Any) -> Any:
    """PyYAML reads `1e-3` as text; a key's value would be read right by the recipe, but nobody could reckon with it."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def as_numbers(value: Any) -> Any:
    return [as_number(item) for item in value] if isinstance(value, list) else as_number(value)


Value = Annotated[Any, BeforeValidator(as_number)]
Wanted = Annotated[Any, BeforeValidator(as_numbers)]
"""A value, or a list of values of which one is wanted."""


class _Parameter(Section):
    when: dict[str, Wanted] = Field(default_factory=dict)
    """Only where other parameters have these values: `{schedule.kind: step}`, or a list of values. Otherwise the key
    keeps what the recipe says."""


class _Interval(_Parameter):
    low: float
    high: float

    @model_validator(mode="after")
    def _ascending(self) -> _Interval:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be less than high ({self.high:g})")
        return self


class LogUniform(_Interval):
    """Each factor is as likely as any other: learning rates, weight decays."""

    kind: Literal["loguniform"]
    low: PositiveFloat


class Uniform(_Interval):
    kind: Literal["uniform"]


class QUniform(_Interval):
    """Multiples of `step` from `low` to `high`; whole numbers if `low` and `step` are."""

    kind: Literal["quniform"]
    step: PositiveFloat

    @property
    def num_values(self) -> int:
        return int((self.high - self.low) / self.step + 1e-9) + 1

    def value(self, index: int) -> int | float:
        value = self.low + index * self.step
        whole = self.low.is_integer() and self.step.is_integer()
        return int(value) if whole else float(f"{value:.12g}")


class Choice(_Parameter):
    kind: Literal["choice"]
    values: Annotated[list[Value], Field(min_length=1)]


class Grid(_Parameter):
    """Every value, combined with every value of the other grids: a list, or `num` values from `low` to `high`."""

    kind: Literal["grid"]
    values: Annotated[list[Value], Field(min_length=1)] | None = None
    low: float | None = None
    high: float | None = None
    num: PositiveInt | None = None
    log: bool = False
    """Equal factors instead of equal differences."""

    @model_validator(mode="after")
    def _one_way(self) -> Grid:
        ends = (self.low, self.high, self.num)
        if (self.values is None) == (ends == (None, None, None)) or (self.values is None and None in ends):
            raise ValueError("give either values, or low, high and num")
        if self.low is not None and self.high is not None:
            if self.low >= self.high:
                raise ValueError(f"low ({self.low:g}) must be less than high ({self.high:g})")
            if self.log and self.low <= 0:
                raise ValueError(f"low ({self.low:g}) must be positive with log: true")
        return self

    def all_values(self) -> list[Any]:
        if self.values is not None:
            return list(self.values)
        assert self.low is not None
        assert self.high is not None
        assert self.num is not None
        shares = [i / max(self.num - 1, 1) for i in range(self.num)]
        if self.log:
            return [float(f"{self.low * (self.high / self.low) ** share:.6g}") for share in shares]
        return [float(f"{self.low + (self.high - self.low) * share:.6g}") for share in shares]


class Derived(_Parameter):
    """`factor * (value of the key `of`) ** power`: a key that follows another one."""

    kind: Literal["derived"]
    of: str
    factor: float = 1.0
    power: float = 1.0
    round: bool = False
    """To the nearest whole number."""


Parameter = Annotated[LogUniform | Uniform | QUniform | Choice | Grid | Derived, Field(discriminator="kind")]


def listed_values(parameter: Parameter) -> list[Any] | None:
    """All values of a choice or a grid; None: it is another kind."""
    if isinstance(parameter, Choice):
        return list(parameter.values)
    return parameter.all_values() if isinstance(parameter, Grid) else None
