"""`resnet-dist evaluate`: trained nets under a test protocol, on this machine, in one process or several."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from data_prep.beton.manifest import Manifest, load_manifest
from resnet_dist.config.recipe_data import CenterCrop
from resnet_dist.data.batch import Batch
from resnet_dist.data.loader import BetonLoader
from resnet_dist.evaluation.averaging import AveragedClassifier, Member
from resnet_dist.evaluation.dense import make_fully_convolutional
from resnet_dist.evaluation.protocol import Protocol, View
from resnet_dist.evaluation.views import Group, ViewBatch, ViewLoader
from resnet_dist.launch.data_identity import mixed_pictures, other_pictures, picture_settings, require_classes_of
from resnet_dist.launch.local_workers import on_local_workers
from resnet_dist.launch.model_source import TrainedModel, load_model
from resnet_dist.launch.overlap import training_data_note
from resnet_dist.launch.preflight import require_classes
from resnet_dist.training.backends import set_backends
from resnet_dist.training.evaluate import Evaluation, Labelled, evaluate
from resnet_dist.training.precision import Precision


@dataclass(frozen=True)
class EvaluationJob:
    """What every worker is given: plain data and nets on the CPU."""

    models: tuple[TrainedModel, ...]
    protocol: Protocol
    beton: Path
    num_threads: int


@dataclass(frozen=True)
class Evaluated:
    job: EvaluationJob
    manifest: Manifest
    result: Evaluation
    images_per_s: float
    """Of all workers together: the slowest one's time, without loading nets and starting."""
    warnings: tuple[str, ...] = ()

    def metrics(self) -> dict[str, float]:
        assert self.result.calibration is not None
        return {
            **self.result.metrics(),
            **({"val/not_finite": float(self.result.num_not_finite)} if self.result.num_not_finite else {}),
            "val/ece": self.result.calibration.ece,
            "val/images_per_s": self.images_per_s,
        }


def evaluate_models(
    sources: Sequence[str],
    beton: Path,
    protocol: Protocol,
    *,
    tracking_uri: str | None = None,
    num_threads: int = 1,
    num_workers: int = 1,
    ignore_class_names: bool = False,
) -> Evaluated:
    """Evaluates one net, or the average of several, on every sample of `beton` once.

    `sources` as `load_model` takes them. The counts do not depend on the number of workers, nor does the loss.
    `ignore_class_names`: class k of the data is class k of every net, whatever their names.
    Raises UserError if there is no such model, the beton is missing or of other classes, or the protocol does not fit.
    """
    manifest = load_manifest(beton)
    models = tuple(load_model(source, tracking_uri) for source in sources)
    warnings = [mixed_pictures(manifest, str(beton))]
    for model in models:
        if not ignore_class_names:
            way_out = (
                "convert it with the same classes in the same order (--classes FILE), or, if only their names are "
                "others, add --ignore-class-names"
            )
            warnings.append(require_classes_of(model.name, model.class_names, manifest, beton, way_out))
        require_classes(model.recipe, manifest, beton)
        warnings.append(training_data_note(manifest, beton, model.data_digest))
        if model.pictures is not None:
            warnings.append(other_pictures(model.pictures, picture_settings(manifest), model.name, str(beton)))
        protocol.views(model.recipe.data.eval)
        if protocol.fully_convolutional:
            make_fully_convolutional(model.classifier, model.recipe.data.train.size, model.name)
    job = EvaluationJob(models, protocol, beton, num_threads)
    result, seconds = on_local_workers(partial(_evaluate_share, job), num_workers)
    said = list(dict.fromkeys(warning for warning in warnings if warning is not None))
    if result.num_not_finite:
        said.append(
            f"the {'net' if len(models) == 1 else 'nets'} gave NaN or infinity for {result.num_not_finite} of "
            f"{result.num_samples} samples (the first: sample {result.first_not_finite}); they count as wrong"
        )
    return Evaluated(job, manifest, result, manifest.num_samples / seconds, tuple(said))


def _evaluate_share(job: EvaluationJob, rank: int, world_size: int) -> tuple[Evaluation, float]:
    """One worker's part; the result, and the seconds of the slowest worker, are the same on all."""
    device = (
        torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    )
    first = job.models[0].recipe
    set_backends(first.train)
    torch.set_num_threads(job.num_threads)
    manifest = load_manifest(job.beton)
    with ExitStack() as stack:
        model, batches, precision = open_protocol(job, manifest, device, stack)
        began = time.perf_counter()
        result = evaluate(
            model.to(device),
            batches,
            num_samples=manifest.num_samples,
            batch_size=first.eval.batch_size,
            rank=rank,
            world_size=world_size,
            device=device,
            precision=precision,
            confusion_classes=first.model.num_classes,
        )
        seconds = torch.tensor(time.perf_counter() - began)
    if world_size > 1:
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return result, float(seconds)


Batches = Callable[[NDArray[np.int64]], Iterable[Labelled]]


def open_protocol(
    job: EvaluationJob, manifest: Manifest, device: torch.device, stack: ExitStack
) -> tuple[nn.Module, Batches, Precision]:
    """The net and its batches. One net on one crop is what training evaluates, to the last bit."""
    members = [_member(model, job.protocol) for model in job.models]
    first = job.models[0].recipe
    views = list(dict.fromkeys(view for member in members for view in member.views))
    if len(views) > 1 or views[0].place != "centre":
        loader = ViewLoader(
            job.beton,
            manifest,
            views,
            batch_size=first.eval.batch_size,
            num_threads=job.num_threads,
            device=device,
        )
        stack.enter_context(closing(loader))
        return AveragedClassifier(members, first.model.num_classes), loader.batches, Precision("fp32")
    crop = CenterCrop(kind="center_crop", size=views[0].size, resize=views[0].shorter_side)
    crops = BetonLoader(
        job.beton,
        manifest,
        crop,
        decoder=first.data.decoder,
        batch_size=first.eval.batch_size,
        seed=first.seed,
        num_threads=job.num_threads,
        device=device,
    )
    stack.enter_context(closing(crops))
    if len(members) == 1 and not job.protocol.flips:
        return members[0].classifier, partial(crops.epoch, 0), members[0].precision
    averaged = AveragedClassifier(members, first.model.num_classes)
    return averaged, partial(_as_views, crops, views[0]), Precision("fp32")


def _member(model: TrainedModel, protocol: Protocol) -> Member:
    recipe = model.recipe
    return Member(
        model.classifier,
        protocol.views(recipe.data.eval),
        protocol.flips,
        Precision(recipe.train.precision),
        max_pixels=recipe.eval.batch_size * recipe.data.eval.size**2,
    )


def _as_views(loader: BetonLoader, view: View, ids: NDArray[np.int64]) -> Iterator[ViewBatch]:
    for batch in loader.epoch(0, ids):
        yield ViewBatch({view: [Group(_all_places(batch), batch.images)]}, batch.labels)


def _all_places(batch: Batch) -> Tensor:
    return torch.arange(len(batch.labels), device=batch.labels.device)
