"""`resnet-dist show`, `show-batch`, `schedules` and `plan`: a recipe examined without running it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resnet_dist.cli.options import AsJson, ProfileSets, RecipeFile, Sets
from resnet_dist.config.loading import bare_profile, load_profile, load_recipe, model_of_name
from resnet_dist.config.recipe import Recipe
from resnet_dist.errors import UserError

if TYPE_CHECKING:
    from resnet_dist.models import Summary
    from resnet_dist.tracking.plots import ScheduleCurve

_POINTS_PER_EPOCH = 20


def show(
    model: Annotated[str, typer.Argument(metavar="NET_OR_RECIPE", help="A model's name, or a recipe's YAML file.")],
    set_: Sets = [],
    side: Annotated[
        int | None, typer.Option(min=1, help="Side of the input image, px.  [default: the model's own]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a model's layout: output sizes, blocks, exact numbers of parameters and multiply-adds.

    Example: resnet-dist show resnet152 --set model.bottleneck_stride=1x1
    """
    from resnet_dist.models import summarise

    if model.endswith((".yaml", ".yml")):
        recipe = load_recipe(Path(model), set_)
        options, side = recipe.model.build_options(), side or recipe.data.eval.size
    else:
        options = model_of_name(model, set_).build_options() | {"num_classes": None}
    name = options.pop("name")
    summary = summarise(name, side=side, **options)
    if as_json:
        typer.echo(json.dumps({"name": name, "parameters": summary.parameters, "macs": summary.macs}))
        return
    print_model(name, summary)


