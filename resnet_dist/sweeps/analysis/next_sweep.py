"""From one sweep to the next: a narrower space around what was found, and what earlier sweeps know."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_prep.beton.files import write_text_atomically
from resnet_dist.config.loading import recipe_from_tree, tree_to_yaml
from resnet_dist.config.space import (
    COORDINATES,
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
from resnet_dist.sweeps.analysis.ranking import Ranking, rank
from resnet_dist.sweeps.ledger import SweepState, read_ledger, replay
from resnet_dist.sweeps.points import Builder, Point, contains, grid_points, is_number, planned_points, shown_value

_LEAST = 4
"""How many points must have reached their end."""
_MARGIN = 0.5
"""How far a range extends beyond the outermost kept points, in mean distances between them."""
_NEAR_END = 0.1
"""The best is at the end of a range if it is in this share of its width."""
_BEYOND = 0.25
"""How far a range is then moved, in its widths."""
_NARROWER = 0.95
"""A range that keeps more of its width is kept as it is."""
_INEXACT = 0.1
"""How far rounding may move a value, in distances to its neighbour; an end, in half widths of the range."""
_BEST = 3
"""How many points of a sweep over another proxy are tried first."""

IsAllowed = Callable[[str, float], bool]
"""Whether a recipe may have this value at this key."""


@dataclass(frozen=True)
class _Next:
    """A parameter of the next space."""

    changes: dict[str, Any]
    """Its keys that differ from the parameter's."""
    words: str
    is_narrower: bool = False


@dataclass(frozen=True)
class _Values:
    """Values of one parameter at the points around which the next space is drawn."""

    best: Any
    kept: Sequence[Any]
    """At the best points, the best first."""
    level: Sequence[Any]
    """At those of them that cannot be told from the best, and at the best."""

    def why(self) -> str:
        """Why no more could be left out."""
        if len(self.level) > 1:
            return "points all over it cannot be told from the best (--set race.max_seeds=8 adds seeds to tell them)"
        return "the best points are all over it (a smaller --keep keeps fewer)"


