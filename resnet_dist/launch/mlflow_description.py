"""What describes a run in MLflow: parameters, tags, a page, files."""

from __future__ import annotations

import getpass
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from data_prep.beton.files import write_text_atomically
from data_prep.redaction import redacted
from resnet_dist.code_version import CodeVersion, library_versions
from resnet_dist.config.loading import flatten, to_yaml
from resnet_dist.config.profile import Profile
from resnet_dist.config.recipe import Recipe
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.cluster import ClusterNode, by_kind
from resnet_dist.launch.preflight import Prepared
from resnet_dist.launch.progress import EventLog, count_events
from resnet_dist.storage.base import RunStorage
from resnet_dist.tracking.connection import ServerUnavailable
from resnet_dist.tracking.datasets import (
    DataInput,
    PreparationRun,
    find_preparations,
)
from resnet_dist.tracking.mlflow_run import (
    RunHandle,
    log_details,
    log_folder,
    open_run,
    set_tags,
)
from resnet_dist.tracking.plots import draw_plots
from resnet_dist.tracking.spool import read_history
from resnet_dist.training.checkpoint import Identity
from resnet_dist.training.checkpoint_manager import list_saved, read_metadata

HARDWARE_KEYS = ("workers", "cpus_per_worker", "gpus_per_worker", "local_cpus", "ray_address", "resize_every_s")
"""Keys of a profile that may change each time a run resumes: tags, because MLflow never changes a parameter."""
_TRIAL_OPEN_LIMIT_S = 60.0
"""How long MLflow may take to open a trial's run: many trials may begin at once, and starting one again costs more."""


def run_params(recipe: Recipe, profile: Profile) -> dict[str, str]:
    """The recipe's keys as they are, the profile's under `profile.`."""
    kept = {key: value for key, value in flatten(profile).items() if key.partition(".")[0] not in HARDWARE_KEYS}
    return flatten(recipe) | {f"profile.{key}": value for key, value in kept.items()}


def run_tags(
    profile: Profile, identity: Identity, nodes: Sequence[ClusterNode], code: CodeVersion | None
) -> dict[str, str]:
    """Settings that may differ between two starts of one run, and MLflow's own columns."""
    hardware = {key: value for key, value in flatten(profile).items() if key.partition(".")[0] in HARDWARE_KEYS}
    return {
        "recipe_hash": identity.recipe_hash,
        "data_digest": identity.data_digest,
        **{f"profile.{key}": value for key, value in hardware.items()},
        "hardware": hardware_summary(nodes),
        "mlflow.user": _user(),
        "mlflow.source.name": "resnet-dist train",
        "mlflow.source.type": "JOB",
        **({"mlflow.source.git.commit": code.commit, "git.dirty": str(code.dirty).lower()} if code else {}),
    }


def hardware_summary(nodes: Sequence[ClusterNode]) -> str:
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    return f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}, {cpus:g} CPUs, {gpus:g} GPUs"


def node_facts(nodes: Sequence[ClusterNode]) -> dict[str, dict[str, object]]:
    """By what the nodes offer: how many there are, the labels that all of them have, and their addresses."""
    return {
        offer: {
            "nodes": len(alike),
            "labels": dict(sorted(set.intersection(*(set(node.labels.items()) for node in alike)))),
            "addresses": [node.address for node in alike],
        }
        for offer, alike in by_kind(nodes).items()
    }


def data_inputs(prepared: Prepared) -> list[DataInput]:
    return [
        DataInput(
            name=f"{prepared.recipe.data.dataset}/{PurePosixPath(source).stem}",
            digest=manifest.digest.partition(":")[2],
            context=context,
            location=source,
            facts={
                "num_samples": manifest.num_samples,
                "num_classes": len(manifest.class_names),
                "bytes": manifest.beton_bytes,
            },
        )
        for source, manifest, context in (
            (prepared.train_source, prepared.train, "training"),
            (prepared.val_source, prepared.val, "validation"),
        )
    ]


def links(inputs: Sequence[DataInput], found: Mapping[str, PreparationRun]) -> dict[str, PreparationRun]:
    """`training` and `validation` -> the run that recorded how this data was made; `found` is by digest."""
    return {data.context: found[data.digest] for data in inputs if data.digest in found}


def description(prepared: Prepared, made_by: Mapping[str, PreparationRun]) -> str:
    """Markdown: what is trained on what, and the commands that resume and evaluate it."""
    recipe, folder = prepared.recipe, prepared.storage.location
    train = recipe.train
    rows = {
        "model": f"{recipe.model.name}, {recipe.model.num_classes} classes",
        "data": f"{recipe.data.dataset}: {prepared.train.num_samples:,} train, {prepared.val.num_samples:,} validation",
        **({"data made by": ", ".join(f"[{c}]({run.page})" for c, run in made_by.items())} if made_by else {}),
        **({"starts from": _start(prepared)} if prepared.start else {}),
        "length": f"{prepared.plan.last_step:,} steps, {prepared.plan.steps_per_epoch:,} an epoch",
        "batch": f"{train.global_batch_size} images in micro-batches of {train.micro_batch_size}, {train.precision}",
        "optimizer": f"{recipe.optim.name}, lr {recipe.optim.lr:g}, weight decay {recipe.optim.weight_decay:g}",
        "schedule": _schedule(prepared),
        "seed": str(recipe.seed),
        "recipe hash": f"`{prepared.identity.recipe_hash}`",
    }
    table = "".join(f"| {key} | {value} |\n" for key, value in rows.items())
    return (
        f"{recipe.model.name} on {recipe.data.dataset}.\n\n| | |\n|---|---|\n{table}\n"
        "Resume it, or train it again under another name:\n\n"
        f"    resnet-dist train {folder}/recipe.yaml --on {folder}/profile.yaml --name {prepared.name}\n\n"
        "Evaluate its newest checkpoint:\n\n"
        f"    resnet-dist evaluate {folder} --data {prepared.val_beton}\n\n"
        "Send what an outage of MLflow held back:\n\n"
        f"    resnet-dist tracking sync {folder} --tracking-uri URI\n"
    )


