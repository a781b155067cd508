"""`resnet-dist export`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


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
            metavar="FILE.beton", help="Images for the check, of the net's classes. Without it: made-up ones."
        ),
    ] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow server or sqlite file of a model URI.  [default: $MLFLOW_TRACKING_URI]")
    ] = None,
) -> None:
    """Write a trained net as one file that needs nothing of this project, checked against the net.

    What to do before and after it, and the class names, stand in FILE.json.

    Example: resnet-dist export runs/demo --output demo.onnx --data data/digits/val.beton
    """
    from resnet_dist.launch.export import export_model
    from resnet_dist.tracking.uris import absolute_tracking_uri

    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    done = export_model(model, output, tracking_uri=absolute_tracking_uri(uri, Path.cwd()) if uri else None, data=data)
    for warning in done.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"{done.path} and {done.card.name}: logits within {done.max_difference:.2g} of the net's own")
