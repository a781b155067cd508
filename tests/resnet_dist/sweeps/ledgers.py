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
    """Top-1 after each epoch. A run without any has diverged in its first epoch."""


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
    for number, seed, point, outcome, scores in runs:
        name, metrics = trial_name(number, seed), dict[str, float]()
        events.append(TrialAdded(trial=name, number=number, seed_number=seed, point=point, time_s=next(seconds)))
        events.append(TrialStarted(trial=name, time_s=next(seconds)))
        for epoch, score in enumerate(scores, 1):
            metrics, time_s = {"val/top1": score}, next(seconds)
            report = TrialReported(
                trial=name, epoch=epoch, step=11 * epoch, metrics=metrics, verdict="go on", time_s=time_s
            )
            events.append(report)
        end = TrialEnded(
            trial=name,
            outcome=outcome,
            epoch=len(scores) or 0.5,
            step=11 * len(scores),
            metrics=metrics,
            reason=outcome,
            time_s=next(seconds),
            run_id=f"run-{name}",
        )
        events.append(end)
    return events
