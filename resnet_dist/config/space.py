"""The search space: a base recipe, what makes a cheap proxy of it, and where to look for better values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from resnet_dist.config.base import Section, without_recorded_defaults
from resnet_dist.config.space_parameters import Choice, Derived, Grid, Parameter, Value, listed_values
from resnet_dist.config.space_search import (
    Budget,
    CmaSearch,
    Fifo,
    GridSearch,
    HyperBand,
    RandomSearch,
    Resources,
    SchedulerConfig,
    SearchConfig,
    TpeSearch,
)

Metric = Literal["val/top1", "val/top5", "val/top1_error", "val/top5_error", "val/loss"]
LR_PER_256 = "lr_per_256"
TAU_EPOCHS = "tau_epochs"
COORDINATES = {LR_PER_256: "optim.lr", TAU_EPOCHS: "optim.weight_decay"}
"""Keys of a space that are no keys of a recipe, and the recipe's key that each decides: see `tune.coordinates`."""


class Space(Section):
    base: str
    """The recipe's file; a relative path starts at the space's own folder."""
    proxy: dict[str, Value] = Field(default_factory=dict)
    """Keys of the recipe that make a trial cheap: fewer epochs, smaller images. `best_recipe.yaml` leaves them out."""
    space: dict[str, Parameter]
    """By key of the recipe (`optim.lr`), or `lr_per_256` and `tau_epochs`."""
    search: SearchConfig = RandomSearch(kind="random")
    scheduler: SchedulerConfig = Fifo(kind="fifo")
    metric: Metric = "val/top1"
    """Of the last evaluation; a validation metric, so that trials are compared by the same images."""
    trials: PositiveInt | None = None
    """How many points; a grid has all of its own if this is null."""
    seeds: PositiveInt = 1
    """Runs of every point that reaches its end, with the recipe's seed, that plus 1, and so on: tells noise from
    progress."""
    first_points: list[dict[str, Value]] = Field(default_factory=list)
    """Points to try before all others: what is known already."""
    warm_start: list[str] = Field(default_factory=list)
    """Folders of earlier sweeps: tpe and cma learn from those with the same proxy, every search tries their best points
    first otherwise."""
    budget: Budget = Budget()
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _consistent(self) -> Space:
        mistakes = [*self._mistakes()]
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    def _mistakes(self) -> list[str]:
        found: list[str] = []
        if "seed" in self.space:
            found.append("space.seed: a seed is no hyper-parameter; set seeds to repeat every point")
        if not self.space:
            found.append("space is empty: name at least one key of the recipe to search, for example optim.lr")
        grid = isinstance(self.search, GridSearch)
        for key, parameter in self.space.items():
            if grid and not isinstance(parameter, Grid | Choice | Derived):
                found.append(f"space.{key}: a grid needs kind grid, choice or derived, got {parameter.kind}")
            if not grid and isinstance(parameter, Grid):
                found.append(f"space.{key}: kind grid needs search: {{kind: grid}}; or make it a choice")
            if isinstance(self.search, CmaSearch) and (isinstance(parameter, Choice) or parameter.when):
                found.append(f"space.{key}: cma searches numbers without conditions; take tpe")
            before = dict(list(self.space.items())[: list(self.space).index(key)])
            found += _mistakes_of_when(key, parameter, before)
            if isinstance(parameter, Derived):
                found += self._mistakes_of_derived(key, parameter, before)
        for coordinate, decided in COORDINATES.items():
            if coordinate in self.space and decided in self.space:
                found.append(f"space: {coordinate} decides {decided}; leave one of them out")
        if all(isinstance(parameter, Derived) for parameter in self.space.values()) and self.space:
            found.append("space: all parameters are derived; one must be free")
        if isinstance(self.search, CmaSearch) and sum(not isinstance(p, Derived) for p in self.space.values()) < 2:
            found.append("search: cma needs two or more free parameters; take tpe")
        if isinstance(self.search, TpeSearch | CmaSearch) and isinstance(self.scheduler, HyperBand):
            found.append("scheduler: hyperband fills its brackets before anything is known; take asha or median")
        if self.trials is None and not grid:
            found.append("trials: is missing; only a grid knows its own number")
        if self.resources.gpus > 1:
            found.append(f"resources.gpus: a light trial uses at most 1, got {self.resources.gpus:g}")
        for point in self.first_points:
            unknown = sorted(set(point) - set(self.free))
            if unknown:
                found.append(f"first_points: {', '.join(unknown)} not among the free parameters of space")
            found += [
                f"first_points: {key} {point[key]!r}, expected {expected}"
                for key, parameter in self.free.items()
                if key in point and (expected := _expected(parameter, point[key]))
            ]
        return found

    def _mistakes_of_derived(self, key: str, parameter: Derived, before: Mapping[str, Parameter]) -> list[str]:
        by = next((c for c, decided in COORDINATES.items() if decided == parameter.of and c in self.space), None)
        if by is not None:
            return [f"space.{key}.of: {parameter.of} is decided by {by}; derive from {by}"]
        later = isinstance(self.space.get(parameter.of), Derived) and parameter.of not in before
        return [f"space.{key}.of: {parameter.of} is derived too and must stand before it"] if later else []

    @property
    def higher_is_better(self) -> bool:
        return self.metric in ("val/top1", "val/top5")

    @property
    def free(self) -> dict[str, Parameter]:
        """The parameters that somebody has to choose."""
        return {key: parameter for key, parameter in self.space.items() if not isinstance(parameter, Derived)}


def _mistakes_of_when(key: str, parameter: Parameter, before: Mapping[str, Parameter]) -> list[str]:
    found: list[str] = []
    for other, wanted in parameter.when.items():
        if other not in before:
            found.append(f"space.{key}.when: {other} is not a parameter that stands before it in space")
        elif isinstance(before[other], Derived) and not isinstance(parameter, Derived):
            found.append(f"space.{key}.when: {other} is derived, which is known only after all free ones")
        else:
            found += [
                f"space.{key}.when: {other} is never {value!r}, expected {expected}"
                for value in (wanted if isinstance(wanted, list) else [wanted])
                if not isinstance(before[other], Derived) and (expected := _expected(before[other], value))
            ]
    return found


def _expected(parameter: Parameter, value: Any) -> str | None:
    """What the parameter could be instead of `value`; None: it could be that, or a number out of its range."""
    listed = listed_values(parameter)
    if listed is not None:
        return None if value in listed else f"one of {', '.join(map(str, listed))}"
    return None if isinstance(value, int | float) and not isinstance(value, bool) else "a number"


RECORDED_DEFAULTS: Mapping[str, Any] = {}
"""Keys that were added after spaces were first hashed, see `without_recorded_defaults`."""


def sweep_hash(space: Space, base: dict[str, Any]) -> str:
    """16 hex digits of what may not change while a sweep goes on: not the number of trials or seeds, budget, resources.

    `base`: the recipe as read. The folder of the space's file does not matter.
    """
    free = {"base", "trials", "seeds", "budget", "resources", "warm_start"}
    dumped = without_recorded_defaults(space.model_dump(mode="json", exclude=free), RECORDED_DEFAULTS)
    tree: dict[str, Any] = {"space": dumped, "base": base}
    # The order of the parameters decides which random number each takes.
    tree["order"] = list(space.space)
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