def narrowed(
    space: Space,
    ranking: Ranking,
    keep: float,
    is_allowed: IsAllowed,
    known: Sequence[tuple[Point, float]] = (),
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The next space around the best share `keep` of all points.

    A range whose best point is near one of its ends is moved beyond that end, where `is_allowed`. Points that may be as
    good as the best, within the noise, are kept too.

    Args:
        known: points of earlier sweeps over the same proxy, and their scores.

    Returns the parameters of the next space, and a line on each. Raises UserError with too few points.
    """
    rows = [(row.point, row.score, row.in_noise) for row in ranking.rows if row.num_runs]
    rows += [(point, score, False) for point, score in known]
    if len(rows) < _LEAST:
        raise UserError(
            f"narrow: {len(rows)} points have reached their end, {_LEAST} are needed; run more trials first"
        )
    rows.sort(key=lambda row: row[1], reverse=space.higher_is_better)
    number = max(_LEAST, math.ceil(keep * (len(ranking.rows) + len(known))))
    kept = [point for place, (point, _, in_noise) in enumerate(rows) if place < number or in_noise]
    level = [point for place, (point, _, in_noise) in enumerate(rows) if place == 0 or in_noise]
    best = rows[0][0]
    parameters: dict[str, dict[str, Any]] = {}
    words: list[str] = []
    is_narrower = False
    for key, parameter in space.space.items():
        when = _when(parameter, space, parameters)
        if when is None:
            words.append(f"{key}: is left out, since it is never active in the new space")
            continue
        tree = {**_as_tree(parameter), **({"when": when} if when else {})}
        values = _Values(best.get(key), [p[key] for p in kept if key in p], [p[key] for p in level if key in p])
        if isinstance(parameter, Derived):
            parameters[key] = tree
            continue
        if key not in best:
            parameters[key] = tree
            words.append(f"{key}: {_span(parameter)} is kept: it is not active at the best point")
            continue
        found = _next(key, parameter, values, is_allowed)
        if isinstance(parameter, Grid) and found.changes:
            tree = {name: value for name, value in tree.items() if name not in ("low", "high", "num", "log")}
        parameters[key] = {**tree, **found.changes}
        words.append(f"{key}: {found.words}")
        is_narrower |= found.is_narrower
    if not is_narrower:
        words.append("nothing became narrower: see the reason at each key")
    return parameters, words


def _when(parameter: Parameter, space: Space, parameters: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The conditions with what the parameters before it may still be; None: they never hold any more."""
    when: dict[str, Any] = {}
    for other, wanted in parameter.when.items():
        if other not in parameters:
            return None
        values = parameters[other].get("values")
        if isinstance(space.space[other], Derived) or values is None:
            when[other] = wanted
            continue
        left = [value for value in (wanted if isinstance(wanted, list) else [wanted]) if value in values]
        if not left:
            return None
        when[other] = left if isinstance(wanted, list) else wanted
    return when


def _next(key: str, parameter: Parameter, values: _Values, is_allowed: IsAllowed) -> _Next:
    match parameter:
        case LogUniform() | Uniform():
            return _next_range(key, parameter, values, is_allowed)
        case QUniform():
            return _next_steps(key, parameter, values, is_allowed)
    listed = listed_values(parameter) or []
    if isinstance(parameter, Grid) and len(set(map(repr, listed))) > 1 and all(map(is_number, listed)):
        return _next_grid(key, listed, values, is_allowed)
    among = values.kept if isinstance(parameter, Choice) else values.level
    left = [value for value in listed if value in among]
    if len(left) == len(listed):
        return _Next({}, f"{_span(parameter)} is kept: {'each is among the best' if len(left) > 1 else 'one value'}")
    return _Next({"values": left}, f"{_span(parameter)} became {_listed(left)}", is_narrower=True)


def _next_range(key: str, parameter: LogUniform | Uniform, values: _Values, is_allowed: IsAllowed) -> _Next:
    is_log = isinstance(parameter, LogUniform)
    to: Callable[[float], float] = math.log if is_log else float
    back: Callable[[float], float] = math.exp if is_log else float
    # A first point of the user's may be outside.
    low, high = min(parameter.low, values.best), max(parameter.high, values.best)
    width = to(high) - to(low)
    places = [to(value) for value in values.kept]
    margin = _MARGIN * max((max(places) - min(places)) / max(len(places) - 1, 1), 0.05 * width)
    tolerance = _INEXACT * width / 2
    ends = [
        max(low, _brief(back(max(min(places) - margin, to(low))), to, tolerance, down=True)),
        min(high, _brief(back(min(max(places) + margin, to(high))), to, tolerance, down=False)),
    ]
    reasons = []
    for side, (end, name) in enumerate(((low, "lower"), (high, "upper"))):
        if abs(to(values.best) - to(end)) >= _NEAR_END * width:
            continue
        beyond = _brief(back(to(end) + (2 * side - 1) * _BEYOND * width), to, tolerance, down=side == 0)
        ends[side] = beyond if is_allowed(key, beyond) else end
        reasons.append(
            f"the best, {values.best:g}, is near the {name} end"
            + ("" if ends[side] != end else ", beyond which no recipe can be")
        )
    return _described(parameter, ends[0], ends[1], (to(ends[1]) - to(ends[0])) / width, values, reasons)


def _next_steps(key: str, parameter: QUniform, values: _Values, is_allowed: IsAllowed) -> _Next:
    """One step more than the kept points on each side."""
    steps = [round((value - parameter.low) / parameter.step) for value in values.kept]
    last = parameter.num_values - 1
    ends = [max(min(steps) - 1, min(steps[0], 0)), min(max(steps) + 1, max(steps[0], last))]
    more = max(1, round(_BEYOND * last))
    reasons = []
    for side, (end, name) in enumerate(((0, "lower"), (last, "upper"))):
        if steps[0] != end:
            continue
        beyond = end + (2 * side - 1) * more
        is_moved = is_allowed(key, parameter.value(beyond))
        ends[side] = beyond if is_moved else end
        reasons.append(
            f"the best, {values.best:g}, is at the {name} end{'' if is_moved else ', beyond which no recipe can be'}"
        )
    if ends[0] == ends[1]:
        return _Next({}, f"{_span(parameter)} is kept: it is a single value")
    share = (ends[1] - ends[0]) / last if last else math.inf
    low, high = (float(parameter.value(end)) for end in ends)
    return _described(parameter, low, high, share, values, reasons)


def _described(
    parameter: LogUniform | Uniform | QUniform,
    new_low: float,
    new_high: float,
    share: float,
    values: _Values,
    reasons: Sequence[str],
) -> _Next:
    """
    Args:
        share: the new width, in old ones.
        reasons: what is to be said of the best at an end.
    """
    low, high = parameter.low, parameter.high
    is_moved = new_low < low or new_high > high
    is_narrower = share <= _NARROWER if not isinstance(parameter, QUniform) else share < 1
    if not is_moved and not is_narrower:
        return _Next({}, f"{low:g} .. {high:g} is kept: {'; '.join([*reasons, values.why()])}")
    words = f"{low:g} .. {high:g} became {new_low:g} .. {new_high:g}"
    if reasons:
        words += f"{', moved' * is_moved}{'' if is_narrower else ' and not narrower'}: {'; '.join(reasons)}"
    return _Next({"low": new_low, "high": new_high}, words, is_narrower)


def _next_grid(key: str, listed: Sequence[Any], values: _Values, is_allowed: IsAllowed) -> _Next:
    """The values that are level with the best, and new ones halfway to their neighbours. If the best is at an end, also
    the value that would have been the next, where `is_allowed`.
    """
    old = sorted(set(listed))
    is_log = old[0] > 0 and old[-1] / old[0] > 4
    whole = all(isinstance(value, int) for value in old)
    to: Callable[[float], float] = math.log if is_log else float
    back: Callable[[float], float] = math.exp if is_log else float

    def value_near(place: float, neighbour: float) -> float:
        """A short number at `place`, whose neighbour is at `neighbour`."""
        brief = _brief(back(place), to, _INEXACT * abs(place - neighbour))
        return round(brief) if whole else brief

    ends = []
    reasons = []
    for end, neighbour, name in ((old[0], old[1], "lower"), (old[-1], old[-2], "upper")):
        if values.best != end:
            continue
        beyond = value_near(2 * to(end) - to(neighbour), to(end))
        is_moved = beyond not in old and is_allowed(key, beyond)
        ends += [beyond] * is_moved
        reasons.append(
            f"the best, {values.best:g}, is at the {name} end{'' if is_moved else ', beyond which no recipe can be'}"
        )
    around = sorted([*old, *ends])
    level = sorted({*values.level, *ends})
    first, last = around.index(level[0]), around.index(level[-1])
    new = list(ends)
    for lower, upper in pairwise(around[max(first - 1, 0) : last + 2]):
        between = value_near((to(lower) + to(upper)) / 2, to(lower))
        if lower < between < upper and is_allowed(key, between):
            new.append(between)
    stay = {value for value in values.level if value in old}
    if len(new) + len(stay) > max(5, len(old) + 1):  # too many: those at the ends and the best say enough
        stay &= {values.best, level[0], level[-1]}
    chosen = sorted({*new, *stay})
    if chosen == old:
        return _Next({}, f"{_listed(old)} is kept: {'; '.join([*reasons, values.why()])}")
    share = (to(chosen[-1]) - to(chosen[0])) / (to(old[-1]) - to(old[0]))
    is_narrower = share < 1
    words = f"{old[0]:g} .. {old[-1]:g} became {_listed(chosen)}"
    if reasons:
        words += f"{', moved' * bool(ends)}{'' if is_narrower else ' and not narrower'}: {'; '.join(reasons)}"
    elif not is_narrower:
        words = f"{old[0]:g} .. {old[-1]:g} is kept, with {_listed(sorted(new))} in it: {values.why()}"
    return _Next({"values": chosen}, words, is_narrower)


def _brief(value: float, to: Callable[[float], float], tolerance: float, *, down: bool | None = None) -> float:
    """The number with the fewest digits at most `tolerance` from `value` on the scale `to`.

    Args:
        down: round down, or up, to an end that leaves nothing out; None: to the nearest.
    """
    if value == 0 or not math.isfinite(value):
        return value
    exponent = math.floor(math.log10(abs(value)))
    for digits in range(1, 13):
        unit = 10.0 ** (exponent - digits + 1)
        number = value / unit
        whole = round(number) if down is None else math.floor(number) if down else math.ceil(number)
        brief = float(f"{whole * unit:.12g}")
        if (brief > 0) == (value > 0) and abs(to(brief) - to(value)) <= tolerance:
            return brief
    return value


def _span(parameter: Parameter) -> str:
    listed = listed_values(parameter)
    if listed is not None:
        return _listed(listed)
    assert isinstance(parameter, LogUniform | Uniform | QUniform)
    return f"{parameter.low:g} .. {parameter.high:g}"


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(shown_value, values))


