"""Trials per minute, read from a sweep's ledger."""

from __future__ import annotations

import pytest

from resnet_dist.bench.sweep_paths import steady_rate
from resnet_dist.errors import Fault
from resnet_dist.sweeps.ledger import Event, TrialEnded, TrialStarted


def ended(trial: str, time_s: float) -> TrialEnded:
    return TrialEnded(trial, "finished", 3.0, 33, {}, "finished", time_s)


def test_the_rate_begins_when_the_first_trials_that_ran_side_by_side_have_ended() -> None:
    events: list[Event] = [TrialStarted("a", 0.0), TrialStarted("b", 0.0), ended("a", 30.0), TrialStarted("c", 30.0)]
    events += [ended("b", 40.0), TrialStarted("d", 40.0), ended("c", 45.0), ended("d", 52.0)]
    assert steady_rate(events) == pytest.approx(60 * 2 / 12.0)


def test_trials_that_all_ran_side_by_side_tell_no_rate() -> None:
    events: list[Event] = [TrialStarted("a", 0.0), TrialStarted("b", 0.0), ended("a", 30.0), ended("b", 40.0)]
    with pytest.raises(Fault, match="2 trials, 2 at once, tell no rate"):
        steady_rate(events)
