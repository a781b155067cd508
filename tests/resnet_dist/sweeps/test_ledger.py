"""The ledger on disk, and what is known of a sweep from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resnet_dist.errors import Fault, UserError
from resnet_dist.sweeps.ledger import (
    DriverStarted,
    Event,
    TrialAdded,
    TrialEnded,
    TrialLeft,
    TrialReported,
    TrialStarted,
    Verdict,
    decode,
    encode,
    ledger_file,
    open_ledger,
    read_ledger,
    replay,
    saved_epochs,
    spent_epochs,
)


def reported(trial: str, *, top1: float, verdict: Verdict, time_s: float) -> TrialReported:
    return TrialReported(trial=trial, epoch=1.0, step=10, metrics={"val/top1": top1}, verdict=verdict, time_s=time_s)


EVENTS: list[Event] = [
    DriverStarted(time_s=0.0),
    TrialAdded(trial="t0000", number=0, seed_number=0, point={"optim.lr": 0.1}, time_s=1.0),
    TrialAdded(trial="t0001", number=1, seed_number=0, point={"optim.lr": 0.2}, time_s=1.0),
    TrialStarted(trial="t0000", time_s=2.0),
    TrialStarted(trial="t0001", time_s=2.0),
    reported("t0000", top1=50.0, verdict="go on", time_s=5.0),
    reported("t0001", top1=10.0, verdict="stop", time_s=6.0),
    TrialEnded(
        trial="t0001",
        outcome="stopped",
        epoch=1.0,
        step=10,
        metrics={"val/top1": 10.0},
        reason="stopped early",
        time_s=7.0,
        run_id="run-1",
    ),
]


def test_events_come_back_as_they_were_written(tmp_path: Path) -> None:
    events = [*EVENTS, reported("t0000", top1=float("inf"), verdict="stop", time_s=8.0)]
    with open_ledger(tmp_path) as ledger:
        for event in events:
            ledger.append(event)
    assert read_ledger(tmp_path) == events


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_an_unfinished_last_line_is_left_out_and_cut_off(tmp_path: Path, cut: int) -> None:
    data = b"".join(map(encode, EVENTS))
    ledger_file(tmp_path).write_bytes(data[:-cut])
    assert read_ledger(tmp_path) == EVENTS[:-1]
    with open_ledger(tmp_path) as ledger:
        ledger.append(EVENTS[-1])
    assert ledger_file(tmp_path).read_bytes() == data


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b"null",
        b'"TrialStarted"',
        encode(EVENTS[3]).replace(b'"TrialStarted"', b'"TrialStrated"').rstrip(),
        b'{"event": ["TrialStarted"]}',
        b'{"event": "TrialStarted", "trial": 5, "time_s": 1.0}',
        b'{"event": "TrialStarted", "trial": "a", "trial": "b", "time_s": 1.0}',
        b'{"event": "TrialStarted", "trial": "a", "time_s": null}',
        encode(EVENTS[5]).replace(b'"step":10', b'"step":1.5').rstrip(),
        encode(EVENTS[5]).replace(b"50.0", b'"50.0"').rstrip(),
        encode(EVENTS[5]).replace(b'"go on"', b'"perhaps"').rstrip(),
        b"\xff\xfe",
        b"",
    ],
)
def test_a_line_that_is_not_an_event_is_a_fault_with_its_number(tmp_path: Path, line: bytes) -> None:
    ledger_file(tmp_path).write_bytes(encode(EVENTS[0]) + line + b"\n" + encode(EVENTS[1]))
    with pytest.raises(Fault, match=r"ledger.jsonl: line 2 is damaged \([^\n]*\); fix or remove that line"):
        read_ledger(tmp_path)


@given(data=st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_ledger_with_other_bytes_is_replayed_or_a_fault(tmp_path: Path, data: st.DataObject) -> None:
    whole = b"".join(map(encode, EVENTS))
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(len(whole), start + 30)))
    ledger_file(tmp_path).write_bytes(whole[:start] + data.draw(st.binary(max_size=30)) + whole[stop:])
    try:
        events = read_ledger(tmp_path)
    except Fault as fault:
        assert "\n" not in str(fault)  # noqa: PT017
    else:
        assert [decode(encode(event).rstrip()) for event in events] == events or "nan" in str(events)


def test_a_second_driver_is_refused(tmp_path: Path) -> None:
    with (
        open_ledger(tmp_path),
        pytest.raises(UserError, match="another command is running this sweep"),
        open_ledger(tmp_path),
    ):
        pass
    with open_ledger(tmp_path):
        pass


def test_a_folder_without_a_sweep_is_a_readable_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give the folder of a sweep"):
        read_ledger(tmp_path / "nothing")


def test_a_killed_drivers_trials_wait_and_time_counts_only_while_one_was_at_work() -> None:
    state = replay(EVENTS)
    assert {name: trial.status for name, trial in state.trials.items()} == {"t0000": "running", "t0001": "stopped"}
    state.apply(DriverStarted(time_s=1000.0))
    assert state.trials["t0000"].status == "waiting"
    assert state.wall_until(1001.0) == 7.0 + 1.0
    assert (state.trials["t0000"].seconds, state.trials["t0001"].seconds) == (5.0, 5.0)
    assert (spent_epochs(state), saved_epochs(state, 3.0)) == (2.0, 2.0)


def test_a_fault_counts_and_the_trial_waits_to_resume() -> None:
    state = replay([*EVENTS, TrialLeft(trial="t0000", why="its process died", time_s=9.0, is_fault=True)])
    trial = state.trials["t0000"]
    assert (trial.status, trial.num_faults, trial.last_fault, trial.epoch) == ("waiting", 1, "its process died", 1.0)
