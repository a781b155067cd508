"""`resnet-dist study ...`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from resnet_dist.cli.options import ProfileFile, ProfileSets, load_profile_file
from resnet_dist.config.profile import absolute_tracking_uri
from resnet_dist.errors import UserError

study_app = typer.Typer(no_args_is_help=True, help="The papers' claims on a laptop: small runs, tables, figures.")
Depths = Annotated[str, typer.Option(metavar="N,N,...", help="Depths of the models.")]
Seeds = Annotated[str, typer.Option(metavar="N,N,...", help="Seeds; every one costs all trainings again.")]


@study_app.command()
def degradation(
    on: ProfileFile,
    profile_set: ProfileSets = [],  # noqa: B006 - typer reads the default, nothing writes it
    depths: Depths = "8,20,32,44,56",
    seeds: Seeds = "0,1",
) -> None:
    """Plain against residual nets of growing depth on digits: 30 trainings, about half an hour on a free core.

    Stopped early, the same command resumes. It needs data_root/digits (data-prep convert --source digits).

    Example: resnet-dist study degradation --on cluster/profiles/laptop.yaml
    """
    from resnet_dist.studies.trainings import degradation as run

    typer.echo(str(run(load_profile_file(on, profile_set), numbers("--depths", depths), numbers("--seeds", seeds))))


@study_app.command()
def shortcuts(
    on: ProfileFile,
    profile_set: ProfileSets = [],  # noqa: B006
    seeds: Seeds = "0,1",
) -> None:
    """Shortcut options A, B, C: parameters, cost, and ResNet-20 with each on digits, about two minutes.

    Example: resnet-dist study shortcuts --on cluster/profiles/laptop.yaml
    """
    from resnet_dist.studies.trainings import shortcuts as run

    typer.echo(str(run(load_profile_file(on, profile_set), numbers("--seeds", seeds))))


@study_app.command()
def responses(on: ProfileFile, profile_set: ProfileSets = []) -> None:  # noqa: B006
    """Standard deviation of every layer's response, figure 7: 8 trainings on digits, about ten minutes.

    Example: resnet-dist study responses --on cluster/profiles/laptop.yaml
    """
    from resnet_dist.studies.measurements import responses as run

    typer.echo(str(run(load_profile_file(on, profile_set))))


@study_app.command()
def gradients(
    on: ProfileFile,
    profile_set: ProfileSets = [],  # noqa: B006
    depths: Depths = "8,20,32,44,56",
    seeds: Seeds = "0,1,2",
) -> None:
    """Length of the first block's gradient at initialisation against depth; seconds, no training.

    Example: resnet-dist study gradients --on cluster/profiles/laptop.yaml
    """
    from resnet_dist.studies.measurements import gradients as run

    profile = load_profile_file(on, profile_set)
    typer.echo(str(run(profile, numbers("--depths", depths), numbers("--seeds", seeds))))


@study_app.command()
def batchnorm(on: ProfileFile, profile_set: ProfileSets = []) -> None:  # noqa: B006
    """Batch norm's parameters and statistics, and training with and without it at larger rates; half a minute.

    Example: resnet-dist study batchnorm --on cluster/profiles/laptop.yaml
    """
    from resnet_dist.studies.measurements import batchnorm as run

    typer.echo(str(run(load_profile_file(on, profile_set))))


@study_app.command()
def curves(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of runs, or MLflow names or ids.")],
    output: Annotated[Path, typer.Option(metavar="FILE.png", help="The figure.")] = Path("curves.png"),
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow server or sqlite file.  [default: $MLFLOW_TRACKING_URI]")
    ] = None,
    max_error: Annotated[float | None, typer.Option(help="Where the y-axis ends, percent.  [default: fits]")] = None,
) -> None:
    """Draw training (thin) and validation (bold) error of several runs, plain nets beside residual ones.

    Example: resnet-dist study curves runs/plain20 runs/plain56 runs/resnet20 runs/resnet56 --output figure6.png
    """
    from resnet_dist.studies.curves import draw_errors, read_curves

    if output.suffix != ".png":
        raise UserError(f"--output {output}: give a file that ends in .png")
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    found = read_curves(runs, absolute_tracking_uri(uri, Path.cwd()) if uri else None)
    typer.echo(str(draw_errors(found, output, max_error=max_error)))


@study_app.command()
def paper(
    tracking_uri: Annotated[
        list[str], typer.Option(metavar="URI", help="MLflow server or sqlite file with measured runs; can be repeated.")
    ] = [],  # noqa: B006 - typer reads the default, nothing writes it
    output: Annotated[Path | None, typer.Option(metavar="FILE.md", help="Write it here.  [default: stdout]")] = None,
) -> None:
    """The grand table: every number of the papers' tables, what the recipe should give, what was measured, how.

    Example: resnet-dist study paper --tracking-uri sqlite:///runs/mlflow.db --output paper.md
    """
    from resnet_dist.studies.paper import paper_table

    text = paper_table([absolute_tracking_uri(uri, Path.cwd()) for uri in tracking_uri])
    if output is None:
        typer.echo(text, nl=False)
        return
    output.write_text(text, encoding="utf-8")
    typer.echo(str(output))


def numbers(option: str, text: str) -> tuple[int, ...]:
    """`8,20` as numbers. Raises UserError."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} {text}: give whole numbers with commas between, for example 8,20,32") from None
    if len(set(found)) < len(found) or min(found) < 0:
        raise UserError(f"{option} {text}: give different numbers from 0 on")
    return found
