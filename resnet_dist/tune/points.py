"""Points of a space that need no model: random, Sobol and grid ones. Pure functions of the space and a number."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import qmc

from resnet_dist.config.space import Space
from resnet_dist.config.space_parameters import (
    Choice,
    Derived,
    Grid,
    LogUniform,
    Parameter,
    QUniform,
    Uniform,
    listed_values,
)

Point = dict[str, Any]
"""The values of the free parameters that are active there, by key, in the order of the space."""
PointKey = Callable[[Point], Hashable]
"""Equal for points that are the same run."""
_DRAWS = (1, 4, 16)
"""Times as many points as are wanted are drawn before a space counts as exhausted."""


def planned_points(space: Space, num: int, key: PointKey = repr) -> list[Point] | None:
    """The first `num` different points, given ones first; None if a model proposes them as results come in.

    Points of one `key` are the same: a run of one recipe ends in the same bits, so to try it twice teaches nothing.
    There are fewer than `num` where the space holds no more.
    """
    first = [dict(point) for point in space.first_points]
    found: dict[Hashable, Point] = {}
    for factor in _DRAWS:
        match space.search.kind:
            case "grid":
                points = grid_points(space)
            case "random":
                points = [random_point(space, space.search.seed, index) for index in range(num * factor)]
            case "sobol":
                points = sobol_points(space, space.search.seed, num * factor)
            case _:
                return None
        for point in [*first, *points]:
            found.setdefault(key(point), point)
        if len(found) >= num or space.search.kind == "grid":
            break
    return list(found.values())[:num]


def random_point(space: Space, seed: int, index: int) -> Point:
    """Independent of all other points, so a sweep can be made longer and started again."""
    return _point(space, np.random.default_rng([seed, index]).random(len(space.free)).tolist())


def sobol_points(space: Space, seed: int, num: int) -> list[Point]:
    """The first `num` points of one scrambled sequence: a longer one begins with a shorter one."""
    sequence = qmc.Sobol(len(space.free), scramble=True, rng=np.random.default_rng(seed))
    return [_point(space, row) for row in sequence.random_base2(max(0, math.ceil(math.log2(num))))[:num].tolist()]


def grid_points(space: Space) -> list[Point]:
    """Every combination, the last parameter changing fastest; combinations that differ in nothing active once."""
    values = [listed_values(parameter) or () for parameter in space.free.values()]
    points: list[Point] = []
    for combination in itertools.product(*values):
        point = _active(space, dict(zip(space.free, combination, strict=True)))
        if point not in points:
            points.append(point)
    return points


def is_active(parameter: Parameter, values: Mapping[str, Any]) -> bool:
    """Whether the conditions of `parameter` hold where the other parameters have `values`."""
    return all(
        key in values and (values[key] in wanted if isinstance(wanted, list) else values[key] == wanted)
        for key, wanted in parameter.when.items()
    )


def lies_in(space: Space, point: Mapping[str, Any]) -> bool:
    """Whether the space could have proposed `point`."""
    return (
        set(point) == set(_active(space, dict(point)))
        and all(key in point or not is_active(parameter, point) for key, parameter in space.free.items())
        and all(_holds(space.space[key], value) for key, value in point.items())
    )


def _holds(parameter: Parameter, value: Any) -> bool:
    match parameter:
        case LogUniform() | Uniform() | QUniform():
            return isinstance(value, int | float) and parameter.low <= value <= parameter.high
        case Choice() | Grid():
            return value in (listed_values(parameter) or ())
        case Derived():
            return False


def _point(space: Space, shares: Sequence[float]) -> Point:
    values = {key: _at(parameter, share) for (key, parameter), share in zip(space.free.items(), shares, strict=True)}
    return _active(space, values)


def _active(space: Space, values: Point) -> Point:
    point: Point = {}
    for key, parameter in space.free.items():
        if key in values and is_active(parameter, point):
            point[key] = values[key]
    return point


def _at(parameter: Parameter, share: float) -> Any:
    """The value that this share of the parameter's probability lies below; 0 <= share < 1. Six digits are enough."""
    match parameter:
        case LogUniform(low=low, high=high):
            return float(f"{low * (high / low) ** share:.6g}")
        case Uniform(low=low, high=high):
            return float(f"{low + (high - low) * share:.6g}")
        case QUniform():
            return parameter.value(int(share * parameter.num_values))
        case Choice(values=values):
            return values[int(share * len(values))]
        case _:
            raise AssertionError(f"{parameter.kind} is not drawn")
