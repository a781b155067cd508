"""`resnet-dist evaluate`: trained models under a test protocol on this machine, in one process or several, and what an
evaluation leaves: files in a folder, and a run in an MLflow experiment.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from data_prep.beton.files import make_folder, read_small, write_text_atomically
from data_prep.beton.manifest import Manifest, load_manifest
from data_prep.shown import few
from data_prep.strict_json import parse
from resnet_dist.config.loading import flatten
from resnet_dist.config.recipe import CenterCrop
from resnet_dist.data.batch import Batch
from resnet_dist.data.checks import (
    mixed_pictures,
    other_pictures,
    picture_settings,
    require_classes,
    require_classes_of,
    training_data_note,
)
from resnet_dist.data.decoder import eval_images
from resnet_dist.data.loader import BetonLoader
from resnet_dist.data.order import eval_batch_size
from resnet_dist.errors import Fault, UserError
from resnet_dist.evaluation.comparison import Comparison, compare, require_imagenet_order
from resnet_dist.evaluation.predictions import PredictionFile, PredictionOutputs, part_path, row_type, write_predictions
from resnet_dist.evaluation.protocols import (
    AveragedClassifier,
    EnsembleMember,
    Protocol,
    SameShape,
    View,
    make_fully_convolutional,
)
from resnet_dist.evaluation.report import as_csv, as_json, class_lines, draw_calibration, draw_classes
from resnet_dist.evaluation.views import ViewBatch, ViewLoader
from resnet_dist.gpus.device import device_of
from resnet_dist.gpus.nvml import gpu_handles
from resnet_dist.tracking.datasets import DataInput
from resnet_dist.tracking.mlflow_run import end_run, end_status, log_details, log_folder, open_run, run_file
from resnet_dist.tracking.plots import draw_confusion
from resnet_dist.tracking.tracker import SpoolTracker
from resnet_dist.training.evaluate import Evaluation, Labelled, sparse_json
from resnet_dist.training.evaluate import evaluate as evaluate_samples
from resnet_dist.training.model import Precision, set_backends
from resnet_dist.weights.source import TrainedModel, load_model

T = TypeVar("T")
_LIMIT = timedelta(hours=1)
"""Limit for one collective: workers meet only at the end, and their shares differ by at most one batch."""


def on_local_workers(work: Callable[[int, int], T], num_workers: int) -> T:
    """`work(rank, world_size)` on every worker; returns rank 0's result. One worker is this process itself.

    `work` and its result are pickled. Raises what a worker raised if that is a UserError or a Fault; a Fault, with the
    last line of the cause, for anything else, including a killed worker; then all other workers are ended.
    """
    if num_workers == 1:
        return work(0, 1)
    with tempfile.TemporaryDirectory(prefix="resnet-dist-workers-") as folder:
        try:
            spawn(_worker, args=(work, num_workers, folder), nprocs=num_workers)
        except (ProcessRaisedException, ProcessExitedException) as error:
            raise _cause(Path(folder), error) from None
        result: T = pickle.loads((Path(folder) / "result").read_bytes())
        return result


def _worker(rank: int, work: Callable[[int, int], Any], num_workers: int, folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=num_workers, timeout=_LIMIT
    )
    try:
        result = work(rank, num_workers)
        if rank == 0:
            (Path(folder) / "result").write_bytes(pickle.dumps(result))
    except Exception as error:
        (Path(folder) / f"error-{rank}").write_bytes(_pickled(error))
        raise
    finally:
        dist.destroy_process_group()
    # On a busy machine gloo's threads may outlive the interpreter, which then aborts after its work is done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _pickled(error: Exception) -> bytes:
    known = error if type(error) in (UserError, Fault) else Fault(traceback.format_exception_only(error)[-1].strip())
    return pickle.dumps(known)


def _cause(folder: Path, error: Exception) -> Exception:
    """The error of the worker that failed first; other workers fail because it is gone."""
    errors = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        first: Exception = pickle.loads(errors[0].read_bytes())
        return first
    return Fault(f"a worker exited without an error message: {str(error).strip().splitlines()[-1]}")


@dataclass(frozen=True)
class EvaluationJob:
    """A worker's input: plain data, and models on the CPU."""

    models: tuple[TrainedModel, ...]
    protocol: Protocol
    beton: Path
    num_threads: int
    gpus_per_worker: int = 0
    predictions: Path | None = None
    """Folder in which each worker writes what it predicted."""
    keeps_all: bool = False
    """Whether it writes the probabilities of all classes."""


