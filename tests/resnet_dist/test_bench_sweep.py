"""Trials per minute, read from a sweep's ledger."""

from __future__ import annotations

import pytest

from resnet_dist.bench.sweep_paths import steady_rate
from resnet_dist.errors import Fault
from resnet_dist.sweeps.ledger import Event, TrialEnded, TrialStarted


def started(trial: str, time_s: float) -> TrialStarted:
    return TrialStarted(trial=trial, time_s=time_s)


def ended(trial: str, time_s: float) -> TrialEnded:
    return TrialEnded(trial=trial, outcome="finished", epoch=3.0, step=33, metrics={}, reason="finished", time_s=time_s)


def test_the_rate_begins_when_the_first_trials_that_ran_side_by_side_have_ended() -> None:
    events: list[Event] = [started("a", 0.0), started("b", 0.0), ended("a", 30.0), started("c", 30.0)]
    events += [ended("b", 40.0), started("d", 40.0), ended("c", 45.0), ended("d", 52.0)]
    assert steady_rate(events) == pytest.approx(60 * 2 / 12.0)


def test_trials_that_all_ran_side_by_side_tell_no_rate() -> None:
    events: list[Event] = [started("a", 0.0), started("b", 0.0), ended("a", 30.0), ended("b", 40.0)]
    with pytest.raises(Fault, match="2 trials, 2 at once, are too few to measure a rate"):
        steady_rate(events)