def _as_tree(parameter: Parameter) -> dict[str, Any]:
    return parameter.model_dump(mode="json", exclude_defaults=True)


def next_space_text(sweep_dir: Path, keep: float, output: Path) -> tuple[str, list[str]]:
    """The next space as YAML, and a line on each parameter. Its base recipe is the sweep's own copy, which cannot
    change.

    Raises UserError as `narrowed` does, and if every point of the next space has been tried.
    """
    state = replay(read_ledger(sweep_dir))
    if state.began is None:
        raise UserError(f"{sweep_dir}: no sweep was started here")
    began = state.began
    space = Space.model_validate(began.space)
    ranking = rank(space, state)

    def is_allowed(key: str, value: float) -> bool:
        if key in COORDINATES:
            return value > 0
        try:
            recipe_from_tree(began.base, {**space.proxy, key: value})
        except ValueError:
            return False
        return True

    known = [(dict(point), score) for point, score in began.known]
    parameters, words = narrowed(space, ranking, keep, is_allowed, known)
    base = sweep_dir / "base_recipe.yaml"
    if not base.exists():
        write_text_atomically(base, tree_to_yaml(began.base))
    folder = output.resolve().parent
    tree: dict[str, Any] = {
        **space.model_dump(mode="json", exclude={"space", "first_points", "warm_start"}),
        "base": os.path.relpath(base.resolve(), folder),
        "space": parameters,
        "warm_start": [os.path.relpath(sweep_dir.resolve(), folder)],
    }
    if space.search.kind == "grid" and space.trials is not None and space.trials >= len(grid_points(space)):
        tree["trials"] = None  # all of the new grid
    builder = Builder(Space.model_validate(tree), began.base, began.num_proxy_samples, began.num_base_samples)
    tried = {builder.key(point) for point in _tried(state)}
    if planned_points(builder.space, 1, builder.key, tried) == []:
        raise UserError(
            f"narrow: every point of the next space has been tried ({'; '.join(words)}); add seeds to tell the best "
            "points apart (--set race.max_seeds=8), or search other keys"
        )
    head = [f"Narrowed from the sweep {began.name} ({began.sweep_hash}).", *words]
    return "".join(f"# {line}\n" for line in head) + "\n" + tree_to_yaml(tree), words


