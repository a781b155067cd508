"""`resnet-dist bench ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

bench_app = typer.Typer(no_args_is_help=True, help="Measure parts of the system beside their peers, paired in one run.")


@bench_app.command("loader")
def bench_loader(
    beton: Annotated[Path, typer.Argument(metavar="FILE.beton", help="JPEGs of the size that interests you.")],
    threads: Annotated[int, typer.Option(min=1, help="Loader threads of every peer.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Passes of every peer, in turns.")] = 5,
) -> None:
    """Our loader against stock FFCV, torchvision and, where it is installed, DALI, as a Markdown table.

    Example: resnet-dist bench loader data/imagenet/val.beton --threads 2
    """
    from resnet_dist.bench.loader import bench_loader as measure

    typer.echo(measure(beton, num_threads=threads, rounds=rounds))


@bench_app.command("tracking")
def bench_tracking(
    steps: Annotated[int, typer.Option(min=10, help="Steps in a block.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="Blocks of every state of the server, in turns.")] = 3,
    folder: Annotated[
        Path | None, typer.Option(help="Where the run lies while it is measured.  [default: a temporary folder]")
    ] = None,
) -> None:
    """What a training step pays for its metrics, with an MLflow server that is up, killed and frozen.

    Example: resnet-dist bench tracking --rounds 5
    """
    from resnet_dist.bench.tracking import bench_tracking as measure

    typer.echo(measure(num_steps=steps, rounds=rounds, folder=folder))
