"""Points of a space, and the recipes made of them. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import qmc

from resnet_dist.config.loading import recipe_from_tree
from resnet_dist.config.recipe import Recipe, recipe_hash
from resnet_dist.config.space import (
    COORDINATES,
    LR_PER_256,
    TAU_EPOCHS,
    Carry,
    Choice,
    Derived,
    Grid,
    LogUniform,
    Parameter,
    QUniform,
    Space,
    Uniform,
    listed_values,
)
from resnet_dist.errors import UserError

Point = dict[str, Any]
"""The values of the free parameters that are active at this point, by key, in the order of the space."""
PointKey = Callable[[Point], Hashable]
"""Equal for points that are the same run."""
_DRAWS = (1, 4, 16)
"""How many times the wanted number of points are drawn before a space counts as exhausted."""


def planned_points(
    space: Space, num: int, key: PointKey = repr, tried: Collection[Hashable] = ()
) -> list[Point] | None:
    """The first `num` different points, given ones first; None if a model proposes them as results come in.

    Points with the same `key` are the same run, so one of them is enough. Fewer than `num` if the space has no more.

    Args:
        tried: keys of points that earlier sweeps have trained; they are left out.
    """
    first = [dict(point) for point in space.first_points]
    found: dict[Hashable, Point] = {}
    wanted = num + len(tried)
    for factor in _DRAWS:
        match space.search.kind:
            case "grid":
                points = grid_points(space)
            case "random":
                points = [random_point(space, space.search.seed, index) for index in range(wanted * factor)]
            case "sobol":
                points = sobol_points(space, space.search.seed, wanted * factor)
            case _:
                return None
        for point in [*first, *points]:
            if (name := key(point)) not in tried:
                found.setdefault(name, point)
        if len(found) >= num or space.search.kind == "grid":
            break
    return list(found.values())[:num]


def random_point(space: Space, seed: int, index: int) -> Point:
    """Depends on `seed` and `index` alone, so a sweep can resume and be made longer."""
    return _point(space, np.random.default_rng([seed, index]).random(len(space.free)).tolist())


def sobol_points(space: Space, seed: int, num: int) -> list[Point]:
    """The first `num` points of a scrambled sequence: a longer sweep begins with the points of a shorter one."""
    sequence = qmc.Sobol(len(space.free), scramble=True, rng=np.random.default_rng(seed))
    return [_point(space, row) for row in sequence.random_base2(max(0, math.ceil(math.log2(num))))[:num].tolist()]


def grid_points(space: Space) -> list[Point]:
    """Every combination, the last parameter changing fastest; those that differ in inactive parameters only, once."""
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


def contains(space: Space, point: Mapping[str, Any]) -> bool:
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
    """The `share` quantile of the parameter's distribution, 0 <= share < 1, to six digits."""
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


def position(space: Space, point: Mapping[str, Any]) -> tuple[float, ...]:
    """Where the point is in the unit cube: the inverse of `_at`, so that points that are near have recipes alike.

    A grid's values count by their order; a choice has one coordinate for each value, so that no two of them are near.
    """
    found: list[float] = []
    for key, parameter in space.free.items():
        value = point.get(key)  # none where its conditions do not hold
        match parameter:
            case Choice(values=values):
                found += [float(value == other) for other in values]
            case Grid():
                values = parameter.all_values()
                found.append(values.index(value) / max(len(values) - 1, 1) if value in values else 0.0)
            case LogUniform(low=low, high=high):
                found.append(math.log(value / low) / math.log(high / low) if value is not None else 0.0)
            case Uniform(low=low, high=high) | QUniform(low=low, high=high):
                found.append((value - low) / (high - low) if value is not None else 0.0)
    return tuple(found)


# Published recipes agree better on these two coordinates than on learning rate and weight decay. Where batch norm
# follows a weight, only the product lr * wd decides the size of a relative step in the long run, so good values of lr
# and wd are on a ridge; in (lr_per_256, tau_epochs) that ridge is parallel to an axis.


