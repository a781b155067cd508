"""`resnet-dist bench ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resnet_dist.cli.options import ProfileFile, ProfileSets

bench_app = typer.Typer(no_args_is_help=True, help="Measure parts of the system beside their peers, paired in one run.")


@bench_app.command("loader")
def bench_loader(
    beton: Annotated[Path, typer.Argument(metavar="FILE.beton", help="JPEGs of the size that interests you.")],
    threads: Annotated[int, typer.Option(min=1, help="Loader threads of every peer.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Passes of every peer, in turns.")] = 5,
    settings: Annotated[
        list[str] | None, typer.Option("--setting", help="train-SIZE or eval-SIZE; may be given again.")
    ] = None,
    peers: Annotated[
        list[str] | None, typer.Option("--peer", help="Of those in the table; may be given again.")
    ] = None,
) -> None:
    """Our loader against stock FFCV, torchvision and, where it is installed, DALI, as a Markdown table.

    Example: resnet-dist bench loader data/imagenet/val.beton --threads 2 --setting train-224
    """
    from resnet_dist.bench.loader import SETTINGS, read_setting
    from resnet_dist.bench.loader import bench_loader as measure
    from resnet_dist.bench.peers import PASSES

    chosen = [read_setting(setting) for setting in settings] if settings else SETTINGS
    typer.echo(measure(beton, num_threads=threads, rounds=rounds, peers=peers or list(PASSES), settings=chosen))


@bench_app.command("batches")
def bench_batches(
    beton: Annotated[Path, typer.Argument(metavar="FILE.beton", help="JPEGs of the size that interests you.")],
    size: Annotated[int, typer.Option(min=1, help="Of the crops, px.")] = 224,
    batches: Annotated[int, typer.Option(min=1, help="Batches of 16 images.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="How often each batch is made.")] = 6,
    peers: Annotated[
        list[str] | None, typer.Option("--peer", help="Of those in the table; may be given again.")
    ] = None,
) -> None:
    """Least CPU time of a training batch, ours and our peers', on one thread: for machines that are never quiet.

    Example: resnet-dist bench batches data/imagenet/val.beton --size 160
    """
    from resnet_dist.bench.loader import bench_batches as measure
    from resnet_dist.bench.peers import BATCHES

    typer.echo(measure(beton, size=size, num_batches=batches, rounds=rounds, peers=peers or list(BATCHES)))


@bench_app.command("opening")
def bench_opening(
    samples: Annotated[int, typer.Option(min=1024, help="Samples of the made-up beton.")] = 1_281_167,
    peers: Annotated[
        list[str] | None, typer.Option("--peer", help="Of those in the table; may be given again.")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the beton is left for later calls.")
    ] = None,
) -> None:
    """Start-up, resume and memory of a loader at ImageNet's number of samples, beside stock FFCV's.

    Example: resnet-dist bench opening --samples 1281167
    """
    from resnet_dist.bench.loader import bench_opening as measure
    from resnet_dist.bench.peers import BATCHES_IN_MEMORY

    typer.echo(measure(samples, peers or list(BATCHES_IN_MEMORY), keep))


@bench_app.command("endurance")
def bench_endurance(
    beton: Annotated[Path, typer.Argument(metavar="FILE.beton")],
    epochs: Annotated[int, typer.Option(min=4)] = 20,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    size: Annotated[int, typer.Option(min=1, help="Of the crops, px.")] = 224,
) -> None:
    """Memory, threads and file handles of a loader over many epochs.

    Example: resnet-dist bench endurance data/imagenet/val.beton --epochs 20
    """
    from resnet_dist.bench.loader import bench_endurance as measure

    typer.echo(measure(beton, num_epochs=epochs, num_threads=threads, size=size))


@bench_app.command("shuffle")
def bench_shuffle(
    samples: Annotated[int, typer.Option(min=1024)] = 1_281_167,
    page: Annotated[int, typer.Option(min=1, help="Samples on a page.")] = 73,
    classes: Annotated[int, typer.Option(min=1)] = 1000,
    batch: Annotated[int, typer.Option(min=1)] = 256,
    windows: Annotated[list[int] | None, typer.Option("--window", help="In pages; may be given again.")] = None,
) -> None:
    """How well the page shuffle mixes a beton that is sorted by class, beside a full shuffle.

    Example: resnet-dist bench shuffle --window 256 --window 1024
    """
    from resnet_dist.bench.shuffle import bench_shuffle as measure

    table = measure(
        num_samples=samples,
        samples_per_page=page,
        num_classes=classes,
        batch_size=batch,
        windows=windows or [64, 256, 1024, 4096],
    )
    typer.echo(table)


@bench_app.command("tracking")
def bench_tracking(
    steps: Annotated[int, typer.Option(min=10, help="Steps in a block.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="Blocks of every state of the server, in turns.")] = 3,
    folder: Annotated[
        Path | None, typer.Option(help="Where the run is while it is measured.  [default: a temporary folder]")
    ] = None,
) -> None:
    """What a training step pays for its metrics, with an MLflow server that is up, killed and frozen.

    Example: resnet-dist bench tracking --rounds 5
    """
    from resnet_dist.bench.tracking import bench_tracking as measure

    typer.echo(measure(num_steps=steps, rounds=rounds, folder=folder))


@bench_app.command("sweep")
def bench_sweep(
    space: Annotated[Path, typer.Argument(metavar="SPACE", exists=True, dir_okay=False)],
    on: ProfileFile,
    profile_set: ProfileSets = [],  # noqa: B006
    light_trials: Annotated[int, typer.Option(min=2)] = 12,
    train_trials: Annotated[int, typer.Option(min=2, help="More than run at once.")] = 4,
    rounds: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Trials per minute of a sweep's light path beside one TorchTrainer per trial.

    Example: resnet-dist bench sweep tune_spaces/digits_smoke.yaml --on cluster/profiles/laptop.yaml
    """
    from resnet_dist.bench.sweep_paths import bench_sweep as measure

    typer.echo(measure(space, on, profile_set, {"light": light_trials, "train": train_trials}, rounds))


