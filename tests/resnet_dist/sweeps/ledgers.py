"""Ledgers as sweeps leave them, for the tests of what is read from one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from resnet_dist.config.space import Space
from resnet_dist.sweeps.ledger import (
    Began,
    DriverStarted,
    Event,
    TrialAdded,
    TrialEnded,
    TrialKind,
    TrialOutcome,
    TrialReported,
    TrialStarted,
    trial_name,
)


class RecordedRun(NamedTuple):
    number: int
    seed: int
    point: Mapping[str, Any]
    outcome: TrialOutcome
    scores: Sequence[float]
    """Top-1 after each epoch; of short schedules and cooldowns only at the end. A run without any has diverged in its
    first epoch."""
    kind: TrialKind = "point"
    rung: float = 0.0


COOLDOWN = 0.2
"""Steps of a cooldown, as a share of those before it."""


def events_of(space: Space, runs: Iterable[RecordedRun], base: Mapping[str, Any]) -> list[Event]:
    """One trial after the other; every event a second after the one before."""
    seconds = map(float, itertools.count(1))
    events: list[Event] = [
        Began(
            name="played",
            sweep_hash="hash",
            space=space.model_dump(mode="json"),
            base=base,
            num_proxy_samples=1442,
            num_base_samples=1442,
            data_digest="data",
            first_points=[],
            known=[],
            time_s=0.0,
        ),
        DriverStarted(time_s=0.0),
    ]
    for number, seed, point, outcome, scores, kind, rung in runs:
        name, metrics = trial_name(number, seed, kind, rung), dict[str, float]()
        added = TrialAdded(
            trial=name, number=number, seed_number=seed, point=point, time_s=next(seconds), kind=kind, rung=rung
        )
        events += [added, TrialStarted(trial=name, time_s=next(seconds))]
        epoch = rung if kind == "cooldown" else 0.0
        for done, score in enumerate(scores, 1):
            epoch = {"point": float(done), "short": rung, "cooldown": (1 + COOLDOWN) * rung}[kind]
            metrics, time_s = {"val/top1": score}, next(seconds)
            report = TrialReported(
                trial=name, epoch=epoch, step=round(11 * epoch), metrics=metrics, verdict="go on", time_s=time_s
            )
            events.append(report)
        end = TrialEnded(
            trial=name,
            outcome=outcome,
            epoch=epoch or 0.5,
            step=round(11 * epoch),
            metrics=metrics,
            reason=outcome,
            time_s=next(seconds),
            run_id=f"run-{name}",
        )
        events.append(end)
    return events
