"""`resnet-dist bench ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resnet_dist.cli.options import ProfileFile, ProfileSets

Peers = Annotated[list[str] | None, typer.Option("--peer", help="One of the table's rows; repeatable.  [default: all]")]
Jpegs = Annotated[Path, typer.Argument(metavar="FILE.beton", help="A beton of JPEGs, of the size that you train on.")]

bench_app = typer.Typer(
    no_args_is_help=True, help="Measure parts of this system, beside alternatives where there are any."
)


@bench_app.command("loader")
def bench_loader(
    beton: Jpegs,
    threads: Annotated[int, typer.Option(min=1, help="Loader threads of each peer.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Passes of each peer, in turns.")] = 5,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--setting",
            help="train-SIZE or eval-SIZE; repeatable.  [default: train-224, train-160, train-128, eval-224]",
        ),
    ] = None,
    peers: Peers = None,
) -> None:
    """Compare our loader with stock FFCV, torchvision and, where it is installed, DALI.

    Example: resnet-dist bench loader data/imagenet/val.beton --threads 2 --setting train-224
    """
    from resnet_dist.bench.loader import SETTINGS, read_setting
    from resnet_dist.bench.loader import bench_loader as measure
    from resnet_dist.bench.peers import PASSES

    chosen = [read_setting(setting) for setting in settings] if settings else SETTINGS
    typer.echo(measure(beton, num_threads=threads, rounds=rounds, peers=peers or list(PASSES), settings=chosen))


@bench_app.command("batches")
def bench_batches(
    beton: Jpegs,
    size: Annotated[int, typer.Option(min=1, help="Side of the crops, px.")] = 224,
    batches: Annotated[int, typer.Option(min=1, help="Number of batches, of 16 images each.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions of each batch.")] = 6,
    peers: Peers = None,
) -> None:
    """Compare the least CPU time of a training batch on one thread: for machines that are never idle.

    Example: resnet-dist bench batches data/imagenet/val.beton --size 160
    """
    from resnet_dist.bench.loader import bench_batches as measure
    from resnet_dist.bench.peers import BATCHES

    typer.echo(measure(beton, size=size, num_batches=batches, rounds=rounds, peers=peers or list(BATCHES)))


@bench_app.command("opening")
def bench_opening(
    samples: Annotated[int, typer.Option(min=1024, help="Number of samples in the synthetic beton.")] = 1_281_167,
    peers: Peers = None,
    keep: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder that keeps the beton for later calls.")
    ] = None,
) -> None:
    """Compare the start, the resume and the memory of our loader with stock FFCV's, on as many samples as ImageNet's.

    Example: resnet-dist bench opening --samples 1281167
    """
    from resnet_dist.bench.loader import bench_opening as measure
    from resnet_dist.bench.peers import BATCHES_IN_MEMORY

    typer.echo(measure(samples, peers or list(BATCHES_IN_MEMORY), keep))


@bench_app.command("endurance")
def bench_endurance(
    beton: Jpegs,
    epochs: Annotated[int, typer.Option(min=4, help="Number of epochs.")] = 20,
    threads: Annotated[int, typer.Option(min=1, help="Loader threads.")] = 2,
    size: Annotated[int, typer.Option(min=1, help="Side of the crops, px.")] = 224,
) -> None:
    """Watch the memory, threads and file handles of our loader over many epochs.

    Example: resnet-dist bench endurance data/imagenet/val.beton --epochs 20
    """
    from resnet_dist.bench.loader import bench_endurance as measure

    typer.echo(measure(beton, num_epochs=epochs, num_threads=threads, size=size))


@bench_app.command("shuffle")
def bench_shuffle(
    samples: Annotated[int, typer.Option(min=1024, help="Number of samples.")] = 1_281_167,
    page: Annotated[int, typer.Option(min=1, help="Samples on one page of the beton.")] = 73,
    classes: Annotated[int, typer.Option(min=1, help="Number of classes.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 256,
    windows: Annotated[
        list[int] | None,
        typer.Option("--window", help="Shuffle window in pages; repeatable.  [default: 64, 256, 1024, 4096]"),
    ] = None,
) -> None:
    """Measure how well the page shuffle mixes a beton that is sorted by class, beside a full shuffle.

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
    rounds: Annotated[int, typer.Option(min=1, help="Blocks for each state of the server, in turns.")] = 3,
    folder: Annotated[
        Path | None, typer.Option(help="Folder for the measured run.  [default: a temporary one]")
    ] = None,
) -> None:
    """Measure what metrics cost a training step, with an MLflow server that is up, killed or frozen.

    Example: resnet-dist bench tracking --rounds 5
    """
    from resnet_dist.bench.tracking import bench_tracking as measure

    typer.echo(measure(num_steps=steps, rounds=rounds, folder=folder))


@bench_app.command("control")
def bench_control(
    workers: Annotated[int, typer.Option(min=1, help="Workers that ask the control actor.")] = 1024,
    every: Annotated[
        float | None, typer.Option(min=0.1, help="How often each of them asks, s.  [default: as training does]")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1.0, help="How long to measure.")] = 20.0,
) -> None:
    """Measure what many workers cost the actor between them and the driver, and how soon Ctrl-C gets through.

    Example: resnet-dist bench control --workers 1024 --every 1
    """
    from resnet_dist.bench.control import bench_control as measure

    typer.echo(measure(workers, every_s=every, seconds=seconds))


