"""`resnet-dist doctor`."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run under the profile's storage: a folder or s3://.")],
    mend: Annotated[
        bool, typer.Option("--repair", help="Remove what is damaged or left over; nothing needs it.")
    ] = False,
) -> None:
    """Look through a run's storage: what is whole, what is not, and where the run would go on.

    Example: resnet-dist doctor runs/demo
    """
    from resnet_dist.launch.doctor import examine, repair, verdict
    from resnet_dist.storage.location import open_storage

    storage = open_storage(run)
    findings = examine(storage)
    for finding in findings:
        typer.echo(f"{finding.state:<9} {finding.name:<32} {finding.what}")
    for finding in repair(storage, findings) if mend else []:
        typer.echo(f"removed   {finding.name}")
    typer.echo(verdict(findings))
