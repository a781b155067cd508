"""Sending a job to a cluster and following it: the effects of `resnet-dist submit`."""

from __future__ import annotations

import asyncio
import logging
import shlex
import time
from collections.abc import Callable

import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.submission import RUN_KEY, Submission

_RETRY_S = 2.0
_SILENCE_LIMIT_S = 300.0
"""How long the head may not answer before following ends; the job goes on."""
_STOPPED = 143


def send(submission: Submission) -> JobSubmissionClient:
    """Uploads and starts the job. Raises UserError when there is no such cluster, or a job drives the run already."""
    client = _connect(submission.address)
    name = submission.metadata[RUN_KEY]
    for job in client.list_jobs():
        if not job.status.is_terminal() and (job.metadata or {}).get(RUN_KEY) == name:
            raise UserError(
                f"--name {name}: job {job.submission_id} is already at work on it; follow it with `ray job logs -f "
                f"{job.submission_id}`, or stop it with `ray job stop {job.submission_id}`"
            )
    try:
        client.submit_job(
            entrypoint=shlex.join(submission.entrypoint),
            submission_id=submission.submission_id,
            runtime_env=submission.runtime_env,
            metadata=dict(submission.metadata),
        )
    except RuntimeError as error:
        raise Fault(f"the cluster at {submission.address} did not take the job: {_first_line(error)}") from None
    return client


def follow(client: JobSubmissionClient, submission_id: str, show: Callable[[str], None]) -> int:
    """Shows the job's output until it ends, over lost connections too, and returns its exit code."""
    shown = 0

    def show_new(text: str, begins_at: int) -> None:
        nonlocal shown
        new = text[max(shown - begins_at, 0) :]
        if new:
            show(new)
            shown += len(new)

    async def tail() -> None:
        position = 0  # every connection tells the whole output from its beginning
        async for text in client.tail_job_logs(submission_id):
            show_new(text, position)
            position += len(text)

    answered_s = time.monotonic()
    while True:
        try:
            asyncio.run(tail())
            info = client.get_job_info(submission_id)
            answered_s = time.monotonic()
            if info.status.is_terminal():
                show_new(client.get_job_logs(submission_id), 0)
                return _exit_code(info.status, info.driver_exit_code, info.message, show)
        except (OSError, RuntimeError) as error:
            if time.monotonic() - answered_s > _SILENCE_LIMIT_S:
                raise Fault(
                    f"the head has not answered for {_SILENCE_LIMIT_S:g} s ({_first_line(error)}); the job may go on: "
                    f"ray job logs -f {submission_id}"
                ) from None
        time.sleep(_RETRY_S)


def _exit_code(status: JobStatus, driver: int | None, message: str | None, show: Callable[[str], None]) -> int:
    if status is JobStatus.SUCCEEDED:
        return 0
    if status is JobStatus.STOPPED:
        return _STOPPED
    if driver is None and message:  # it never started, or its node was lost: nobody else says why
        show(f"{message.strip()}\n")
    return driver or 1


def _connect(address: str) -> JobSubmissionClient:
    for talkative in ("ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(talkative).setLevel(logging.ERROR)  # each file that is not uploaded is a line otherwise
    try:
        client = JobSubmissionClient(address)
    except AuthenticationError:
        raise UserError(
            f"{address} wants another token than yours; export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE with "
            "the cluster's token"
        ) from None
    except (ConnectionError, RuntimeError) as error:
        raise UserError(
            f"no Ray cluster takes jobs at {address}: {_first_line(error)}; start its dashboard, or give --address"
        ) from None
    theirs = getattr(client, "_server_ray_version", None)
    if theirs and theirs != ray.__version__:
        raise UserError(f"{address} runs Ray {theirs}, this is {ray.__version__}; use the cluster's image, or its Ray")
    return client


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