@bench_app.command("spools")
def bench_spools(
    workers: Annotated[int, typer.Option(min=1, help="Workers of the run.")] = 1024,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes they are on.")] = 128,
    minutes: Annotated[float, typer.Option(min=0.1, help="How long the nodes have been measured.")] = 60.0,
    folder: Annotated[
        Path | None, typer.Option(help="Folder for the measured run.  [default: a temporary one]")
    ] = None,
) -> None:
    """Measure what many workers and nodes write to a run's spools, and how long sending it to MLflow takes.

    Example: resnet-dist bench spools --workers 1024 --nodes 128
    """
    from resnet_dist.bench.spools import bench_spools as measure

    typer.echo(measure(workers, nodes, minutes=minutes, folder=folder))


@bench_app.command("sweep")
def bench_sweep(
    space: Annotated[
        Path, typer.Argument(metavar="SPACE", exists=True, dir_okay=False, help="A search space's YAML file.")
    ],
    on: ProfileFile,
    profile_set: ProfileSets = [],
    light_trials: Annotated[int, typer.Option(min=2, help="Trials on the light path.")] = 12,
    train_trials: Annotated[
        int, typer.Option(min=2, help="Trials with a TorchTrainer each; give more than run at once.")
    ] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Sweeps of each kind, in turns.")] = 1,
) -> None:
    """Compare the trials per minute of a sweep's light path with those of one TorchTrainer per trial.

    Example: resnet-dist bench sweep tune_spaces/digits_smoke.yaml --on cluster/profiles/laptop.yaml
    """
    from resnet_dist.bench.sweep_paths import bench_sweep as measure

    typer.echo(measure(space, on, profile_set, {"light": light_trials, "train": train_trials}, rounds))


@bench_app.command("race")
def bench_race(
    sweeps: Annotated[
        list[Path] | None, typer.Argument(metavar="[SWEEP]...", help="Folders of sweeps with many seeds, to resample.")
    ] = None,
    races: Annotated[int, typer.Option(min=2, help="Races of each kind.")] = 1000,
) -> None:
    """Simulate how often a sweep's race of seeds picks the best point, and what it costs, beside equal shares.

    Example: resnet-dist bench race --races 300
    """
    from resnet_dist.bench.race import bench_race as measure

    typer.echo(measure(sweeps or [], races))


@bench_app.command("scale")
def bench_scale(
    sizes: Annotated[
        list[int] | None,
        typer.Option("--workers", min=2, help="Size of a group; repeatable.  [default: 2, 8, 16, 32, 64, 128]"),
    ] = None,
) -> None:
    """Measure what a group of workers costs each of them as it grows, over gloo, and what follows for 1,000.

    Example: resnet-dist bench scale --workers 8 --workers 32
    """
    from resnet_dist.bench.scale import SIZES
    from resnet_dist.bench.scale import bench_scale as measure

    typer.echo(measure(sizes or SIZES))


@bench_app.command("plan")
def bench_plan() -> None:
    """Compare what `resnet-dist plan` predicts with published runs.

    Example: resnet-dist bench plan
    """
    from resnet_dist.planner.published import report

    typer.echo(report(), nl=False)


@bench_app.command("host")
def bench_host(
    folder: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Folder to write checkpoints to.")
    ] = Path(),
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions.")] = 5,
) -> None:
    """Measure what the host costs a step and a checkpoint, beside the constants of `resnet-dist plan`.

    Example: resnet-dist bench host --folder /shared/runs
    """
    from resnet_dist.bench.step import bench_host as measure

    typer.echo(measure(folder, rounds))


@bench_app.command("step")
def bench_step(
    model: Annotated[str, typer.Option(help="A model's name, as in a recipe.")] = "resnet20",
    image_size: Annotated[int, typer.Option(min=8, help="Side of the images, px.")] = 32,
    micro_batch_size: Annotated[int, typer.Option(min=1, help="Images in a micro-batch.")] = 64,
    micro_batches: Annotated[int, typer.Option(min=1, help="Micro-batches of each worker per step.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes, of one thread each.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Steps in a block.")] = 20,
    rounds: Annotated[int, typer.Option(min=4, help="Blocks of each loop, in turns.")] = 20,
) -> None:
    """Compare our training step with a bare PyTorch DDP loop on CPUs, and measure what `train.reduction: exact` costs.

    Example: resnet-dist bench step --model resnet20 --rounds 20
    """
    from resnet_dist.bench.step import Settings
    from resnet_dist.bench.step import bench_step as measure

    typer.echo(measure(Settings(model, image_size, micro_batch_size, workers, steps, rounds, micro_batches)))


@bench_app.command("gpu")
def bench_gpu(
    checks: Annotated[
        list[str] | None, typer.Option("--check", help="Run only this check; repeatable.  [default: all]")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="STEM", help="Write a table to STEM.md and all measurements to STEM.json."),
    ] = None,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Run on the CPU, with tiny nets, the checks that make sense there.")
    ] = False,
) -> None:
    """Prove on one GPU that the GPU side of this project is right, and measure how fast it is.

    Checks run one after the other, each in a process of its own and for a minute at most, all within ten minutes. Exit
    code 1 if one fails. `python -m resnet_dist.bench.gpu` is the same program for machines without Ray and MLflow.

    The checks: environment, loader, copies, host-syncs, layout, numbers, merged, graphs, exact, resume, reduction,
    agreement, compile, speed-eager, speed-graphs, speed-fp16, speed-compiled, host-share, optimizers, batch-norm,
    full-loop, snapshot, other-paths. docs/gpu_check.md says what each does.

    Example: resnet-dist bench gpu --output gpu_h100
    """
    from resnet_dist.bench.gpu.__main__ import main

    named = [argument for check in checks or () for argument in ("--check", check)]
    written = ["--output", str(output)] if output is not None else []
    raise typer.Exit(main([*named, *written, *(["--cpu"] if cpu else [])]))