@bench_app.command("plan")
def bench_plan() -> None:
    """What `resnet-dist plan` predicts against what was published, as Markdown tables with the errors.

    Example: resnet-dist bench plan
    """
    from resnet_dist.planner.published import report

    typer.echo(report(), nl=False)


@bench_app.command("host")
def bench_host(
    folder: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Where checkpoints are written.")] = Path(),
    rounds: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """What the host costs a step and a checkpoint, as a Markdown table: constants of `resnet-dist plan`.

    Example: resnet-dist bench host --folder /shared/runs
    """
    from resnet_dist.bench.step import bench_host as measure

    typer.echo(measure(folder, rounds))


@bench_app.command("step")
def bench_step(
    model: Annotated[str, typer.Option(help="A model's name, as in a recipe.")] = "resnet20",
    image_size: Annotated[int, typer.Option(min=8, help="Pixels.")] = 32,
    micro_batch_size: Annotated[int, typer.Option(min=1, help="Images of a micro-batch.")] = 64,
    micro_batches: Annotated[int, typer.Option(min=1, help="Micro-batches of a worker in each step.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 2,
    steps: Annotated[int, typer.Option(min=10, help="Steps in a block.")] = 20,
    rounds: Annotated[int, typer.Option(min=4, help="Blocks of every loop, in turns.")] = 20,
) -> None:
    """A training step of this project beside a bare PyTorch DDP loop, and what `train.reduction: exact` costs; on CPUs.

    Example: resnet-dist bench step --model resnet20 --rounds 20
    """
    from resnet_dist.bench.step import Settings
    from resnet_dist.bench.step import bench_step as measure

    typer.echo(measure(Settings(model, image_size, micro_batch_size, workers, steps, rounds, micro_batches)))