@dataclass(frozen=True)
class Evaluated:
    job: EvaluationJob
    manifest: Manifest
    result: Evaluation
    images_per_s: float
    """Speed of all workers together, by the slowest one's time, without start-up and loading models."""
    warnings: tuple[str, ...] = ()

    @property
    def comparison(self) -> Comparison | None:
        """With the published accuracy, of a single model that has one."""
        model, protocol = self.job.models[0], self.job.protocol
        if len(self.job.models) > 1 or model.published is None:
            return None
        crop = model.recipe.data.eval if protocol.fully_convolutional else protocol.crop(model.recipe.data.eval)
        return compare(model.published, model.recipe, protocol.kind, crop, self.manifest, self.metrics())

    def metrics(self) -> dict[str, float]:
        assert self.result.calibration is not None
        return {
            **self.result.metrics(),
            **({"val/not_finite": float(self.result.num_not_finite)} if self.result.num_not_finite else {}),
            "val/ece": self.result.calibration.ece,
            "val/images_per_s": self.images_per_s,
        }


def evaluate(
    model: str | Sequence[str],
    data: str | Path,
    protocol: Protocol = Protocol(),  # noqa: B008 - frozen
    *,
    tracking_uri: str | None = None,
    num_threads: int = 1,
    num_workers: int = 1,
    gpus_per_worker: int = 0,
    ignore_class_names: bool = False,
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    weights: str | Path | None = None,
    outputs: PredictionOutputs | None = None,
) -> Evaluated:
    """Evaluates a model, or the average of several, on every sample of a beton once.

    Args:
        model: one or more of what `load_model` takes.
        data: a beton with its manifest.
        num_threads: decoding threads of each worker.
        num_workers: processes. Neither the counts nor the loss depend on it.
        gpus_per_worker: 1: worker k computes on GPU k. A GPU's sums may differ from the CPU's in the last bits.
        ignore_class_names: class k of the data is class k of every model, whatever their names.
        recipe, overrides, weights: as `load_model` takes them, for a file of weights and for published weights.
        outputs: files to make of the predictions. They do not depend on the number of workers either.

    Raises UserError if there is no such model, the beton is missing or of other classes, or the protocol does not fit;
    Fault if a GPU cannot be used.
    """
    beton = Path(data)
    manifest = load_manifest(beton)
    sources = [model] if isinstance(model, str) else model
    if weights is not None and len(sources) > 1:
        raise UserError("--weights: is the file of one published model; evaluate each alone")
    models = tuple(
        load_model(source, tracking_uri, recipe=recipe, overrides=overrides, weights=weights) for source in sources
    )
    warnings = [mixed_pictures(manifest, str(beton))]
    for trained in models:
        if trained.unexpected:
            warnings.append(f"{trained.name}: the net has no place for its {few(trained.unexpected)}")
        warnings += trained.notes
        if trained.published is not None:
            require_classes(trained.recipe, manifest, beton)
            warnings.append(None if ignore_class_names else require_imagenet_order(manifest, beton, trained.published))
        elif not ignore_class_names and not trained.weights_digest:
            way_out = (
                "convert it with the same classes in the same order (--classes FILE), or, if only their names "
                "differ, add --ignore-class-names"
            )
            warnings.append(require_classes_of(trained.name, trained.class_names, manifest, beton, way_out))
        require_classes(trained.recipe, manifest, beton)
        warnings.append(training_data_note(manifest, beton, trained.data_digest))
        if trained.pictures is not None:
            warnings.append(other_pictures(trained.pictures, picture_settings(manifest), trained.name, str(beton)))
        protocol.views(trained.recipe.data.eval)
        if protocol.fully_convolutional:
            make_fully_convolutional(trained.classifier, trained.recipe.data.train.size, trained.name)
    if gpus_per_worker == 0 and (num_gpus := len(gpu_handles())):
        warnings.append(f"this machine has {num_gpus} GPUs, which are not used without gpus_per_worker (1)")
    reference = models[0].recipe
    with ExitStack() as stack:
        job = EvaluationJob(models, protocol, beton, num_threads, gpus_per_worker)
        if outputs is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="resnet-dist-predictions-")))
            job = replace(job, predictions=folder, keeps_all=outputs.keeps_all(reference.model.num_classes))
        result, seconds = on_local_workers(partial(_evaluate_share, job), num_workers)
        if outputs is not None:
            # Whole images have no crop: then the recipe's.
            crop = reference.data.eval if protocol.fully_convolutional else protocol.crop(reference.data.eval)
            images, num_classes = eval_images(reference, crop), reference.model.num_classes
            warnings.append(write_predictions(outputs, folder, num_workers, beton, num_classes, images, num_threads))
    shown = list(dict.fromkeys(warning for warning in warnings if warning is not None))
    if result.num_not_finite:
        shown.append(
            f"the {'model' if len(models) == 1 else 'models'} gave NaN or infinity for {result.num_not_finite} of "
            f"{result.num_samples} samples (the first: sample {result.first_not_finite}); they count as wrong"
        )
    return Evaluated(job, manifest, result, manifest.num_samples / seconds, tuple(shown))


