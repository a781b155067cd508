"""From one sweep to the next: a narrower space around what was found, and points to start with."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.beton.files import write_text_atomically
from resnet_dist.config.loading import recipe_from_tree, tree_to_yaml
from resnet_dist.config.space import COORDINATES, Choice, Derived, Grid, LogUniform, Parameter, QUniform, Space, Uniform
from resnet_dist.errors import UserError
from resnet_dist.sweeps.analysis.ranking import Ranking, rank
from resnet_dist.sweeps.ledger import Began, SweepState, read_ledger, replay
from resnet_dist.sweeps.points import Point, contains

_LEAST = 4
"""How many points must have reached their end."""
_MARGIN = 0.5
"""How far a range extends beyond the outermost kept points, in mean distances between them."""
_SAME = 0.005
"""Relative difference below which a new value is one of the old grid's: new ones have three digits."""
_BEST = 3
"""How many points of a sweep over another proxy are tried first."""

IsAllowed = Callable[[str, float], bool]
"""Whether a recipe may have this value at this key."""


def narrowed(
    space: Space, ranking: Ranking, keep: float, is_allowed: IsAllowed
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The next space around the best share `keep` of all points.

    A range whose best point is near one of its ends is extended beyond that end, where `is_allowed`. Points that may
    be as good as the best, within the noise, are kept too.

    Returns the parameters of the next space, and a line on each. Raises UserError with too few points.
    """
    done = [row for row in ranking.rows if row.num_runs]
    if len(done) < _LEAST:
        raise UserError(
            f"narrow: {len(done)} points have reached their end, {_LEAST} are needed; run more trials first"
        )
    number = max(_LEAST, math.ceil(keep * len(ranking.rows)))
    kept = [row for place, row in enumerate(done) if place < number or row.in_noise]
    level = [done[0], *(row for row in done if row.in_noise)]
    parameters: dict[str, dict[str, Any]] = {}
    words: list[str] = []
    for key, parameter in space.space.items():
        if isinstance(parameter, Derived):
            parameters[key] = _as_tree(parameter)
            continue
        values = [row.point[key] for row in (level if isinstance(parameter, Grid) else kept) if key in row.point]
        if not values:
            parameters[key], what = _as_tree(parameter), "kept: it is not active near the best"
        elif isinstance(parameter, Grid):
            parameters[key], what = _narrow_grid(key, parameter, values, is_allowed)
        else:
            parameters[key], what = _narrow(key, parameter, values, is_allowed)
        words.append(f"{key}: {what}")
    return parameters, words


def _narrow(key: str, parameter: Parameter, values: Sequence[Any], is_allowed: IsAllowed) -> tuple[dict[str, Any], str]:
    """`values`: those of the kept points, the best first."""
    match parameter:
        case LogUniform(low=low, high=high):
            logs = _range([math.log(value) for value in values], math.log(low), math.log(high))
            ends = _allowed_ends(key, (_round(math.exp(logs[0])), _round(math.exp(logs[1]))), low, high, is_allowed)
        case Uniform(low=low, high=high):
            raw = _range(values, low, high)
            ends = _allowed_ends(key, (_round(raw[0]), _round(raw[1])), low, high, is_allowed)
        case QUniform(low=low, high=high, step=step):
            ends = max(min(values) - step, low), min(max(values) + step, high)
        case Choice(values=listed):
            left = [value for value in listed if value in values]
            return {**_as_tree(parameter), "values": left}, f"{len(left)} of {len(listed)} values"
        case _:
            raise AssertionError(f"{parameter.kind} is not searched")
    return {**_as_tree(parameter), "low": ends[0], "high": ends[1]}, _words(low, high, *ends)


def _allowed_ends(
    key: str, ends: tuple[float, float], low: float, high: float, is_allowed: IsAllowed
) -> tuple[float, float]:
    """The ends, but the old end in place of a new one that no recipe may have."""
    return (
        ends[0] if ends[0] >= low or is_allowed(key, ends[0]) else low,
        ends[1] if ends[1] <= high or is_allowed(key, ends[1]) else high,
    )


def _narrow_grid(key: str, parameter: Grid, values: Sequence[Any], is_allowed: IsAllowed) -> tuple[dict[str, Any], str]:
    """From the lower neighbour of the best values to the upper one, with the best among them: five values or as many as
    before, made odd. `values`: those of the points that are level with the best, which is the first.
    """
    listed = parameter.all_values()
    tree = _as_tree(parameter)
    for name in ("low", "high", "num", "log"):
        tree.pop(name, None)
    if len(listed) < 3 or not all(isinstance(value, int | float) and not isinstance(value, bool) for value in listed):
        left = [value for value in listed if value in values]
        return {**tree, "values": left}, f"{len(left)} of {len(listed)} values"
    ordered = sorted(listed)
    log = ordered[0] > 0 and ordered[-1] / ordered[0] > 4
    whole = all(isinstance(value, int) for value in ordered)
    low, high = min(values), max(values)
    first = ordered[0] ** 2 / ordered[1] if log else 2 * ordered[0] - ordered[1]
    last = ordered[-1] ** 2 / ordered[-2] if log else 2 * ordered[-1] - ordered[-2]
    # To each side one value of the old grid, or the value that would have been the next.
    around = [_value(first, whole), *ordered, _value(last, whole)]
    ends = around[around.index(low, 1) - 1], around[around.index(high, 1) + 1]
    ends = _allowed_ends(key, ends, ordered[0], ordered[-1], is_allowed)
    new = _with_best(ends[0], values[0], ends[1], max(5, len(listed) | 1), log)
    chosen = sorted({value for x in new if is_allowed(key, value := _known(_value(x, whole), listed))} | {values[0]})
    num_new = sum(value not in listed for value in chosen)
    words = _words(ordered[0], ordered[-1], chosen[0], chosen[-1])
    return {**tree, "values": chosen}, f"{words}, {len(chosen)} values, {num_new} of them new"


def _with_best(low: float, best: float, high: float, num: int, log: bool) -> list[float]:
    """`num` values from `low` to `high` with `best` among them, at equal distances below it and above it."""
    to, back = (math.log, math.exp) if log else (float, float)
    width = to(high) - to(low)
    below = round((num - 1) * (to(best) - to(low)) / width) if width else 0
    below = min(max(below, int(best > low)), num - 1 - int(best < high))
    above = num - 1 - below
    return [
        *(back(to(low) + (to(best) - to(low)) * i / below) for i in range(below)),
        best,
        *(back(to(best) + (to(high) - to(best)) * i / above) for i in range(1, above + 1)),
    ]


def _value(value: float, whole: bool) -> float | int:
    return round(value) if whole else _round(value)


def _known(value: float | int, listed: Sequence[Any]) -> Any:
    """The old grid's value if `value` is that one rounded, so that it is not trained again."""
    return next((old for old in listed if math.isclose(old, value, rel_tol=_SAME)), value)


def _range(values: Sequence[float], low: float, high: float) -> tuple[float, float]:
    """From the least to the greatest value with a margin, within [low, high] unless the best, which is the first, is
    near an end.
    """
    width, best = high - low, values[0]
    margin = _MARGIN * max((max(values) - min(values)) / max(len(values) - 1, 1), 0.05 * width)
    new_low, new_high = max(min(values) - margin, low), min(max(values) + margin, high)
    if best - low < 0.1 * width:
        new_low = low - 0.25 * width
    if high - best < 0.1 * width:
        new_high = high + 0.25 * width
    return new_low, new_high


def _words(low: float, high: float, new_low: float, new_high: float) -> str:
    moved = [
        side for side, is_moved in (("below", new_low < low * 0.999), ("above", new_high > high * 1.001)) if is_moved
    ]
    beyond = f", beyond the old range {' and '.join(moved)}: the best is at its end" if moved else ""
    before, after = f"{low:g} .. {high:g}", f"{_round(new_low):g} .. {_round(new_high):g}"
    return f"{before} is kept" if before == after else f"{before} became {after}{beyond}"


def _round(value: float) -> float:
    return float(f"{value:.3g}")


def _as_tree(parameter: Parameter) -> dict[str, Any]:
    return parameter.model_dump(mode="json", exclude_defaults=True)


def next_space_text(sweep_dir: Path, keep: float, output: Path) -> tuple[str, list[str]]:
    """The next space as YAML, and a line on each parameter. Raises UserError as `narrowed` does.

    Its base recipe is the sweep's own copy, which cannot change.
    """
    state = replay(read_ledger(sweep_dir))
    if state.began is None:
        raise UserError(f"{sweep_dir}: no sweep was started here")
    space = Space.model_validate(state.began.space)
    ranking = rank(space, state)
    began = state.began

    def is_allowed(key: str, value: float) -> bool:
        if key in COORDINATES:
            return value > 0
        try:
            recipe_from_tree(began.base, {**space.proxy, key: value})
        except ValueError:
            return False
        return True

    parameters, words = narrowed(space, ranking, keep, is_allowed)
    base = sweep_dir / "base_recipe.yaml"
    if not base.exists():
        write_text_atomically(base, tree_to_yaml(state.began.base))
    folder = output.resolve().parent
    tree: dict[str, Any] = {
        **space.model_dump(mode="json", exclude={"space", "first_points", "warm_start"}),
        "base": os.path.relpath(base.resolve(), folder),
        "space": parameters,
        "warm_start": [os.path.relpath(sweep_dir.resolve(), folder)],
    }
    best = ranking.best
    head = [
        f"Narrowed from the sweep {state.began.name} ({state.began.sweep_hash}) around {best.score:.4g}."
        if best
        else ""
    ]
    head += words
    return "".join(f"# {line}\n" for line in head) + "\n" + tree_to_yaml(tree), words


def warm_start(
    space: Space, base: Mapping[str, Any], data_digest: str, folders: Sequence[Path]
) -> tuple[list[Point], list[tuple[Point, float]]]:
    """What earlier sweeps know: points to try first, and points with scores for a model.

    Scores of another proxy cannot be compared, so its best points are tried first. Points outside the space are left
    out. Raises UserError for a folder without a sweep.
    """
    first: list[Point] = []
    known: list[tuple[Point, float]] = []
    for folder in folders:
        state = replay(read_ledger(folder))
        if state.began is None:
            raise UserError(f"warm_start: {folder} has no sweep")
        scored = _scored(space, state)
        if space.search.kind in ("tpe", "cma") and _is_same_proxy(space, base, data_digest, state.began):
            known += scored
        else:
            best = sorted(scored, key=lambda pair: pair[1], reverse=space.higher_is_better)[:_BEST]
            first += [point for point, _ in best if point not in first]
    return first, known


def _scored(space: Space, state: SweepState) -> list[tuple[Point, float]]:
    """Points of the space that reached their end, with their scores, and with the worst those that diverged."""
    return [
        (row.point, row.score if row.num_runs else space.worst_score)
        for row in sorted(rank(space, state).rows, key=lambda row: row.number)
        if (row.num_runs or row.status == "diverged") and contains(space, row.point)
    ]


def _is_same_proxy(space: Space, base: Mapping[str, Any], data_digest: str, began: Began) -> bool:
    """Whether scores can be compared. The base recipes may differ in searched keys: a point replaces them."""
    earlier = began.space
    sides = [
        (_without(base, space.space), dict(space.proxy), space.metric, data_digest, _derived(space)),
        (
            _without(began.base, space.space),
            earlier["proxy"],
            earlier["metric"],
            began.data_digest,
            _derived(Space.model_validate(earlier)),
        ),
    ]
    return json.dumps(sides[0], sort_keys=True) == json.dumps(sides[1], sort_keys=True)


def _derived(space: Space) -> dict[str, Any]:
    derived = {key: parameter for key, parameter in space.space.items() if isinstance(parameter, Derived)}
    return {key: parameter.model_dump(mode="json") for key, parameter in derived.items()}


def _without(tree: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = json.loads(json.dumps(tree))
    for path in keys:
        node: Any = copied
        *sections, last = path.split(".")
        for section in sections:
            node = node.get(section, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict):
            node.pop(last, None)
    return copied
