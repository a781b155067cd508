"""The next, finer space around what a sweep found. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from resnet_dist.config.space import Space
from resnet_dist.config.space_parameters import Choice, Derived, Grid, LogUniform, Parameter, QUniform, Uniform
from resnet_dist.errors import UserError
from resnet_dist.tune.ranking import Ranking

_LEAST = 4
_MARGIN = 0.5
"""Of the kept points' mean distance, beyond the outermost of them."""


def narrowed(space: Space, ranking: Ranking, keep: float) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(parameters of the next space, what was done to each in words), around the best share `keep` of all points.

    A range whose best point lies near one of its ends is moved beyond that end: the best may lie outside. A point that
    cannot be told from the best by noise is kept too. Raises UserError with too few points.
    """
    done = [row for row in ranking.rows if row.num_runs]
    if len(done) < _LEAST:
        raise UserError(
            f"narrow: {len(done)} points have reached their end, {_LEAST} are needed; run more trials first"
        )
    number = max(_LEAST, math.ceil(keep * len(ranking.rows)))
    kept = [row for place, row in enumerate(done) if place < number or row.in_noise]
    parameters: dict[str, dict[str, Any]] = {}
    words: list[str] = []
    for key, parameter in space.space.items():
        if isinstance(parameter, Derived):
            parameters[key] = _as_tree(parameter)
            continue
        values = [row.point[key] for row in kept if key in row.point]
        parameters[key], what = (
            _narrow(parameter, values, done[0].point.get(key)) if values else (_as_tree(parameter), "kept")
        )
        words.append(f"{key}: {what}")
    return parameters, words


def _narrow(parameter: Parameter, values: Sequence[Any], best: Any) -> tuple[dict[str, Any], str]:
    match parameter:
        case LogUniform(low=low, high=high):
            new = [
                math.exp(x)
                for x in _range(
                    [math.log(v) for v in values], math.log(best or values[0]), math.log(low), math.log(high)
                )
            ]
            return {**_as_tree(parameter), "low": _round(new[0]), "high": _round(new[1])}, _words(low, high, *new)
        case Uniform(low=low, high=high):
            ends = _range(list(values), values[0] if best is None else best, low, high)
            return {**_as_tree(parameter), "low": _round(ends[0]), "high": _round(ends[1])}, _words(low, high, *ends)
        case QUniform(low=low, high=high, step=step):
            ends = max(min(values) - step, low), min(max(values) + step, high)
            return {**_as_tree(parameter), "low": ends[0], "high": ends[1]}, _words(low, high, *ends)
        case Choice(values=listed):
            left = [value for value in listed if value in values]
            return {**_as_tree(parameter), "values": left}, f"{len(left)} of {len(listed)} values"
        case Grid():
            return _narrow_grid(parameter, values, best)
        case _:
            raise AssertionError(f"{parameter.kind} is not searched")


def _narrow_grid(parameter: Grid, values: Sequence[Any], best: Any) -> tuple[dict[str, Any], str]:
    """As many values as before, from the best one's lower neighbour to its upper one."""
    listed = parameter.all_values()
    if len(listed) < 3 or not all(isinstance(value, int | float) and not isinstance(value, bool) for value in listed):
        left = [value for value in listed if value in values]
        return {"kind": "grid", "values": left}, f"{len(left)} of {len(listed)} values"
    ordered = sorted(listed)
    log = ordered[0] > 0 and ordered[-1] / ordered[0] > 4
    place = ordered.index(best)
    inner = (
        (ordered[1] / ordered[0], ordered[-1] / ordered[-2])
        if log
        else (ordered[1] - ordered[0], ordered[-1] - ordered[-2])
    )
    below = ordered[place - 1] if place else (best / inner[0] if log else best - inner[0])
    above = ordered[place + 1] if place + 1 < len(ordered) else (best * inner[1] if log else best + inner[1])
    tree = {"kind": "grid", "low": _round(below), "high": _round(above), "num": len(listed), "log": log}
    return tree, _words(ordered[0], ordered[-1], below, above)


def _range(values: Sequence[float], best: float, low: float, high: float) -> tuple[float, float]:
    """From the least to the greatest value with a margin, inside of [low, high] unless the best lies at an end."""
    width = high - low
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
    beyond = f", beyond the old range {' and '.join(moved)}: the best lies at its end" if moved else ""
    return f"{low:g} .. {high:g} became {_round(new_low):g} .. {_round(new_high):g}{beyond}"


def _round(value: float) -> float:
    return float(f"{value:.3g}")


def _as_tree(parameter: Parameter) -> dict[str, Any]:
    return parameter.model_dump(mode="json", exclude_defaults=True)
