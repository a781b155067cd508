"""`resnet-dist submit`: one of the project's commands as a job on a Ray cluster."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
import typer.main

from data_prep.runtime.environment import bypasses_proxy, without_proxy
from resnet_dist.cli.options import ProfileFile, ProfileSets
from resnet_dist.config.loading import load_profile, load_recipe
from resnet_dist.config.profile import Profile

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Words that `submit` does not know are the command's own."""


def submit(
    context: typer.Context,
    command: Annotated[str, typer.Argument(metavar="train|tune|convert")],
    on: ProfileFile,
    profile_set: ProfileSets = [],  # noqa: B006 - typer reads the default, nothing writes it
    name: Annotated[
        str | None,
        typer.Option(help="The run's name; the same name resumes the same run.  [default: as the command's own]"),
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

    All other options go to the command. Ends with the job's exit code; Ctrl-C stops showing the log, the job keeps
    running.

    Example: resnet-dist submit train resnet_dist/recipes/resnet152_90ep.yaml --on cluster/profiles/node8.yaml
    """
    from resnet_dist.code_version import read_code_version
    from resnet_dist.jobs.submission import (
        Upload,
        auth_settings,
        job_arguments,
        job_lines,
        jobs_address,
        packed_bytes,
        plan_submission,
        ray_command,
        read_checkout,
        require_fits,
    )

    profile = load_profile(on, profile_set)
    upload = Upload(working_dir, read_checkout(working_dir))
    run_name, arguments = job_arguments(
        command, context.args, profile_file=on, profile_sets=profile_set, name=name, upload=upload
    )
    require_understood(command, context.args, profile, on, run_name)
    submission = plan_submission(
        command,
        arguments,
        profile,
        name=run_name,
        address=jobs_address(address, profile, os.environ),
        upload=upload,
        python=python,
        now=datetime.now(UTC),
        code=read_code_version(working_dir.resolve()) if profile.record_changes else None,
    )
    settings = auth_settings(os.environ, Path.home())
    host = urlsplit(submission.address).hostname or ""
    if bypasses_proxy(submission.address):
        settings |= {k: v for k, v in without_proxy(os.environ, [host]).items() if os.environ.get(k) != v}
    os.environ.update(settings)
    from resnet_dist.jobs.client import files_to_send, follow, send  # Ray reads the mode on import
    from resnet_dist.launch.ray_internals import most_upload_bytes

    files = files_to_send(submission)
    require_fits(files, most_upload_bytes(), lambda paths, most: packed_bytes(working_dir, paths, most))
    for note in upload.notes():
        typer.echo(f"note: {note}", err=True)
    ray = ray_command(settings, shutil.which("ray"), Path(sys.executable))
    if dry_run:
        typer.echo(submission.command_line(ray))
        return
    client = send(submission, ray)
    megabytes = sum(files.values()) / 1e6
    typer.echo(f"sent {len(files)} files, {megabytes:.1f} MB; all users of the head's machine can read them", err=True)
    lines = job_lines(submission.address, submission.submission_id, ray)
    typer.echo(f"job {submission.submission_id} at {submission.address}\n{lines}", err=True)
    if detach:
        return
    typer.echo("Ctrl-C stops showing the log; the job keeps running", err=True)
    try:
        show_now = partial(typer.echo, nl=False)
        code = follow(client, submission.submission_id, show_now, lines.partition("\n")[0])
    except KeyboardInterrupt:
        typer.echo(f"\nthe job keeps running\n{lines}", err=True)
        raise typer.Exit(128 + signal.SIGINT) from None
    sys.stdout.flush()
    raise typer.Exit(code)


def require_understood(command: str, given: Sequence[str], profile: Profile, on: Path, name: str) -> None:
    """Refuses what the command would refuse on the cluster, as far as that shows without its data: unknown options, a
    wrong recipe or space, a model that cannot be built. Raises UserError.
    """
    if command == "convert":
        from data_prep.cli.convert import convert, require_settings

        require_settings(**_parsed(convert, command, given))
        return
    words = [*given, "--on", str(on), "--name", name]
    if command == "tune":
        from resnet_dist.cli.tune import run
        from resnet_dist.launch.preflight import require_compatible, require_micro_batch_each, require_net
        from resnet_dist.sweeps.prepare import read_sweep

        options = _parsed(run, "run", words[1:] if words[0] == "run" else words)
        read = read_sweep(options["space"], options["set_"], profile, name)
        recipe, profile = read.proxy, read.trial_profile
    else:
        from resnet_dist.cli.train import train
        from resnet_dist.launch.preflight import require_compatible, require_micro_batch_each, require_net

        options = _parsed(train, command, words)
        recipe = load_recipe(options["recipe"], options["set_"])
    require_micro_batch_each(recipe, profile)
    require_compatible(recipe, profile)
    require_net(recipe)


def _parsed(function: Callable[..., None], name: str, words: Sequence[str]) -> dict[str, Any]:
    """The values of the words as the command itself would take them. Raises typer's exception for those it refuses."""
    alone = typer.Typer(add_completion=False)
    alone.command()(function)
    context = typer.main.get_command(alone).make_context(name, list(words))
    return dict(context.params)