def print_model(title: str, summary: Summary) -> None:
    """A model's layout as table 1 of He et al. 2015 has it, with the counts."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for heading, justify in (("part", "left"), ("output", "left"), ("contents", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    table.add_column("parameters", justify="right")
    table.add_column("MMACs", justify="right")
    for part in summary.parts:
        table.add_row(part.name, part.output, part.contents, f"{part.parameters:,}", f"{part.macs / 1e6:,.1f}")
    table.add_section()
    table.add_row("all", "", "", f"{summary.parameters:,}", f"{summary.macs / 1e6:,.1f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def show_batch(
    recipe: RecipeFile,
    data: Annotated[Path, typer.Option(metavar="FILE.beton", help="The beton to train on, or to evaluate on.")],
    output: Annotated[Path, typer.Option(metavar="PNG", help="Sheet to write.")],
    set_: Sets = [],
    epoch: Annotated[int | None, typer.Option(help="Epoch, from 0.  [default: 0]", show_default=False)] = None,
    step: Annotated[
        int | None, typer.Option(help="Step in the epoch, from 0.  [default: 0]", show_default=False)
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=1024, help="Most images on the sheet.")] = 32,
    eval_: Annotated[
        bool, typer.Option("--eval", help="Show samples from all of the beton as they are evaluated.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="Decoding threads.")] = 1,
) -> None:
    """Draw images as the net gets them in training: cropped, flipped, augmented and mixed, with their classes.

    They are exactly those of that step of any run of the recipe on this data.

    Example: resnet-dist show-batch my.yaml --data data/my/train.beton --output batch.png --epoch 3
    """
    loaded = load_recipe(recipe, set_)
    if eval_ and not (epoch is None and step is None):
        raise UserError("--eval: the evaluation has no --epoch and no --step")
    from resnet_dist.evaluation.batch_sheet import draw_evaluation_batch, draw_training_batch

    if eval_:
        drawn = draw_evaluation_batch(loaded, data, output, count=count, num_threads=threads)
    else:
        drawn = draw_training_batch(
            loaded, data, output, epoch=epoch or 0, step=step or 0, count=count, num_threads=threads
        )
    typer.echo(f"{output}: {drawn} images")


def schedules(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="Recipes' YAML files.")],
    output: Annotated[Path, typer.Option("--output", metavar="PNG", help="Figure to write.")],
    set_: Sets = [],
) -> None:
    """Plot the schedules of several recipes: learning rate and size of the training images by epoch.

    Example: resnet-dist schedules resnet_dist/recipes/*.yaml --output docs/recipes.png
    """
    loaded = [(path, load_recipe(path, set_)) for path in recipes]
    from resnet_dist.tracking.plots import draw_schedules

    typer.echo(str(draw_schedules([schedule_curve(path, recipe) for path, recipe in loaded], output)))


def schedule_curve(path: Path, recipe: Recipe) -> ScheduleCurve:
    """The rate at 20 points of every epoch; with a plateau schedule, the rate before the first plateau, and a note."""
    from resnet_dist.config.recipe import train_size
    from resnet_dist.tracking.plots import ScheduleCurve
    from resnet_dist.training.schedule import lr_at

    epochs, total = recipe.train.total_epochs, recipe.train.total_epochs * _POINTS_PER_EPOCH
    steps = range(total)
    rates = [
        lr_at(step, recipe.schedule, base_lr=recipe.optim.lr, steps_per_epoch=_POINTS_PER_EPOCH, total_steps=total)
        for step in steps
    ]
    sizes = [train_size(recipe.data, step // _POINTS_PER_EPOCH, epochs) for step in steps]
    note = f"x {recipe.schedule.gamma:g} whenever the\nerror stops falling" if recipe.schedule.kind == "plateau" else ""
    return ScheduleCurve(path.stem, [step / _POINTS_PER_EPOCH for step in steps], rates, sizes, note)


def plan(
    recipe: RecipeFile,
    gpu: Annotated[str, typer.Option(help="GPU model: v100, a100, h100, h200, b200, l4, rtx3090, ...")],
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Number of GPUs.  [default: the profile's largest group]")
    ] = None,
    net: Annotated[str, typer.Option(help="Network of one node, such as 100Gbps or 8x400Gbps.")] = "100Gbps",
    on: Annotated[
        Path | None,
        typer.Option("--on", metavar="PROFILE", help="Profile to take workers, CPUs, launches and checkpoints from."),
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of one node.")] = 8,
    cpus_per_gpu: Annotated[
        int | None, typer.Option(min=1, help="CPUs for the loader of one GPU.  [default: the profile's, or 12]")
    ] = None,
    disk: Annotated[
        str | None, typer.Option(help="Speed of a node's disk, such as 5GB/s.  [default: betons are in memory]")
    ] = None,
    min_gpus: Annotated[
        int | None, typer.Option(min=1, help="Smallest group that trains.  [default: the profile's, or all GPUs]")
    ] = None,
    spare_nodes: Annotated[int, typer.Option(min=0, help="Idle nodes that replace failed ones.")] = 0,
    mtbf_h: Annotated[
        float | None,
        typer.Option(min=0.1, help="Mean hours between failures of one node.  [default: as Llama 3's, 50,400 per GPU]"),
    ] = None,
    repair_h: Annotated[float, typer.Option(min=0.01, help="Hours until a failed node is back.")] = 4.0,
    preemptions_per_day: Annotated[float, typer.Option(min=0, help="Preemptions of one node per day.")] = 0.0,
    notice_s: Annotated[float, typer.Option(min=0, help="Seconds of warning before a preemption.")] = 120.0,
    checkpoint_minutes: Annotated[
        float | None,
        typer.Option(min=0.1, help="Minutes between checkpoints.  [default: the profile's, or the best interval]"),
    ] = None,
    restart_s: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds from losing a node to the first new step.  [default: as measured]"),
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Price of one GPU hour.")] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Number of training images, for a data set that is not known.")
    ] = None,
    replicas: Annotated[int, typer.Option(min=2, help="Number of simulated runs.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the simulation.")] = 0,
    set_: Sets = [],
    profile_set: ProfileSets = [],
    as_json: AsJson = False,
) -> None:
    """Predict speed, bottleneck, faults, hours and cost of a recipe on hardware that you do not have.

    Example: resnet-dist plan resnet_dist/recipes/resnet152_90ep.yaml --gpu h100 --gpus 8 --price 3
    """
    from resnet_dist.planner.hardware import NODE_MTBF_H, RESTART_S, parse_net
    from resnet_dist.planner.plan import Faults, Hardware, as_data, lines, make_plan
    from resnet_dist.planner.workload import workload_of

    if on is None and gpus is None:
        raise UserError("--gpus: is missing; give it, or a profile with --on")
    profile = (
        load_profile(on, profile_set)
        if on
        else bare_profile(profile_set, workers=gpus, cpus_per_worker=12, resize_every_s=600)
    )
    gpus = gpus or profile.workers.max
    minutes = checkpoint_minutes or profile.checkpoint.every_minutes
    hardware = Hardware(
        gpu=gpu.lower(),
        gpus=gpus,
        gpus_per_node=gpus_per_node,
        net_bytes_s=parse_net(net),
        cpus_per_gpu=cpus_per_gpu or profile.cpus_per_worker,
        disk_bytes_s=None if disk is None else _bytes_s(disk),
        price_per_gpu_h=price,
    )
    faults = Faults(
        mtbf_h=mtbf_h or NODE_MTBF_H * 8 / gpus_per_node,
        repair_h=repair_h,
        preemptions_per_day=preemptions_per_day,
        notice_s=notice_s,
        spare_nodes=spare_nodes,
        min_gpus=min_gpus or min(profile.workers.min, gpus),
        resize_every_s=profile.resize_every_s,
        checkpoint_every_s=None if minutes is None else 60 * minutes,
        restart_s=RESTART_S if restart_s is None else restart_s,
        replicas=replicas,
        seed=seed,
    )
    work = workload_of(load_recipe(recipe, set_), profile, images=None if images is None else (images, 0))
    found = make_plan(work, hardware, faults)
    typer.echo(json.dumps(as_data(found)) if as_json else "\n".join(lines(found)))


def _bytes_s(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MG])B/?s", text.strip(), re.IGNORECASE)
    if not match or float(match.group(1)) == 0:
        raise UserError(f"--disk {text}: expected bytes per second, such as 500MB/s or 5GB/s")
    return float(match.group(1)) * {"M": 1e6, "G": 1e9}[match.group(2).upper()]
