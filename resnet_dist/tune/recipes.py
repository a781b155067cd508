"""From a point of the space to a recipe: of the cheap proxy for a trial, of the whole base for the result. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resnet_dist.config.loading import recipe_from_tree
from resnet_dist.config.recipe import Recipe, recipe_hash
from resnet_dist.config.space import COORDINATES, LR_PER_256, TAU_EPOCHS, Space
from resnet_dist.config.space_parameters import Derived
from resnet_dist.errors import UserError
from resnet_dist.tune.coordinates import lr_of, lr_per_256_of, tau_epochs_of, weight_decay_of
from resnet_dist.tune.points import Point, is_active


@dataclass(frozen=True)
class Builder:
    """Makes recipes of points. `base`: the base recipe's file as read; sample counts are of the training sets."""

    space: Space
    base: Mapping[str, Any]
    num_proxy_samples: int
    num_base_samples: int | None = None
    """None: of the base recipe's own data, which are not here; then those of the proxy count."""

    def proxy(self, point: Point, seed_number: int = 0) -> Recipe:
        """What a trial trains. Raises ValueError with every mistake in one line."""
        return self._build(point, self.space.proxy, self.num_proxy_samples, seed_number)

    def full(self, point: Point) -> Recipe:
        """The base recipe with the point's values and without the proxy's overrides. Raises ValueError."""
        return self._build(point, {}, self.num_base_samples or self.num_proxy_samples, 0)

    def key(self, point: Point) -> str:
        """Equal for points whose trials are the same run, whatever they are written like."""
        try:
            return recipe_hash(self.proxy(point))
        except ValueError:
            return repr(point)  # a mistake, told elsewhere

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
    """The recipe of a trial before any point is put in. UserError with every mistake of base and proxy."""
    try:
        return recipe_from_tree(base, space.proxy)
    except ValueError as error:
        raise UserError(f"{where}: the base recipe with the proxy's keys: {error}") from None


def require_buildable(builder: Builder, points: Sequence[Point], where: str) -> None:
    """UserError with every different mistake that the points' recipes have, each with the first point that has it."""
    found: dict[str, str] = {}
    for point in points:
        for kind, build in (("trial", builder.proxy), ("best recipe", builder.full)):
            try:
                build(point)
            except ValueError as error:
                found.setdefault(f"{kind}: {error}", f"the {kind} of {describe(point)}: {error}")
    _raise(list(found.values()), where)


def describe(point: Mapping[str, Any]) -> str:
    """`optim.lr 0.1, optim.weight_decay 0.0001`."""
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in point.items()
    )


def coordinates_of(recipe: Recipe, num_samples: int) -> dict[str, float]:
    """(lr_per_256, tau_epochs) of a recipe, whatever it was searched by."""
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
    """What the coordinates in `values` make of learning rate and weight decay, everything else being known."""
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
    """That of SGD; lamb's rate is not multiplied by any."""
    return recipe.optim.momentum if recipe.optim.name == "sgd" else 0.0


def _derived(parameter: Derived, values: Mapping[str, Any], recipe: Recipe) -> int | float:
    if parameter.of in values:
        source = values[parameter.of]
    else:
        source = recipe.model_dump()
        for key in parameter.of.split("."):
            source = source.get(key) if isinstance(source, dict) else None
    if not isinstance(source, int | float) or isinstance(source, bool):
        raise ValueError(f"derived from {parameter.of}, which is no number but {source!r}")
    value = parameter.factor * source**parameter.power
    return round(value) if parameter.round else value


def _raise(mistakes: Sequence[str], where: str) -> None:
    if len(mistakes) == 1:
        raise UserError(f"{where}: {mistakes[0]}")
    if mistakes:
        listed = "; ".join(f"({number}) {mistake}" for number, mistake in enumerate(mistakes, 1))
        raise UserError(f"{where}: {len(mistakes)} mistakes: {listed}")
