"""`resnet-dist evaluate` and `export`: trained models, used."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from resnet_dist.cli.options import AsJson
from resnet_dist.config.profile import absolute_tracking_uri
from resnet_dist.errors import UserError


class ProtocolName(StrEnum):
    ONE_CROP = "1-crop"
    FLIP = "flip"
    TEN_CROP = "10-crop"
    MULTI_SCALE = "multi-scale"


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT_OR_MODEL_URI...",
            help="A checkpoint's folder, a run's folder, or an MLflow model URI; several are averaged.",
        ),
    ],
    data: Annotated[Path, typer.Option(metavar="FILE.beton", help="The beton to evaluate on.")],
    protocol: Annotated[
        ProtocolName,
        typer.Option(
            help="1-crop; flip: and its mirror image; 10-crop: corners, centre, mirrored; multi-scale: whole images at "
            "--scales, mirrored, by the model made fully convolutional."
        ),
    ] = ProtocolName.ONE_CROP,
    size: Annotated[int | None, typer.Option(min=1, help="Side of the crops, px.  [default: the recipe's]")] = None,
    resize: Annotated[
        int | None, typer.Option(min=1, help="Shorter side before cropping, px.  [default: as the recipe's ratio]")
    ] = None,
    scales: Annotated[str, typer.Option(metavar="N,N,...", help="Of multi-scale: shorter sides, px.")] = (
        "224,256,384,480,640"
    ),
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write result.json, per_class.csv, confusion.json and their figures."),
    ] = None,
    experiment: Annotated[
        str | None,
        typer.Option(help="Also as a run of this MLflow experiment; needs --output and --tracking-uri."),
    ] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow server or sqlite file.  [default: $MLFLOW_TRACKING_URI]")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes on this machine; with GPUs, one each.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Loader and compute threads of each.")] = 1,
    ignore_class_names: Annotated[
        bool,
        typer.Option(
            "--ignore-class-names",
            help="Take class k of the data for class k of the model, whatever their names. Without it, other names or "
            "another order are refused.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a checkpoint or a logged model, or the average of several, exactly: every sample once.

    The result does not depend on --workers.

    Example: resnet-dist evaluate runs/demo --data data/digits/val.beton --protocol flip --output evaluations/demo
    """
    from resnet_dist.evaluation.evaluate import evaluate, log_evaluation, write_files
    from resnet_dist.evaluation.protocols import Protocol
    from resnet_dist.evaluation.report import as_json_numbers

    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    uri = absolute_tracking_uri(uri, Path.cwd()) if uri else None
    if experiment and (output is None or uri is None):
        raise UserError("--experiment: needs --output FOLDER, and --tracking-uri or $MLFLOW_TRACKING_URI")
    evaluated = evaluate(
        models,
        data,
        Protocol(protocol.value, size, resize, sides("--scales", scales)),
        tracking_uri=uri,
        num_threads=threads,
        num_workers=workers,
        ignore_class_names=ignore_class_names,
    )
    for warning in evaluated.warnings:
        typer.echo(f"warning: {warning}", err=True)
    metrics = evaluated.metrics()
    if as_json:
        typer.echo(json.dumps(as_json_numbers(metrics), sort_keys=True))
    else:
        typer.echo(
            f"top-1 {metrics['val/top1']:.2f} %  top-5 {metrics['val/top5']:.2f} %  loss {metrics['val/loss']:.6f}  "
            f"calibration error {metrics['val/ece']:.2f} %  {metrics['val/images_per_s']:.3g} images/s"
        )
    if output is not None:
        write_files(evaluated, output)
        if experiment and uri:
            log_evaluation(evaluated, output, uri, experiment)


def sides(option: str, text: str) -> tuple[int, ...]:
    """`224,256` as numbers. Raises UserError."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise UserError(f"{option} {text}: give px with commas between, for example 224,256,384")
    return found


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT_OR_MODEL_URI", help="A checkpoint's folder, a run's folder, or an MLflow model URI."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(metavar="FILE", help="What is written: .onnx, .pt2 (torch.export), .pt or .ts (TorchScript)."),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.beton", help="Images for the check, of the model's classes.  [default: random ones]"
        ),
    ] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow server or sqlite file of a model URI.  [default: $MLFLOW_TRACKING_URI]")
    ] = None,
) -> None:
    """Write a trained model as one file that needs nothing from this project, checked against the model.

    FILE.json says what to do before and after it, and has the class names.

    Example: resnet-dist export runs/demo --output demo.onnx --data data/digits/val.beton
    """
    from resnet_dist.weights.export import export_model

    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    done = export_model(model, output, tracking_uri=absolute_tracking_uri(uri, Path.cwd()) if uri else None, data=data)
    for warning in done.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"{done.path} and {done.card.name}: logits within {done.max_difference:.2g} of the model's own")
