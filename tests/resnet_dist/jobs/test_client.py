"""Following a job: its output once, across lost connections, and its exit code."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from resnet_dist.errors import Fault
from resnet_dist.jobs import client as module
from resnet_dist.jobs.client import follow


class Head:
    """Sends the output in pieces; every connection begins with all of it, and the first ones break."""

    def __init__(self, *connections: list[str], status: JobStatus, code: int | None = None, message: str = "") -> None:
        self._connections = list(connections)
        self._job = SimpleNamespace(status=status, driver_exit_code=code, message=message)

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        for piece in self._connections[0]:
            yield piece
        if len(self._connections) > 1:
            self._connections.pop(0)
            raise ConnectionError("lost")

    def get_job_info(self, _: str) -> Any:
        return self._job

    def get_job_logs(self, _: str) -> str:
        return "".join(self._connections[-1]) + "the end\n"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RETRY_S", 0.0)


def followed(head: Head) -> tuple[int, str]:
    shown: list[str] = []
    code = follow(head, "job", shown.append, "ray job logs job")  # type: ignore[arg-type]
    return code, "".join(shown)


def test_output_is_shown_once_across_lost_connections() -> None:
    head = Head(["step 1\n", "ste"], ["step 1\nstep 2\n", "step 3\n"], status=JobStatus.SUCCEEDED)
    assert followed(head) == (0, "step 1\nstep 2\nstep 3\nthe end\n")


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [(JobStatus.STOPPED, None, 143), (JobStatus.FAILED, 2, 2), (JobStatus.FAILED, None, 1)],
)
def test_the_exit_code_is_the_jobs(status: JobStatus, driver: int | None, code: int) -> None:
    assert followed(Head([], status=status, code=driver))[0] == code


def test_a_job_that_never_started_is_explained() -> None:
    head = Head([], status=JobStatus.FAILED, message="no such interpreter")
    assert followed(head) == (1, "the end\nno such interpreter\n")


def test_a_head_that_stays_silent_ends_the_following(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SILENCE_LIMIT_S", -1.0)
    head = Head([], [], status=JobStatus.RUNNING)
    with pytest.raises(Fault, match=r"\(lost\); the job may still be running; ray job logs job"):
        followed(head)
