"""`resnet-dist submit`: one of the project's commands as a job on a Ray cluster."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer
import typer.main

from data_prep.runtime.environment import bypasses_proxy, without_proxy
from resnet_dist.cli.options import ProfileFile, ProfileSets
from resnet_dist.config.loading import load_profile, load_recipe
from resnet_dist.config.profile import Profile
from resnet_dist.config.run_name import as_run_name, default_run_name, require_run_name
from resnet_dist.errors import UserError

if TYPE_CHECKING:
    from resnet_dist.jobs.submission import Command

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Options that `submit` does not have are the command's."""


def submit(
    context: typer.Context,
    command: Annotated[
        str,
        typer.Argument(metavar="train|tune|convert", help="The command; its own arguments and options follow it."),
    ],
    on: ProfileFile,
    profile_set: ProfileSets = [],
    name: Annotated[
        str | None,
        typer.Option(help="Name of the run; the same name resumes the same run.  [default: as without `submit`]"),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="URL of the head's dashboard.  [default: the profile's jobs_address, $RAY_API_SERVER_ADDRESS, or this "
            "machine]"
        ),
    ] = None,
    working_dir: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            help="Folder to upload: code, recipes, profiles.  [default: the current one]",
            show_default=False,
        ),
    ] = Path(),
    python: Annotated[str, typer.Option(help="Python interpreter on the nodes.")] = "python",
    detach: Annotated[bool, typer.Option("--detach", help="Send the job without following it.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the equivalent `ray job submit` line, send nothing.")
    ] = False,
) -> None:
    """Run train, tune or data-prep's convert as a job on a Ray cluster and follow it to its end.

    Other options are passed on to the command. The exit code is the job's. Ctrl-C stops showing the log; the job keeps
    running.

    Example: resnet-dist submit train resnet_dist/recipes/resnet152_90ep.yaml --on cluster/profiles/node8.yaml
    """
    from resnet_dist.code_version import read_code_version
    from resnet_dist.jobs.submission import auth_settings, job_lines, jobs_address, plan_submission, ray_command

    profile = load_profile(on, profile_set)
    head = jobs_address(address, profile, os.environ)
    settings = auth_settings(os.environ, Path.home())
    if bypasses_proxy(head):
        without = without_proxy(os.environ, [urlsplit(head).hostname or ""])
        settings |= {key: value for key, value in without.items() if os.environ.get(key) != value}
    os.environ.update(settings)  # before Ray is imported, which reads the mode only then
    from resnet_dist.jobs.client import follow, send
    from resnet_dist.jobs.upload import read_upload

    job = read_command(command, context.args, profile, on, name)
    upload = read_upload(working_dir)
    submission = plan_submission(
        job,
        profile,
        on,
        profile_set,
        address=head,
        upload=upload,
        python=python,
        now=datetime.now(UTC),
        code=read_code_version(working_dir.resolve()) if profile.record_changes else None,
    )
    for warning in upload.warnings():
        typer.echo(f"warning: {warning}", err=True)
    ray = ray_command(settings, shutil.which("ray"), Path(sys.executable))
    if dry_run:
        typer.echo(submission.command_line(ray))
        return
    client = send(submission, ray)
    sent = f"sent {len(upload.files)} files, {sum(upload.files.values()) / 1e6:.1f} MB"
    typer.echo(f"{sent}; all users of the head's machine can read them", err=True)
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
    raise typer.Exit(code)


def read_command(command: str, words: Sequence[str], profile: Profile, on: Path, name: str | None) -> Command:
    """Checks here what the command would refuse on the cluster, as far as that shows without its data: unknown options,
    a wrong recipe or space, a model that cannot be built. Raises UserError, or typer's exception.
    """
    from resnet_dist.jobs.submission import MODULES, Command

    if command not in MODULES:
        raise UserError(f"submit {command}: takes {', '.join(MODULES)}")
    if command == "convert":
        from data_prep.cli.convert import convert, require_settings

        options = _parsed(convert, command, words)
        require_settings(**options)
        output = PurePosixPath(options["output"])
        run_name = name or as_run_name(f"convert-{output.parent.name}-{output.name.removesuffix('.beton')}")[:128]
        require_run_name(run_name)
        keys = ("input_", "output", "labels", "devkit", "classes", "split_from")
        paths = {f"--{key.strip('_').replace('_', '-')}": options[key] for key in keys if options[key] is not None}
        return Command(command, tuple(words), run_name, paths=paths)
    from resnet_dist.launch.preflight import require_compatible, require_micro_batch_each, require_net

    if command == "tune":
        from resnet_dist.cli.tune import run
        from resnet_dist.sweeps.prepare import read_sweep

        of_run = words[1:] if words and words[0] == "run" else words
        options = _parsed(run, "run", [*of_run, "--on", str(on)])
        file: Path = options["space"]
        run_name = name or file.stem
        sweep = read_sweep(file, options["set_"], profile, run_name)
        recipe, profile = sweep.proxy, sweep.trial_profile
        files: tuple[Path, ...] = (file, file.parent / Path(sweep.space.base).expanduser())
    else:
        from resnet_dist.cli.train import train

        options = _parsed(train, command, [*words, "--on", str(on)])
        file = options["recipe"]
        recipe = load_recipe(file, options["set_"])
        run_name = name or default_run_name(file, recipe)
        files = (file,)
    require_run_name(run_name)
    require_micro_batch_each(recipe, profile)
    require_compatible(recipe, profile)
    require_net(recipe)
    return Command(command, tuple(words), run_name, files)


def _parsed(function: Callable[..., None], name: str, words: Sequence[str]) -> dict[str, Any]:
    """The options as the command itself would read them. Raises typer's exception for those that it refuses."""
    alone = typer.Typer(add_completion=False)
    alone.command()(function)
    context = typer.main.get_command(alone).make_context(name, list(words))
    return dict(context.params)
