"""Sending a job to a cluster and following it: the effects of `resnet-dist submit`."""

from __future__ import annotations

import asyncio
import logging
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient
from requests.utils import get_environ_proxies

from data_prep.redaction import redacted
from resnet_dist.errors import Fault, UserError
from resnet_dist.jobs.submission import RUN_KEY, Submission, job_lines
from resnet_dist.launch.ray_internals import uploaded_files

_RETRY_S = 2.0
_SILENCE_LIMIT_S = 300.0
"""How long the head may be silent before following ends; the job keeps running."""
_STOPPED = 143


def files_to_send(submission: Submission) -> dict[str, int]:
    """Path -> bytes of what Ray will put into the upload."""
    _be_quiet()
    return uploaded_files(Path(submission.working_dir).absolute(), submission.excludes)


def send(submission: Submission, ray_words: Sequence[str]) -> JobSubmissionClient:
    """Uploads and starts the job. Raises UserError when there is no such cluster, or a job drives the run already.

    `ray_words`: how Ray's command is called here, for messages.
    """
    client = _connect(submission.address)
    name = submission.metadata[RUN_KEY]
    try:
        at_work = [job for job in client.list_jobs() if not job.status.is_terminal()]
    except (OSError, RuntimeError) as error:
        raise Fault(f"the cluster at {submission.address} does not list its jobs: {_first_line(error)}") from None
    for job in at_work:
        if (job.metadata or {}).get(RUN_KEY) == name:
            lines = job_lines(submission.address, str(job.submission_id), ray_words).replace("\n", "; ")
            raise UserError(f"--name {name}: job {job.submission_id} is already at work on it; {lines}")
    try:
        client.submit_job(
            entrypoint=shlex.join(submission.entrypoint),
            submission_id=submission.submission_id,
            runtime_env=submission.runtime_env,
            metadata=dict(submission.metadata),
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise Fault(f"the cluster at {submission.address} did not take the job: {_first_line(error)}") from None
    return client


def follow(client: JobSubmissionClient, submission_id: str, show: Callable[[str], None], how_later: str) -> int:
    """Shows the job's output until it ends, across lost connections, and returns its exit code.

    `how_later`: the command that shows it again, for the message that the head is silent.
    """
    shown = 0

    def show_new(text: str, begins_at: int) -> None:
        nonlocal shown
        new = text[max(shown - begins_at, 0) :]
        if new:
            show(new)
            shown += len(new)

    async def tail() -> None:
        position = 0  # every connection sends the whole output from its beginning
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
                    f"the head has not answered for {_SILENCE_LIMIT_S:g} s ({_first_line(error)}); the job may still "
                    f"be running; {how_later}"
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
    _be_quiet()
    try:
        client = JobSubmissionClient(address)
    except AuthenticationError:
        raise UserError(
            f"{address} wants another token than yours; export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE with "
            "the cluster's token"
        ) from None
    except (ConnectionError, RuntimeError) as error:
        through = proxy_for(address)
        raise UserError(
            f"no Ray cluster takes jobs at {address}: {_first_line(error)}; start its dashboard, or give --address"
            + (f"; the proxy {redacted(through)} is in between: NO_PROXY bypasses it" if through else "")
        ) from None
    theirs = getattr(client, "_server_ray_version", None)
    if theirs and theirs != ray.__version__:
        raise UserError(f"{address} runs Ray {theirs}, this is {ray.__version__}; use the cluster's image, or its Ray")
    return client


def _be_quiet() -> None:
    """Otherwise every file that is not uploaded is a line of output."""
    for talkative in ("ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(talkative).setLevel(logging.ERROR)


def proxy_for(address: str) -> str | None:
    """The proxy through which `requests` would go."""
    proxy: str | None = get_environ_proxies(address).get(urlsplit(address).scheme)
    return proxy


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