def _evaluate_share(job: EvaluationJob, rank: int, world_size: int) -> tuple[Evaluation, float]:
    """One worker's part; the result, and the seconds of the slowest worker, are the same on all."""
    device = device_of(job.gpus_per_worker, rank)
    first = job.models[0].recipe
    set_backends(first.train)
    torch.set_num_threads(job.num_threads)
    manifest = load_manifest(job.beton)
    with ExitStack() as stack:
        model, batches, precision = open_protocol(job, device, stack)
        keep = None
        if job.predictions is not None:
            file = stack.enter_context(part_path(job.predictions, rank).open("wb"))
            keep = PredictionFile(file, row_type(first.model.num_classes, keeps_all=job.keeps_all))
        began = time.perf_counter()
        result = evaluate_samples(
            model.to(device),
            batches,
            num_samples=manifest.num_samples,
            batch_size=eval_batch_size(first.eval.batch_size, device.type),
            rank=rank,
            world_size=world_size,
            device=device,
            precision=precision,
            num_classes=first.model.num_classes,
            confusion=True,
            keep=keep,
        )
        seconds = torch.tensor(time.perf_counter() - began)
    if world_size > 1:
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return result, float(seconds)


Batches = Callable[[NDArray[np.int64]], Iterable[Labelled]]


def open_protocol(job: EvaluationJob, device: torch.device, stack: ExitStack) -> tuple[nn.Module, Batches, Precision]:
    """The model and its batches. One model on one crop is what training evaluates, bit for bit."""
    members = [_member(model, job.protocol, device) for model in job.models]
    first = job.models[0].recipe
    batch_size = eval_batch_size(first.eval.batch_size, device.type)
    views = list(dict.fromkeys(view for member in members for view in member.views))
    if len(views) > 1 or views[0].place != "centre":
        loader = ViewLoader(
            job.beton,
            views,
            batch_size=batch_size,
            num_threads=job.num_threads,
            device=device,
        )
        stack.enter_context(closing(loader))
        return AveragedClassifier(members, first.model.num_classes), loader.batches, Precision("fp32")
    (view,) = views
    crop = CenterCrop(kind="center_crop", size=view.size, resize=view.shorter_side, interpolation=view.interpolation)
    crops = BetonLoader(
        job.beton,
        eval_images(first, crop),
        batch_size=batch_size,
        num_threads=job.num_threads,
        device=device,
    )
    stack.enter_context(closing(crops))
    if len(members) == 1 and not job.protocol.flips:
        return members[0].classifier, partial(crops.epoch, 0), members[0].precision
    averaged = AveragedClassifier(members, first.model.num_classes)
    return averaged, partial(_as_views, crops, view), Precision("fp32")


def _member(model: TrainedModel, protocol: Protocol, device: torch.device) -> EnsembleMember:
    recipe = model.recipe
    return EnsembleMember(
        model.classifier,
        protocol.views(recipe.data.eval),
        protocol.flips,
        Precision(recipe.train.precision),
        max_pixels=eval_batch_size(recipe.eval.batch_size, device.type) * recipe.data.eval.size**2,
    )


def _as_views(loader: BetonLoader, view: View, ids: NDArray[np.int64]) -> Iterator[ViewBatch]:
    for batch in loader.epoch(0, ids):
        yield ViewBatch({view: [SameShape(_all_places(batch), batch.images)]}, batch.labels)


def _all_places(batch: Batch) -> Tensor:
    return torch.arange(len(batch.labels), device=batch.labels.device)


MAX_RESULT_BYTES = 16 << 20
_FILES = "evaluation"


