"""`resnet-dist evaluate` and `export`: trained models, used."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from resnet_dist.cli.options import AsJson, Sets, TrackingUri, given_tracking_uri, numbers
from resnet_dist.errors import UserError


class ProtocolName(StrEnum):
    ONE_CROP = "1-crop"
    FLIP = "flip"
    TEN_CROP = "10-crop"
    MULTI_SCALE = "multi-scale"


class KeyNames(StrEnum):
    TORCHVISION = "torchvision"
    TIMM = "timm"
    OWN = "own"


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="A checkpoint's folder, a run's folder, an MLflow model URI, published weights "
            "(torchvision:NAME.ENTRY, timm:NAME.TAG) or a file of weights (.pth, .pt, .th, .safetensors); the "
            "predictions of several are averaged.",
        ),
    ],
    data: Annotated[Path, typer.Option(metavar="FILE.beton", help="The beton to evaluate on.")],
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Of a file of weights: the recipe that says its net and test transform."),
    ] = None,
    sets: Sets = [],
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The file of published weights, where it is not in torch's or Hugging Face's cache."
        ),
    ] = None,
    protocol: Annotated[
        ProtocolName,
        typer.Option(
            help="1-crop: the centre; flip: the centre and its mirror image; 10-crop: corners and centre, "
            "each also mirrored; multi-scale: whole images at --scales, also mirrored, by the model made fully "
            "convolutional."
        ),
    ] = ProtocolName.ONE_CROP,
    size: Annotated[int | None, typer.Option(min=1, help="Side of the crops, px.  [default: the recipe's]")] = None,
    resize: Annotated[
        int | None,
        typer.Option(min=1, help="Shorter side before cropping, px.  [default: in the recipe's proportion to --size]"),
    ] = None,
    scales: Annotated[
        str, typer.Option(metavar="N,N,...", help="Shorter sides of the images for multi-scale, px.")
    ] = "224,256,384,480,640",
    predictions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Table to write, .parquet or .csv: for every sample what was predicted."),
    ] = None,
    all_probabilities: Annotated[
        bool,
        typer.Option(
            "--all-probabilities",
            help="In --predictions, probabilities of all classes.  [default: of the top 5; of all up to 20 classes]",
        ),
    ] = False,
    worst: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Sheet to write: the 40 samples with the highest losses.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder for result.json, per_class.csv, confusion.json and figures."),
    ] = None,
    experiment: Annotated[
        str | None,
        typer.Option(help="Record it as a run of this MLflow experiment; needs --output and --tracking-uri."),
    ] = None,
    tracking_uri: TrackingUri = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    gpus_per_worker: Annotated[
        int,
        typer.Option(min=0, max=1, help="1: process k computes on GPU k; 0: all compute on the CPU."),
    ] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Loader and compute threads of each process.")] = 1,
    ignore_class_names: Annotated[
        bool,
        typer.Option(
            "--ignore-class-names",
            help="Match classes by number, whatever their names. Without it, different names or another order are "
            "refused.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a model, or the average of several, on every sample exactly once.

    The result does not depend on --workers. Published weights bring their net and test transform, and the published
    accuracy is printed beside the measured one. On all of ImageNet's 50,000 validation images, evaluated as published,
    a difference of more than 0.05 points is exit code 1.

    Example: resnet-dist evaluate runs/demo --data data/digits/val.beton --protocol flip --output evaluations/demo

    Example: resnet-dist evaluate torchvision:resnet152.IMAGENET1K_V1 --data data/imagenet/val.beton
    """
    from resnet_dist.evaluation.evaluate import evaluate, log_evaluation, write_files
    from resnet_dist.evaluation.predictions import PredictionOutputs
    from resnet_dist.evaluation.protocols import Protocol
    from resnet_dist.evaluation.report import as_json_numbers

    uri = given_tracking_uri(tracking_uri)
    if experiment and (output is None or uri is None):
        raise UserError("--experiment: needs --output FOLDER, and --tracking-uri or $MLFLOW_TRACKING_URI")
    outputs = PredictionOutputs(predictions, all_probabilities, worst)
    evaluated = evaluate(
        models,
        data,
        Protocol(protocol.value, size, resize, numbers("--scales", scales, at_least=1)),
        tracking_uri=uri,
        num_threads=threads,
        num_workers=workers,
        gpus_per_worker=gpus_per_worker,
        ignore_class_names=ignore_class_names,
        recipe=recipe,
        overrides=sets,
        weights=weights,
        outputs=outputs if predictions or worst else None,
    )
    for warning in evaluated.warnings:
        typer.echo(f"warning: {warning}", err=True)
    metrics, comparison = evaluated.metrics(), evaluated.comparison
    if as_json:
        published = {"published": comparison.as_dict()} if comparison else {}
        typer.echo(json.dumps({**as_json_numbers(metrics), **published}, sort_keys=True))
    else:
        typer.echo(
            f"top-1 {metrics['val/top1']:.2f} %  top-5 {metrics['val/top5']:.2f} %  "
            f"balanced {metrics['val/balanced_top1']:.2f} %  loss {metrics['val/loss']:.6f}  "
            f"calibration error {metrics['val/ece']:.2f} %  {metrics['val/images_per_s']:.3g} images/s"
        )
        if comparison:
            typer.echo(comparison.sentence())
    if output is not None:
        write_files(evaluated, output)
        if experiment and uri:
            log_evaluation(evaluated, output, uri, experiment)
    if comparison and comparison.verdict == "differs":
        raise typer.Exit(1)


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT_OR_MODEL_URI", help="A checkpoint's folder, a run's folder, or an MLflow model URI."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="File to write: .onnx, .pt2 (torch.export), .pt or .ts (TorchScript), or weights alone: .safetensors, "
            ".pth.",
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.beton", help="Images for the check, of the model's classes.  [default: random images]"
        ),
    ] = None,
    keys: Annotated[
        KeyNames | None,
        typer.Option(
            help="Whose names the weights have.  [default: the first of torchvision, timm and own that has the net]"
        ),
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--license", metavar="TEXT", help="Licence of the weights, for FILE.json.")
    ] = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Export a trained model to one file that needs nothing from this project, and compare the two.

    FILE.json describes the input and the output of the model, and has the class names. A .safetensors file has that as
    its metadata too. Weights alone take normalised floats, the other formats uint8 pixels.

    Example: resnet-dist export runs/demo --output demo.onnx --data data/digits/val.beton
    """
    from resnet_dist.weights.export import export_model

    done = export_model(
        model,
        output,
        tracking_uri=given_tracking_uri(tracking_uri),
        data=data,
        keys=None if keys is None else keys.value,
        licence=licence,
    )
    for warning in done.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"{done.path} and {done.card.name}: logits within {done.max_difference:.2g} of the model's own")
    if done.library is not None:
        typer.echo(f"{done.library.keys} keys, for {done.library.call}; input: normalised floats, see {done.card.name}")