def _tried(state: SweepState) -> list[Point]:
    """Points that need no further run: those whose first run is over, and what the sweep began with. One that failed
    did so for reasons outside the recipe.
    """
    assert state.began is not None
    points = [dict(point) for point in state.began.tried]
    for trial in state.trials.values():
        is_over = trial.end is not None and trial.status != "failed"
        if is_over and not trial.seed_number and trial.kind != "cooldown" and trial.point not in points:
            points.append(trial.point)
    return points


@dataclass(frozen=True)
class Earlier:
    """What the sweeps of `warm_start` know."""

    first: Sequence[Point] = ()
    """To be tried first: the best points of other proxies, whose scores cannot be compared."""
    known: Sequence[tuple[Point, float]] = ()
    """Points with scores. Their trials would be the same runs again."""
    tried: Sequence[Point] = ()
    """Those, and points that were stopped early, whose trials would be the same runs too."""


def warm_start(builder: Builder, data_digest: str, folders: Sequence[Path]) -> Earlier:
    """What earlier sweeps know about the points of `builder.space`. Raises UserError for a folder without a sweep."""
    space = builder.space
    first: list[Point] = []
    known: dict[Hashable, tuple[Point, float]] = {}
    tried: dict[Hashable, Point] = {}
    for folder in folders:
        state = replay(read_ledger(folder))
        began = state.began
        if began is None:
            raise UserError(f"warm_start: {folder} has no sweep")
        earlier = Space.model_validate(began.space)
        builder_then = Builder(earlier, began.base, began.num_proxy_samples, began.num_base_samples)

        def key_if_same(point: Point, then: Builder = builder_then, digest: str = began.data_digest) -> str | None:
            """The point's key if it would be the same run in both sweeps."""
            key = builder.key(point)
            return key if digest == data_digest and contains(space, point) and then.key(point) == key else None

        for point in _tried(state):
            if (key := key_if_same(point)) is not None:
                tried.setdefault(key, point)
        others = []
        for point, score in _scored(space, state):
            if (key := key_if_same(point)) is None:
                others.append((point, score))
            elif earlier.metric == space.metric:
                known.setdefault(key, (point, score))
        others.sort(key=lambda pair: pair[1], reverse=space.higher_is_better)
        first += [point for point, _ in others[:_BEST] if point not in first]
    return Earlier(first, list(known.values()), list(tried.values()))


def _scored(space: Space, state: SweepState) -> list[tuple[Point, float]]:
    """Points of the space that reached their end, with their scores, and with the worst those that diverged; then what
    the sweep itself began with.
    """
    assert state.began is not None
    rows = [
        (row.point, row.score if row.num_runs else space.worst_score)
        for row in sorted(rank(space, state).rows, key=lambda row: row.number)
        if row.num_runs or row.status == "diverged"
    ]
    if state.began.space["metric"] == space.metric:
        rows += [(dict(point), score) for point, score in state.began.known]
    return [(point, score) for point, score in rows if contains(space, point)]
