"""`resnet-dist doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resnet_dist.cli.options import ProfileSets, load_profile_file
from resnet_dist.errors import UserError


def doctor(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run under the profile's storage: a folder or s3://.")
    ] = None,
    mend: Annotated[
        bool, typer.Option("--repair", help="Remove what is damaged or left over in RUN; nothing needs it.")
    ] = False,
    on: Annotated[Path | None, typer.Option("--on", metavar="PROFILE", help="Examine this profile's cluster.")] = None,
    profile_set: ProfileSets = [],  # noqa: B006 - typer reads the default, nothing writes it
) -> None:
    """Look through a run's storage - what is whole, where it would go on - or through a cluster before a run: versions,
    clocks, disks, shared paths, ports, how fast the nodes talk.

    Examples: resnet-dist doctor runs/demo      resnet-dist doctor --on cluster/profiles/laptop.yaml
    """
    if (run is None) == (on is None):
        raise UserError("give either a RUN, to look through its storage, or --on PROFILE, to examine its cluster")
    if on is not None:
        _examine_cluster(on, profile_set)
    elif run is not None:
        _examine_run(run, mend=mend)


def _examine_run(run: str, *, mend: bool) -> None:
    from resnet_dist.launch.doctor import examine, repair, verdict
    from resnet_dist.storage.location import open_storage

    storage = open_storage(run)
    findings = examine(storage)
    for finding in findings:
        typer.echo(f"{finding.state:<9} {finding.name:<32} {finding.what}")
    for finding in repair(storage, findings) if mend else []:
        typer.echo(f"removed   {finding.name}")
    typer.echo(verdict(findings))


def _examine_cluster(on: Path, profile_sets: list[str]) -> None:
    from resnet_dist.launch.cluster_doctor import Check, examine_cluster

    def tell(check: Check) -> None:
        typer.echo(f"{check.state:<9} {check.where:<16} {check.what}")

    if not examine_cluster(load_profile_file(on, profile_sets), tell):
        typer.echo("the cluster is not fit for this profile: see the lines that begin with `bad`", err=True)
        raise typer.Exit(1)
