"""`resnet-dist submit`: one of the project's commands as a job on a Ray cluster."""

from __future__ import annotations

import os
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from resnet_dist.cli.options import ProfileFile, ProfileSets
from resnet_dist.config.loading import load_profile

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Words that `submit` does not know are the command's own."""


def submit(
    context: typer.Context,
    command: Annotated[str, typer.Argument(metavar="train|tune|convert")],
    on: ProfileFile,
    profile_set: ProfileSets = [],  # noqa: B006 - typer reads the default, nothing writes it
    name: Annotated[
        str | None,
        typer.Option(help="The run's name; the same name goes on with the same run.  [default: as the command's own]"),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="The head's dashboard.  [default: the profile's jobs_address, $RAY_API_SERVER_ADDRESS, this machine]"
        ),
    ] = None,
    working_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="What is uploaded: code, recipes, profiles.", show_default="here")
    ] = Path(),
    python: Annotated[str, typer.Option(help="The interpreter on the nodes.")] = "python",
    detach: Annotated[bool, typer.Option("--detach", help="Send the job, do not follow it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the `ray job submit` line, send nothing.")] = False,
) -> None:
    """Run `train`, `tune` or data-prep's `convert` as a job on a Ray cluster, and follow it to its end.

    All other options go to the command. Ends with the job's exit code; Ctrl-C ends the following, not the job.

    Example: resnet-dist submit train resnet_dist/recipes/resnet152_90ep.yaml --on cluster/profiles/node8.yaml
    """
    from resnet_dist.launch.submission import auth_settings, job_arguments, jobs_address, plan_submission

    profile = load_profile(on, profile_set)
    run_name, arguments = job_arguments(
        command, context.args, profile_file=on, profile_sets=profile_set, name=name, working_dir=working_dir
    )
    submission = plan_submission(
        command,
        arguments,
        profile,
        name=run_name,
        address=jobs_address(address, profile, os.environ),
        working_dir=working_dir,
        python=python,
        now=datetime.now(UTC),
    )
    auth = auth_settings(os.environ, Path.home())
    if dry_run:
        typer.echo(" ".join([*(f"{key}={value}" for key, value in auth.items()), submission.command_line()]))
        return
    os.environ.update(auth)
    from resnet_dist.launch.job_client import follow, send  # after the mode is set: Ray reads it when imported

    client = send(submission)
    later = f"follow it: ray job logs -f {submission.submission_id}, stop it: ray job stop {submission.submission_id}"
    typer.echo(f"job {submission.submission_id} at {submission.address}; {later}", err=True)
    if detach:
        return
    typer.echo("Ctrl-C ends the following, the job goes on", err=True)
    try:
        code = follow(client, submission.submission_id, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        typer.echo(f"\nthe job goes on; {later}", err=True)
        raise typer.Exit(128 + signal.SIGINT) from None
    sys.stdout.flush()
    raise typer.Exit(code)