def _schedule(prepared: Prepared) -> str:
    kind, plan = prepared.recipe.schedule.kind, prepared.plan
    return f"cooldown over {plan.cooldown_steps:,} steps, after {kind}" if plan.cooldown_steps else kind


def _start(prepared: Prepared) -> str:
    init, fork = prepared.recipe.model.init, prepared.recipe.fork
    if fork is not None:
        return f"`{fork.checkpoint}`, after its step {fork.step} (fork, {fork.digest})"
    return f"`{init.weights}` ({init.digest})" if init is not None else ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return "unknown"


Log = Callable[[str], None]
"""Takes one line for the user."""
Undelivered = Fault | UserError | OSError
"""Why MLflow does not have something."""


def open_mlflow_run(
    prepared: Prepared,
    nodes: Sequence[ClusterNode],
    code: CodeVersion | None,
    *,
    parent_run_id: str | None,
    tags: Mapping[str, str],
) -> RunHandle:
    """Opens the MLflow run that belongs to the run's folder, or continues it; below `parent_run_id`, if that is given.

    Raises Fault if MLflow does not respond.
    """
    recipe, profile, storage = prepared.recipe, prepared.profile, prepared.storage
    for file, text in _texts(prepared).items():
        path = storage.folder / file
        write_text_atomically(path, text)
        storage.upload(path)
    return open_run(
        profile.tracking_uri,
        profile.experiment,
        prepared.name,
        storage,
        {**run_tags(profile, prepared.identity, nodes, code), **tags},
        run_params(recipe, profile),
        parent_run_id=parent_run_id,
        limit_s=10.0 if parent_run_id is None else _TRIAL_OPEN_LIMIT_S,
    )


def describe_in_mlflow(
    handle: RunHandle, prepared: Prepared, nodes: Sequence[ClusterNode], code: CodeVersion | None, log: Log
) -> None:
    """Describes the run on its page in MLflow. None of this can fail a run: a refusal only causes a warning."""
    profile, inputs = prepared.profile, data_inputs(prepared)
    facts = {"libraries": library_versions(), "nodes": node_facts(nodes)}
    made_by: dict[str, PreparationRun] = {}
    with _warn_on_error(log, "the run is not linked to how its data was made"):
        made_by = links(inputs, find_preparations(profile.tracking_uri, {data.digest for data in inputs}))
        set_tags(handle, {f"data_prep.{context}": run.run_id for context, run in made_by.items()})
    with _warn_on_error(log, "the run is not described in MLflow"):
        log_details(
            handle,
            description=description(prepared, made_by),
            texts={
                **{f"config/{file}": text for file, text in _texts(prepared).items()},
                "code/environment.json": json.dumps(facts, indent=1),
                **({"code/changes.diff": code.diff} if code and code.dirty and profile.record_changes else {}),
            },
            inputs=inputs,
        )


def _texts(prepared: Prepared) -> dict[str, str]:
    return {
        "recipe.yaml": to_yaml(prepared.recipe),
        "profile.yaml": redacted(to_yaml(prepared.profile)),
        "class_names.json": json.dumps(prepared.val.class_names, indent=0, ensure_ascii=False) + "\n",
    }


@contextmanager
def _warn_on_error(log: Log, consequence: str) -> Iterator[None]:
    """Turns errors of MLflow or storage into a line for the user."""
    try:
        yield
    except (Fault, UserError, OSError) as error:
        log(f"warning: {consequence}: {redacted(str(error))}")


def short(why: Undelivered) -> str:
    """The reason, without what to do about it, which `waits` says once."""
    return redacted(why.why if isinstance(why, ServerUnavailable) else str(why))


def waits(location: str, tracking_uri: str) -> str:
    """Says what happens to data that MLflow did not accept."""
    return (
        "the rest is kept in storage; send it with "
        f"`resnet-dist tracking sync {location} --tracking-uri {redacted(tracking_uri)}`"
    )


def send_files(storage: RunStorage, handle: RunHandle, class_names: Sequence[str]) -> None:
    """Events, list of checkpoints and plots, as artifacts of the run."""
    log = EventLog(storage).read()
    checkpoints = json.dumps(list_checkpoints(storage), indent=1)
    log_details(handle, texts={"events.log": log, "checkpoints.json": checkpoints})
    set_tags(handle, count_events(log))
    with tempfile.TemporaryDirectory(prefix="resnet-dist-plots-") as folder:
        history = read_history(handle.run_dir, handle.run_id)
        if draw_plots(history, class_names, Path(folder)):
            log_folder(handle, Path(folder), "plots")


def list_checkpoints(storage: RunStorage) -> list[dict[str, object]]:
    """The checkpoints in storage, newest first, and the best weights: their locations, steps and metrics. Only their
    metadata is read, so damage is not noticed here.
    """
    found: list[dict[str, object]] = []
    for name in list_saved(storage):
        metadata = read_metadata(storage, name)
        if metadata is not None:
            path = f"{storage.location}/{name}"
            found.append({"name": name, "step": metadata.step, "metrics": dict(metadata.metrics), "path": path})
    return found