def lr_of(lr_per_256: float, *, global_batch_size: int) -> float:
    """The learning rate of the global batch, by the linear scaling rule (Goyal et al. 2017, arXiv 1706.02677)."""
    return lr_per_256 * global_batch_size / 256


def lr_per_256_of(lr: float, *, global_batch_size: int) -> float:
    return lr * 256 / global_batch_size


def weight_decay_of(tau_epochs: float, *, lr: float, momentum: float, steps_per_epoch: int) -> float:
    """The weight decay with which the weights are an exponential moving average of their updates over `tau_epochs`.

    Wang and Aitchison 2024, arXiv 2405.13698; for SGD, lr / (1 - momentum) is the rate that momentum amounts to.
    """
    return (1 - momentum) / (lr * tau_epochs * steps_per_epoch)


def tau_epochs_of(weight_decay: float, *, lr: float, momentum: float, steps_per_epoch: int) -> float:
    """The inverse of `weight_decay_of`; infinite without weight decay."""
    if weight_decay == 0:
        return float("inf")
    return (1 - momentum) / (lr * weight_decay * steps_per_epoch)


@dataclass(frozen=True)
class Builder:
    """Makes the recipe of a point: the cheap proxy for a trial, the whole base for the result.

    Args:
        base: the base recipe's file as read.
        num_proxy_samples: images of the proxy's training set.
        num_base_samples: those of the base recipe's own training set; None if it is not here: then the proxy's count.
    """

    space: Space
    base: Mapping[str, Any]
    num_proxy_samples: int
    num_base_samples: int | None = None

    def proxy(self, point: Point, seed_number: int = 0) -> Recipe:
        """The recipe of a trial. Raises ValueError with all mistakes in one line."""
        return self._build(point, self.space.proxy, self.num_proxy_samples, seed_number)

    def short(self, point: Point, epochs: int, carry: Carry) -> Recipe:
        """The proxy with its whole schedule, warm-up included, in `epochs`. Raises ValueError."""
        whole = self.proxy(point)
        ratio = epochs / whole.train.total_epochs
        overrides: dict[str, Any] = {"train.total_epochs": epochs, "eval.every_epochs": epochs}
        if whole.schedule.warmup.epochs:
            overrides["schedule.warmup.epochs"] = whole.schedule.warmup.epochs * ratio
        if carry == "tau_share":
            overrides["optim.weight_decay"] = float(f"{whole.optim.weight_decay / ratio:.6g}")
        return recipe_from_tree(whole.model_dump(mode="json"), overrides)

    def cooldown(self, point: Point, checkpoint: str, cooldown: float) -> Recipe:
        """The proxy from its checkpoint on, with the rate going to zero. Raises ValueError."""
        fork = {"checkpoint": checkpoint, "schedule": "cooldown", "cooldown": cooldown}
        return recipe_from_tree(self.proxy(point).model_dump(mode="json"), {"fork": fork})

    def full(self, point: Point) -> Recipe:
        """The base recipe with the point's values and without the proxy's overrides. Raises ValueError."""
        return self._build(point, {}, self.num_base_samples or self.num_proxy_samples, 0)

    def key(self, point: Point) -> str:
        """Equal for points whose trials are the same run, however they are written; numbers count to six digits."""
        try:
            return recipe_hash(self.proxy(rounded(point)))
        except ValueError:
            return repr(point)  # `require_buildable` reports the mistake

    def _build(self, point: Point, proxy: Mapping[str, Any], num_samples: int, seed_number: int) -> Recipe:
        values: dict[str, Any] = dict(point)
        for key, parameter in self.space.space.items():
            if isinstance(parameter, Derived) and is_active(parameter, values):
                values[key] = _derived(parameter, values, recipe_from_tree(self.base, proxy))
        plain = {key: value for key, value in values.items() if key not in COORDINATES}
        recipe = recipe_from_tree(self.base, {**proxy, **plain})
        overrides = {**plain, **_decided(recipe, values, num_samples), "seed": recipe.seed + seed_number}
        return recipe_from_tree(self.base, {**proxy, **overrides})


