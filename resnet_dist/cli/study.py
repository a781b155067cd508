"""`resnet-dist study ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resnet_dist.cli.options import (
    ProfileFile,
    ProfileSets,
    TrackingUri,
    given_tracking_uri,
    load_profile_file,
    numbers,
)
from resnet_dist.config.profile import absolute_tracking_uri
from resnet_dist.errors import UserError

study_app = typer.Typer(no_args_is_help=True, help="Check the papers' claims on a laptop: small runs, tables, figures.")
Depths = Annotated[str, typer.Option(metavar="N,N,...", help="Depths of the models.")]
Seeds = Annotated[str, typer.Option(metavar="N,N,...", help="Seeds; each one repeats all trainings.")]


@study_app.command()
def degradation(
    on: ProfileFile,
    profile_set: ProfileSets = [],
    depths: Depths = "8,20,32,44,56",
    seeds: Seeds = "0,1",
) -> None:
    """Compare plain and residual nets of growing depth on digits: 30 trainings, about half an hour on an idle core.

    The same command resumes after a stop. It needs data_root/digits (data-prep convert --source digits).

    Example: resnet-dist study degradation --on cluster/profiles/laptop.yaml
    """
    from resnet_dist.studies.trainings import degradation as run

    profile = load_profile_file(on, profile_set)
    typer.echo(str(run(profile, numbers("--depths", depths, at_least=0), numbers("--seeds", seeds, at_least=0))))


@study_app.command()
def shortcuts(
    on: ProfileFile,
    profile_set: ProfileSets = [],
    seeds: Seeds = "0,1",
) -> None:
    """Compare shortcut options A, B and C: parameters, cost, and a ResNet-20 with each on digits; two minutes.

    Example: resnet-dist study shortcuts --on cluster/profiles/laptop.yaml
    """
    from resnet_dist.studies.trainings import shortcuts as run

    typer.echo(str(run(load_profile_file(on, profile_set), numbers("--seeds", seeds, at_least=0))))


@study_app.command()
def responses(on: ProfileFile, profile_set: ProfileSets = []) -> None:
    """Measure the standard deviation of every layer's response (figure 7): 8 trainings on digits, ten minutes.

    Example: resnet-dist study responses --on cluster/profiles/laptop.yaml
    """
    from resnet_dist.studies.measurements import responses as run

    typer.echo(str(run(load_profile_file(on, profile_set))))


@study_app.command()
def gradients(
    on: ProfileFile,
    profile_set: ProfileSets = [],
    depths: Depths = "8,20,32,44,56",
    seeds: Seeds = "0,1,2",
) -> None:
    """Measure the norm of the first block's gradient at initialisation against depth: seconds, no training.

    Example: resnet-dist study gradients --on cluster/profiles/laptop.yaml
    """
    from resnet_dist.studies.measurements import gradients as run

    profile = load_profile_file(on, profile_set)
    typer.echo(str(run(profile, numbers("--depths", depths, at_least=0), numbers("--seeds", seeds, at_least=0))))


@study_app.command()
def batchnorm(on: ProfileFile, profile_set: ProfileSets = []) -> None:
    """Examine batch norm: its statistics, and training with and without it at larger learning rates; half a minute.

    Example: resnet-dist study batchnorm --on cluster/profiles/laptop.yaml
    """
    from resnet_dist.studies.measurements import batchnorm as run

    typer.echo(str(run(load_profile_file(on, profile_set))))


@study_app.command()
def curves(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of runs, or MLflow names or ids.")],
    output: Annotated[Path, typer.Option(metavar="FILE.png", help="Figure to write.")] = Path("curves.png"),
    tracking_uri: TrackingUri = None,
    max_error: Annotated[
        float | None, typer.Option(help="Upper end of the y-axis, percent.  [default: fits the curves]")
    ] = None,
) -> None:
    """Plot the training (thin) and validation (bold) error of several runs, plain nets beside residual ones.

    Example: resnet-dist study curves runs/plain20 runs/plain56 runs/resnet20 runs/resnet56 --output figure6.png
    """
    from resnet_dist.studies.curves import draw_errors, read_curves

    if output.suffix != ".png":
        raise UserError(f"--output {output}: give a file that ends in .png")
    found = read_curves(runs, given_tracking_uri(tracking_uri))
    typer.echo(str(draw_errors(found, output, max_error=max_error)))


@study_app.command()
def paper(
    tracking_uri: Annotated[
        list[str], typer.Option(metavar="URI", help="MLflow server or sqlite file with measured runs; repeatable.")
    ] = [],
    output: Annotated[Path | None, typer.Option(metavar="FILE.md", help="File to write.  [default: stdout]")] = None,
) -> None:
    """Print all numbers of the papers' tables beside what the recipe should give, what was measured, and how.

    Example: resnet-dist study paper --tracking-uri sqlite:///runs/mlflow.db --output paper.md
    """
    from resnet_dist.studies.paper import paper_table

    text = paper_table([absolute_tracking_uri(uri, Path.cwd()) for uri in tracking_uri])
    if output is None:
        typer.echo(text, nl=False)
        return
    output.write_text(text, encoding="utf-8")
    typer.echo(str(output))