def facts_of(evaluated: Evaluated) -> dict[str, Any]:
    """What was evaluated, how, and on which data."""
    job, manifest = evaluated.job, evaluated.manifest
    protocol = job.protocol
    views: dict[str, Any] = {"scales": list(protocol.scales)}
    if not protocol.fully_convolutional:
        crops = [protocol.crop(model.recipe.data.eval) for model in job.models]
        views = {"size": [crop.size for crop in crops], "resize": [crop.resize for crop in crops]}
    return {
        "models": [model.name for model in job.models],
        "nets": [model.recipe.model.name for model in job.models],
        "recipe_hashes": [model.recipe_hash for model in job.models],
        **({"weights_digests": digests} if any(digests := [model.weights_digest for model in job.models]) else {}),
        "protocol": protocol.kind,
        **views,
        "interpolation": [model.recipe.data.eval.interpolation for model in job.models],
        "data": str(job.beton),
        "data_digest": manifest.digest,
        "num_samples": manifest.num_samples,
        **({"published": comparison.as_dict()} if (comparison := evaluated.comparison) else {}),
    }


def write_files(evaluated: Evaluated, folder: Path) -> None:
    """`result.json`, `per_class.csv`, `confusion.json` and their figures, in the folder `evaluation` of `folder`."""
    facts = facts_of(evaluated)
    require_same_evaluation(facts, folder)
    folder = folder / _FILES
    result, names = evaluated.result, evaluated.manifest.class_names
    assert result.confusion is not None
    assert result.calibration is not None
    make_folder(folder)
    lines = class_lines(result.confusion, names, evaluated.manifest.class_counts)
    texts = {
        "result.json": as_json(facts, evaluated.metrics(), result.calibration),
        "per_class.csv": as_csv(lines),
        "confusion.json": sparse_json(result.confusion),
    }
    for name, text in texts.items():
        write_text_atomically(folder / name, text)
    draw_classes(lines, folder / "per_class.png")
    draw_calibration(result.calibration, folder / "calibration.png")
    draw_confusion(result.confusion, names, folder / "confusion.png")


def require_same_evaluation(facts: dict[str, Any], folder: Path) -> None:
    """UserError if the folder's MLflow run is of another evaluation, whose numbers it would keep."""
    before = folder / _FILES / "result.json"
    if not run_file(folder).exists() or not before.exists():
        return
    try:
        found = parse(read_small(before, MAX_RESULT_BYTES), max_bytes=MAX_RESULT_BYTES, allow_nan=True)
    except (OSError, ValueError):
        return
    if not isinstance(found, dict):
        return
    other = [key for key, value in facts.items() if key != "data" and found.get(key, value) != value]
    if other:
        raise UserError(
            f"--output {folder}: holds the MLflow run of another evaluation (other {', '.join(other)}); "
            "name another folder"
        )


def log_evaluation(evaluated: Evaluated, folder: Path, tracking_uri: str, experiment: str) -> str:
    """A run of the experiment with the numbers and the files that `write_files` wrote; returns its id.

    The folder then records its MLflow run, and evaluating into it again continues that run. Raises UserError,
    Fault.
    """
    facts, manifest = facts_of(evaluated), evaluated.manifest
    tags = {"kind": "evaluation", "data_digest": manifest.digest, "models": ", ".join(facts["models"])}
    name = f"{'+'.join(_short(facts['nets']))} {facts['protocol']}"
    handle = open_run(tracking_uri, experiment, name, folder, tags, {**_recipe_params(evaluated), **_params(facts)})
    with end_status(partial(end_run, handle)):
        data = DataInput(
            name=f"{evaluated.job.beton.parent.name}/{evaluated.job.beton.stem}",
            digest=manifest.digest.partition(":")[2],
            context="evaluation",
            location=str(evaluated.job.beton),
            facts={"num_samples": manifest.num_samples, "num_classes": manifest.num_classes},
        )
        log_details(handle, texts={}, inputs=[data])
        tracker = SpoolTracker(folder, handle.run_id, tracking_uri)
        tracker.metrics(evaluated.metrics(), step=0)
        tracker.flush(timeout_s=60.0)
        tracker.close()
        log_folder(handle, folder / _FILES, _FILES)
    return handle.run_id


def _params(facts: dict[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in facts.items() if key not in ("models", "data_digest")}


_OF_EVALUATION = ("model.", "data.eval.", "data.mean", "data.std", "data.decoder")
"""Keys of a recipe that say how weights from elsewhere were evaluated; how they were trained it does not know."""


def _recipe_params(evaluated: Evaluated) -> dict[str, str]:
    """A single model's recipe, under the keys that its training run has in MLflow, so that one search finds both."""
    models = evaluated.job.models
    if len(models) > 1:
        return {}
    recipe = flatten(models[0].recipe)
    trained_here = not models[0].weights_digest
    return {key: value for key, value in recipe.items() if trained_here or key.startswith(_OF_EVALUATION)}


def _short(nets: Sequence[str]) -> list[str]:
    return [f"{nets.count(net)}x{net}" if nets.count(net) > 1 else net for net in dict.fromkeys(nets)]
