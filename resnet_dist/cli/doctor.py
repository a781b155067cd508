"""`resnet-dist doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder under the profile's storage.")],
    mend: Annotated[
        bool, typer.Option("--repair", help="Remove what is damaged or left over; nothing needs it.")
    ] = False,
) -> None:
    """Look through a run's storage: what is whole, what is not, and where the run would go on.

    Example: resnet-dist doctor runs/demo
    """
    from resnet_dist.launch.doctor import examine, repair, verdict

    findings = examine(run_dir)
    for finding in findings:
        typer.echo(f"{finding.state:<9} {finding.path.name:<32} {finding.what}")
    for finding in repair(findings) if mend else []:
        typer.echo(f"removed   {finding.path.name}")
    typer.echo(verdict(findings))