def require_proxy(space: Space, base: Mapping[str, Any], where: str) -> Recipe:
    """A trial's recipe before the values of a point are set. Raises UserError with every mistake of base and proxy."""
    try:
        return recipe_from_tree(base, space.proxy)
    except ValueError as error:
        raise UserError(f"{where}: the base recipe with the proxy's keys: {error}") from None


def require_buildable(builder: Builder, points: Sequence[Point], where: str) -> None:
    """Raises UserError with every mistake in the points' recipes, each with the first point that has it."""
    found: dict[str, str] = {}
    for point in points:
        for kind, build in (("trial", builder.proxy), ("best recipe", builder.full)):
            try:
                build(point)
            except ValueError as error:
                found.setdefault(f"{kind}: {error}", f"the {kind} of {describe(point)}: {error}")
    mistakes = list(found.values())
    if len(mistakes) == 1:
        raise UserError(f"{where}: {mistakes[0]}")
    if mistakes:
        listed = "; ".join(f"({number}) {mistake}" for number, mistake in enumerate(mistakes, 1))
        raise UserError(f"{where}: {len(mistakes)} mistakes: {listed}")


def rounded(point: Mapping[str, Any]) -> Point:
    """Its numbers to six digits."""
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in point.items()}


def describe(point: Mapping[str, Any]) -> str:
    """`optim.lr 0.1, optim.weight_decay 0.0001`."""
    return ", ".join(f"{key} {shown_value(value)}" for key, value in point.items())


def shown_value(value: Any) -> str:
    """A parameter's value: numbers to six digits."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def is_number(value: Any) -> bool:
    """Python's True is 1, a parameter's is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def coordinates_of(recipe: Recipe, num_samples: int) -> dict[str, float]:
    """(lr_per_256, tau_epochs) of a recipe, whichever keys were searched."""
    batch = recipe.train.global_batch_size
    return {
        LR_PER_256: lr_per_256_of(recipe.optim.lr, global_batch_size=batch),
        TAU_EPOCHS: tau_epochs_of(
            recipe.optim.weight_decay,
            lr=recipe.optim.lr,
            momentum=_momentum(recipe),
            steps_per_epoch=max(num_samples // batch, 1),
        ),
    }


def _decided(recipe: Recipe, values: Mapping[str, Any], num_samples: int) -> dict[str, float]:
    """Learning rate and weight decay from the coordinates in `values`, everything else being known."""
    batch, decided = recipe.train.global_batch_size, {}
    lr = recipe.optim.lr
    if LR_PER_256 in values:
        lr = decided[COORDINATES[LR_PER_256]] = lr_of(values[LR_PER_256], global_batch_size=batch)
    if TAU_EPOCHS in values:
        decided[COORDINATES[TAU_EPOCHS]] = weight_decay_of(
            values[TAU_EPOCHS],
            lr=lr,
            momentum=_momentum(recipe),
            steps_per_epoch=max(num_samples // batch, 1),
        )
    return {key: float(f"{value:.6g}") for key, value in decided.items()}


def _momentum(recipe: Recipe) -> float:
    """SGD's; LAMB's learning rate is not amplified by momentum."""
    return recipe.optim.momentum if recipe.optim.name == "sgd" else 0.0


def _derived(parameter: Derived, values: Mapping[str, Any], recipe: Recipe) -> int | float:
    if parameter.of in values:
        source = values[parameter.of]
    else:
        source = recipe.model_dump()
        for key in parameter.of.split("."):
            source = source.get(key) if isinstance(source, dict) else None
    if not is_number(source):
        raise ValueError(f"derived from {parameter.of}, which is not a number but {source!r}")
    value = parameter.factor * source**parameter.power
    return round(value) if parameter.round else value
