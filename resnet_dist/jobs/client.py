"""Sends a job to a Ray cluster and follows it."""

from __future__ import annotations

import asyncio
import logging
import shlex
import signal
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from requests.utils import get_environ_proxies

from data_prep.redaction import redacted
from data_prep.shown import one_line
from resnet_dist.errors import Fault, UserError
from resnet_dist.jobs.submission import RUN_KEY, Submission, job_lines
from resnet_dist.launch.ray_internals import cluster_version

_RETRY_S = 2.0
_SILENCE_LIMIT_S = 300.0
"""How long the head may be silent before following ends; the job keeps running."""


def send(submission: Submission, ray_command: Sequence[str]) -> JobSubmissionClient:
    """Uploads the files and starts the job.

    Raises UserError when no cluster takes jobs there, or another job is running this run; Fault when the cluster fails.

    Args:
        ray_command: how `ray` is called here, for messages.
    """
    client = _connect(submission.address)
    name = submission.metadata[RUN_KEY]
    try:
        jobs = client.list_jobs()
    except (OSError, RuntimeError) as error:
        raise Fault(f"the cluster at {submission.address} does not list its jobs: {_reason(error)}") from None
    for job in jobs:
        if not job.status.is_terminal() and (job.metadata or {}).get(RUN_KEY) == name:
            lines = job_lines(submission.address, str(job.submission_id), ray_command).replace("\n", "; ")
            raise UserError(f"--name {name}: job {job.submission_id} is already running it; {lines}")
    try:
        client.submit_job(
            entrypoint=shlex.join(submission.entrypoint),
            submission_id=submission.submission_id,
            runtime_env=submission.runtime_env,
            metadata=submission.metadata,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise Fault(f"the cluster at {submission.address} did not take the job: {_reason(error)}") from None
    return client


def _connect(address: str) -> JobSubmissionClient:
    for name in ("ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)  # otherwise a line for every file that is not sent
    try:
        client = JobSubmissionClient(address)
    except AuthenticationError:
        raise UserError(
            f"{address} wants another token than yours; export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE with "
            "the cluster's token"
        ) from None
    except (ConnectionError, RuntimeError) as error:
        proxy = get_environ_proxies(address).get(urlsplit(address).scheme)
        raise UserError(
            f"no Ray cluster takes jobs at {address}: {_reason(error)}; start its dashboard, or give --address"
            + (f"; the proxy {redacted(proxy)} is in between: NO_PROXY bypasses it" if proxy else "")
        ) from None
    theirs = cluster_version(client)
    if theirs and theirs != ray.__version__:
        raise UserError(f"{address} runs Ray {theirs}, this is {ray.__version__}; use the cluster's image, or its Ray")
    return client


def follow(client: JobSubmissionClient, submission_id: str, show: Callable[[str], None], how_later: str) -> int:
    """Shows the job's output until it ends, across lost connections, and returns its exit code.

    Args:
        how_later: the command that shows the output again, for the message that the head is silent.
    """
    num_shown = 0

    def show_new(text: str, begins_at: int = 0) -> None:
        nonlocal num_shown
        if new := text[max(num_shown - begins_at, 0) :]:
            show(new)
            num_shown += len(new)

    async def tail() -> None:
        position = 0  # every connection sends the whole output from its beginning
        async for text in client.tail_job_logs(submission_id):
            show_new(text, position)
            position += len(text)

    answered_s = time.monotonic()
    while True:
        try:
            asyncio.run(tail())
            job = client.get_job_info(submission_id)
            answered_s = time.monotonic()
            if job.status.is_terminal():
                show_new(client.get_job_logs(submission_id))
                return _exit_code(job, show)
        except (OSError, RuntimeError) as error:
            if time.monotonic() - answered_s > _SILENCE_LIMIT_S:
                raise Fault(
                    f"the head has not answered for {_SILENCE_LIMIT_S:g} s ({_reason(error)}); the job may still "
                    f"be running; {how_later}"
                ) from None
        time.sleep(_RETRY_S)


def _exit_code(job: JobDetails, show: Callable[[str], None]) -> int:
    if job.status is JobStatus.SUCCEEDED:
        return 0
    if job.status is JobStatus.STOPPED:  # Ray has no exit code for it: as a shell counts SIGTERM
        return 128 + signal.SIGTERM
    if job.driver_exit_code is None and job.message:  # it never started, or its node was lost: only Ray says why
        show(f"{job.message.strip()}\n")
    return job.driver_exit_code or 1


def _reason(error: Exception) -> str:
    return one_line(error, 300).rstrip(".")
