"""A checkpoint and a storage that is full for a while, or for good."""

from __future__ import annotations

import errno

import pytest

from resnet_dist.errors import Fault
from resnet_dist.launch.commit import StorageRefused, commit_within


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def full(times: int) -> list[OSError]:
    return [OSError(errno.ENOSPC, "No space left on device") for _ in range(times)]


def attempt(failures: list[OSError], limit_s: float) -> tuple[list[str], float]:
    clock, warnings = Clock(), list[str]()

    def commit() -> None:
        if failures:
            raise failures.pop()

    commit_within(commit, limit_s, what="c", warn=warnings.append, sleep=clock.sleep, now_s=lambda: clock.now_s)
    return warnings, clock.now_s


def test_storage_that_takes_it_is_asked_once() -> None:
    assert attempt([], 10) == ([], 0.0)


def test_a_full_disk_that_gets_room_costs_a_warning() -> None:
    warnings, waited_s = attempt(full(3), 10)
    assert waited_s == 6.0
    assert warnings == [
        "c cannot be written: No space left on device; tried again for up to 10 s, training goes on",
        "c is written after all",
    ]


def test_a_full_disk_ends_at_the_limit_with_one_line() -> None:
    with pytest.raises(StorageRefused, match=r"c could not be written for 10 s .*: No space left on device; make room"):
        attempt(full(100), 10)


def test_what_is_no_matter_of_storage_is_raised_at_once() -> None:
    def commit() -> None:
        raise Fault("another driver")

    with pytest.raises(Fault, match="another driver"):
        commit_within(commit, 10, what="c", warn=print, sleep=lambda s: None)
