"""What earlier sweeps know that a new one can use. Pure, but for reading their ledgers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from resnet_dist.config.space import Space
from resnet_dist.config.space_parameters import Derived
from resnet_dist.errors import UserError
from resnet_dist.tune.events import Began
from resnet_dist.tune.ledger import read_ledger
from resnet_dist.tune.points import Point, lies_in
from resnet_dist.tune.score import score_of, worst_score
from resnet_dist.tune.state import SweepState, TrialState, replay

_BEST = 3


def warm_start(
    space: Space, base: Mapping[str, Any], data_digest: str, folders: Sequence[Path]
) -> tuple[list[Point], list[tuple[Point, float]]]:
    """(points to try first, points with scores for a model). Scores of another proxy do not compare, so its best
    points are only tried first. Points outside of the space are left out.

    Raises UserError for a folder without a sweep.
    """
    first: list[Point] = []
    known: list[tuple[Point, float]] = []
    for folder in folders:
        state = replay(read_ledger(folder))
        if state.began is None:
            raise UserError(f"warm_start: {folder} holds no sweep")
        scored = _scored(space, state)
        if space.search.kind in ("tpe", "cma") and _is_same_proxy(space, base, data_digest, state.began):
            known += scored
        else:
            best = sorted(scored, key=lambda pair: pair[1], reverse=space.higher_is_better)[:_BEST]
            first += [point for point, _ in best if point not in first]
    return first, known


def _scored(space: Space, state: SweepState) -> list[tuple[Point, float]]:
    """Points that reached their end, with the mean of their runs; those whose first run diverged, with the worst."""
    runs: dict[int, list[TrialState]] = {}
    for trial in state.trials.values():
        runs.setdefault(trial.number, []).append(trial)
    found: list[tuple[Point, float]] = []
    for first, *others in runs.values():
        if not lies_in(space, first.point):
            continue
        if first.status == "diverged":
            found.append((first.point, worst_score(space)))
        elif first.status == "finished":
            over = [first, *(trial for trial in others if trial.status in ("finished", "diverged"))]
            metrics = [trial.metrics if trial.status == "finished" else {} for trial in over]
            found.append((first.point, fmean(score_of(space, values) for values in metrics)))
    return found


def _is_same_proxy(space: Space, base: Mapping[str, Any], data_digest: str, began: Began) -> bool:
    """Searched keys may stand otherwise in the base: the points replace them."""
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
