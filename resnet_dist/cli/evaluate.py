"""`resnet-dist evaluate`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from resnet_dist.cli.options import AsJson


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT_OR_MODEL_URI", help="A checkpoint's folder, a run's folder, or an MLflow model URI."
        ),
    ],
    data: Annotated[Path, typer.Option(metavar="FILE.beton", help="The beton to evaluate on.")],
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow server or sqlite file of a model URI.  [default: $MLFLOW_TRACKING_URI]")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Loader and compute threads.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Evaluate a checkpoint or a logged model exactly: every sample once.

    Example: resnet-dist evaluate runs/demo/epoch=012-step=00000132 --data data/digits/val.beton
    """
    from resnet_dist.launch.evaluate import evaluate_on
    from resnet_dist.tracking.uris import absolute_tracking_uri

    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    metrics = evaluate_on(model, data, absolute_tracking_uri(uri, Path.cwd()) if uri else None, threads)
    if as_json:
        typer.echo(json.dumps(metrics, sort_keys=True))
        return
    typer.echo(f"top-1 {metrics['val/top1']:.2f} %  top-5 {metrics['val/top5']:.2f} %  loss {metrics['val/loss']:.6f}")
